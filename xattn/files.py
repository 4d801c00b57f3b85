"""Writing files so that a reader sees the old or the new state, never a half (DESIGN contract 8)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OLD = ".old"


def output_error(argument: str, path: str | Path, error: OSError) -> OSError:
    """One clear line for a failed write: the argument, the reason, the remedy."""
    reason = error.strerror or str(error)
    return OSError(
        error.errno or 0,
        f"{argument}: cannot write {path} ({reason}); choose a writable folder with free space, "
        f"earlier results are untouched",
    )


def follow_link(path: str | Path, argument: str = "output") -> Path:
    """Where an output folder is written: a link stays, and what it leads to is written.

    Raises:
        ValueError: ``path`` is, or lies behind, a link that leads nowhere.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if not os.path.islink(part) or os.path.exists(part):
            continue
        _restore(Path(os.path.realpath(part)))
        if not os.path.exists(part):
            raise ValueError(
                f"{argument}: {part} is a link to {os.readlink(part)}, which is not there; make that "
                f"folder, or remove the link"
            )
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


@contextmanager
def atomic_file(path: str | Path, argument: str = "output", mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; it takes the name of ``path`` when the block ends.

    Only its owner can read it until then, when it gets ``mode``.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(argument, path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(
    path: str | Path,
    owned: Collection[str],
    is_ours: Callable[[Path], bool] | None = None,
    argument: str = "output",
) -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces ``path`` when the block ends.

    Args:
        path: a folder, or a link to one, which stays; see :func:`follow_link`.
        owned: names of the files and folders that the caller writes; whatever else lies in an
            existing ``path`` (a README, notes) is carried over.
        is_ours: whether a folder that is not empty may be replaced at all; else it is refused with
            a ``ValueError``. None trusts the caller.
    """
    path = follow_link(path, argument)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{argument}: {path} is a file; name a folder")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(path)
        if is_ours is not None and path.is_dir() and any(path.iterdir()) and not is_ours(path):
            raise ValueError(
                f"{argument}: {path} is not empty and was not written by xattn; choose a new "
                f"folder, nothing was overwritten"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        for entry in path.iterdir() if path.is_dir() else ():
            if entry.name not in owned and not (temporary / entry.name).exists():
                copy = shutil.copytree if entry.is_dir() else shutil.copy2
                copy(entry, temporary / entry.name)
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o755)
        if path.exists():
            old = temporary.with_name(temporary.name + OLD)
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise output_error(argument, path, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _restore(path: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if not path.exists():
        for old in sorted(path.parent.glob(f".{path.name}.*{OLD}"))[-1:]:
            os.replace(old, path)


def check_folder(path: str | Path, argument: str = "output") -> None:
    """Fail before a long job rather than after it: ``path`` has to be, or become, a writable folder."""
    path = follow_link(path, argument)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{argument}: {path} is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise output_error(argument, path, error) from error


def write_json(path: str | Path, value: Any, argument: str = "output", mode: int = 0o644) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, argument, mode) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
            errors="backslashreplace",  # half characters, which JSON reads back from \udc80
        )


def printable(name: str) -> str:
    """A file name that can be printed and written as UTF-8, with escapes for bytes that are not.

    >>> printable("caf\\udce9.png")
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def file_sha256(path: str | Path) -> str:
    """Of a file's bytes, which need not fit in memory."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
