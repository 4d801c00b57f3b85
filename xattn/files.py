"""Writing files so that a reader sees the old or the new state, never a half (DESIGN contract 8)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def output_error(argument: str, path: str | Path, error: OSError) -> OSError:
    """One clear line for a failed write: the argument, the reason, the remedy."""
    reason = error.strerror or str(error)
    return OSError(
        error.errno or 0,
        f"{argument}: cannot write {path} ({reason}); choose a writable folder with free space, "
        f"earlier results are untouched",
    )


@contextmanager
def atomic_file(path: str | Path, argument: str = "output") -> Iterator[Path]:
    """Yield a temporary sibling of ``path``; it takes the name of ``path`` when the block ends."""
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
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(argument, path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, marker: str, argument: str = "output") -> Iterator[Path]:
    """Yield a temporary sibling folder that replaces ``path`` when the block ends.

    An existing ``path`` is replaced only if it is empty or holds the file ``marker``: a folder that
    xattn did not write is refused with a ``ValueError``.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{argument}: {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
        raise ValueError(
            f"{argument}: {path} is not empty and holds no {marker}; choose a new folder, "
            f"nothing was overwritten"
        )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        temporary.chmod(0o755)
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
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


def check_folder(path: str | Path, argument: str = "output") -> None:
    """Fail before a long job rather than after it: ``path`` has to be, or become, a writable folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{argument}: {path} is a file; name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise output_error(argument, path, error) from error


def write_json(path: str | Path, value: Any, argument: str = "output") -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_file(path, argument) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
