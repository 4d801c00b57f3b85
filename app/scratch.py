"""A temporary folder for live results or for databases of packs, deleted with the viewer.

It is deleted when the viewer ends, or by the next viewer if this one was killed. A viewer holds a lock
on its folder; the system releases it whenever and however the process ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PREFIX, LOCK = "xattn-live-", ".lock"
YOUNG = 60  # seconds during which a new folder may not be locked yet
_MINE: list[Scratch] = []


class Scratch:
    """A new folder in the system's temporary folder, readable only by its owner."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock = _locked(self.path / LOCK, create=True)
        _MINE.append(self)


def clean() -> None:
    """Delete the folders of this process, which Python does not do after SIGTERM."""
    while _MINE:
        _MINE.pop()._folder.cleanup()


def sweep() -> None:
    """Delete the folders that this user's killed viewers left behind."""
    if not hasattr(os, "getuid"):
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            if folder.is_symlink() or not folder.is_dir() or about.st_uid != os.getuid():
                continue
            if time.time() - (folder / LOCK).lstat().st_mtime < YOUNG:
                continue
            lock = _locked(folder / LOCK)
            if lock is not None:
                with lock:
                    shutil.rmtree(folder, ignore_errors=True)


def _locked(path: Path, create: bool = False) -> Any:
    """A locked open file; None if somebody else holds the lock, or the system has no locks."""
    try:
        import fcntl
    except ImportError:  # not POSIX
        return None
    flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    try:
        stream = os.fdopen(os.open(path, flags, 0o600), "r+")
    except OSError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return None
    return stream
