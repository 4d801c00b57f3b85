"""Writing files and folders so that a reader sees either the old state or the complete new one.

The module also checks whether a folder is free for a training run, or holds one to continue; torch is
imported only where tensors are written or read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from xattn.runtime.stores import StoreError, is_remote

MANY = 64  # files; above this, all are synchronised at once
NEW, OLD = ".tmp", ".old"  # suffixes of hidden folders beside an output


def output_error(argument: str, path: str | Path, error: OSError) -> OSError:
    """A one-line error for a failed write: the argument, the reason, the remedy."""
    reason = error.strerror or str(error)
    return OSError(
        error.errno or 0,
        f"{argument}: cannot write {path} ({reason}); choose a writable folder with free space, "
        f"earlier results are untouched",
    )


def follow_link(path: str | Path, argument: str = "output") -> Path:
    """The path to write to: for a symbolic link this is its target, so the link itself is kept.

    Raises:
        ValueError: ``path`` is, or leads through, a link whose target does not exist.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if not os.path.islink(part) or os.path.exists(part):
            continue
        with suppress(OSError):  # not a folder that could hold a backup
            _restore(Path(os.path.realpath(part)))
        if not os.path.exists(part):
            raise ValueError(
                f"{argument}: {part} is a link to {os.readlink(part)}, which is not there; make that "
                f"folder, or remove the link"
            )
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextmanager
def atomic_file(path: str | Path, argument: str = "output", mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; it takes the name of ``path`` when the block ends.

    The temporary file has its final permissions, ``mode`` restricted by the umask, from the start.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.parent / f".{path.name}.{secrets.token_hex(4)}{path.suffix}"
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        temporary = new
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(argument, path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_output(
    folder: str | Path, argument: str = "output", is_ours: Callable[[Path], bool] | None = None
) -> None:
    """Check an output folder before the work starts rather than after it has ended; a folder in a store is
    not checked until it is written.

    Args:
        is_ours: returns whether a folder that is not empty may be replaced; None trusts the caller.

    Raises:
        ValueError: ``folder`` is a file, a link without a target, or a folder with other content.
    """
    if is_remote(folder, argument):
        return
    folder = follow_link(folder, argument)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{argument}: {folder} is a file; name a folder")
    if is_ours is not None and folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(
            f"{argument}: {folder} is not empty and was not written by xattn; choose a new folder, "
            f"nothing was overwritten"
        )


@contextmanager
def atomic_folder(
    path: str | Path,
    owned: Collection[str],
    is_ours: Callable[[Path], bool] | None = None,
    argument: str = "output",
) -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces ``path`` when the block ends.

    First, whatever earlier writers of ``path`` left behind when they were killed is restored or deleted.

    Args:
        path: a folder, or a link to one, which is kept; see :func:`follow_link`.
        owned: names of the files and folders that the caller writes; anything else in an existing
            ``path`` (a README, notes) is carried over.
        is_ours: returns whether a folder that is not empty may be replaced; if not, a ``ValueError`` is
            raised. None trusts the caller.
    """
    path = follow_link(path, argument)
    check_output(path, argument)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(path)
        check_output(path, argument, is_ours)
        _sweep(path)
        with temporary_folder(path) as temporary:
            yield temporary
            for entry in path.iterdir() if path.is_dir() else ():
                if entry.name not in owned and not (temporary / entry.name).exists():
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, temporary / entry.name)
            _sync_all([file for file in temporary.rglob("*") if file.is_file()])
            if path.exists():
                _swap(temporary, path)
            else:
                os.replace(temporary, path)
    except StoreError:  # about photos that the block reads
        raise
    except OSError as error:
        raise output_error(argument, path, error) from error


def _swap(new: Path, path: Path) -> None:
    """Exchange the names of the folders ``new`` and ``path``."""
    old = new.with_suffix(OLD)
    with folder_lock(path):  # so that no other writer mistakes the backup for a killed writer's
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            os.replace(old, path)
            raise
        os.replace(old, new)


# ---------------------------------------------------------------------- after kills


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``path``, deleted when the block ends.

    If the process is killed, the next :func:`atomic_folder` of ``path`` deletes it.
    """
    while True:
        folder = path.parent / f".{path.name}.{secrets.token_hex(4)}{NEW}"
        folder.mkdir()
        with folder_lock(folder, wait=True):
            if not folder.exists():  # swept by another process before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _restore(path: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if path.exists():
        return
    backups = _siblings(path, rf"\w+\{OLD}")
    for old in sorted(backups, key=lambda old: old.stat().st_ctime_ns)[-1:]:
        with folder_lock(old) as held:
            if held is not False:
                os.replace(old, path)


def _sweep(path: Path) -> None:
    """Delete unfinished and replaced folders that killed writers of ``path`` left behind."""
    for leftover in _siblings(path, rf"[0-9a-f]{{8}}\.({NEW[1:]}|{OLD[1:]})"):
        with folder_lock(leftover) as held:
            if held and (leftover.suffix == NEW or path.exists()):
                shutil.rmtree(leftover, ignore_errors=True)


def _siblings(path: Path, ending: str) -> list[Path]:
    """Hidden folders beside ``path`` named ``.<its name>.<ending>``."""
    pattern = re.compile(re.escape(f".{path.name}.") + ending)
    found: list[Path] = []
    with suppress(PermissionError):  # a folder that is writable but not listable
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    return [entry for entry in found if entry.is_dir() and not entry.is_symlink()]


@contextmanager
def folder_lock(folder: Path, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder until the block, or the process, ends. Yields True if the lock is held here, False if
    another process or thread holds it, or None if this cannot be determined."""
    with ExitStack() as stack:
        held: bool | None = None
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except (ImportError, OSError):  # not POSIX, or a file system without locks
            pass
        yield held


def check_folder(path: str | Path, argument: str = "output") -> None:
    """Raise an error, before a long job rather than after it, unless ``path`` is or can become a writable
    folder."""
    path = follow_link(path, argument)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{argument}: {path} is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise output_error(argument, path, error) from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, argument: str = "output", mode: int = 0o666) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, argument, mode) as temporary:
        dump_json(temporary, value)


def dump_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON into a folder that is completed later."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Lone surrogates are escaped; JSON reads them back from \udc80.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def dump_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state dict as a safetensors file into a folder that is completed later. The file is built in
    memory first, so that a full disk causes an ``OSError`` when it is written."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The open safetensors file, whose tensors are read on demand. The library accepts only UTF-8 paths, so
    files with other paths are opened by file descriptor."""
    from safetensors import safe_open

    with path.open("rb") as plain:
        utf8 = printable(str(path)) == str(path)
        with safe_open(path if utf8 else f"/dev/fd/{plain.fileno()}", "pt") as file:
            yield file


def accepted_by(read: Callable[[Path], object]) -> Callable[[Path], bool]:
    """Return a function for the ``is_ours`` argument of :func:`atomic_folder`; it tells whether ``read``
    accepts a folder without error."""

    def is_ours(folder: Path) -> bool:
        try:
            read(folder)
        except (ValueError, OSError):
            return False
        return True

    return is_ours


def write_rows(
    path: str | Path, rows: Sequence[Mapping[str, Any]], argument: str = "output"
) -> Path:
    """Write ``rows`` as CSV, atomically: a column for each key in order of first use, numbers to six
    digits, None and NaN as empty cells.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"{argument}: got no rows for {path}; nothing was measured")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (
        atomic_file(path, argument) as temporary,
        # File names may contain bytes that are not UTF-8.
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(key)) for key in columns] for row in rows)
    return Path(path)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return int(value) if isinstance(value, bool) else value


def printable(name: str) -> str:
    """A file name that can be printed and written as UTF-8, with escapes for other bytes.

    >>> printable("caf\\udce9.png")
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file, which need not fit in memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_all(paths: Sequence[Path]) -> None:
    if len(paths) > MANY and hasattr(os, "sync"):  # faster than one file after the other
        os.sync()
        return
    for path in paths:
        _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Signature(NamedTuple):
    """The stat signature of a file, which changes when the file is changed or replaced."""

    mtime_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Signature:
        """The signature in a result of ``os.stat``."""
        return cls(found.st_mtime_ns, found.st_size, found.st_ino)


RUN_FILE, LOCK_FILE = "run.json", "run.lock"


def check_run_folder(folder: Path, resume: bool) -> None:
    """Raise a ``ValueError`` unless ``folder`` is free for a new run, or holds one to resume."""
    follow_link(folder)  # refuses a link without a target
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    if (folder / RUN_FILE).is_file():
        if not resume:
            raise ValueError(
                f"output: {folder} holds a run already; go on with it by --resume (resume=True), or "
                f"give another --output"
            )
    elif resume:
        raise ValueError(f"resume: {folder} holds no run; check output, or train without resume")
    elif folder.is_dir() and any(p.name != LOCK_FILE for p in folder.iterdir()):
        raise ValueError(f"output: {folder} is not empty and holds no run; choose a new folder")
