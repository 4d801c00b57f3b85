"""Makes temporary folders for live results and for databases of packs.

A folder is deleted when its viewer ends or, if the viewer was killed, when the next viewer starts. A viewer
holds a lock on its folder, which the system releases when the process ends for any reason.
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
YOUNG = 60  # a folder is not deleted in its first seconds, since it may not be locked yet
_MINE: list[Scratch] = []


class Scratch:
    """A new folder in the system's temporary folder, which only its owner can read."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock = _locked(self.path / LOCK, create=True)
        _MINE.append(self)


def clean() -> None:
    """Delete the folders of this process; after SIGTERM, Python would not delete them."""
    while _MINE:
        _MINE.pop()._folder.cleanup()


def sweep() -> None:
    """Delete the folders of viewers of this user that were killed."""
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
    """Open and lock a file; None if another process holds the lock or the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # fcntl exists only on POSIX systems
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
