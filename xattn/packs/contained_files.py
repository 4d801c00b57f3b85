"""Files of a folder that somebody else may have filled: opened inside that folder, or not at all.

:class:`PackFolder` is what the reader of packs sees of a folder, wherever it is; :class:`LocalFolder` is
one on this machine's disk.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO

AGAIN = "make the pack again"


class PackError(ValueError):
    """What is wrong with a pack, and what to do about it, in words for the person who opens it."""


class PackFolder(ABC):
    """Read access to the files of one pack; safe to share between threads, nothing stays open.

    Attributes:
        address: where the folder is: its path, or its URL.
        name: what the folder is called, the last part of its address.
        path: the folder on this machine's disk; None where it is elsewhere.
    """

    address: str
    name: str
    path: Path | None

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading at any place.

        Raises:
            PackError: it is missing, not the folder's own, or cannot be read.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; PackError or OSError where that cannot be told."""

    @abstractmethod
    def on_disk(self, name: str) -> Path:
        """A file for readers that want a path; of a folder elsewhere a copy that goes with this object."""

    def size(self, name: str) -> int:
        """The bytes of a file; raises as :meth:`open`."""
        with self.open(name) as stream:
            return stream.seek(0, os.SEEK_END)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file, at most ``limit``.

        Raises:
            PackError: as :meth:`open`, or the file is larger.
        """
        with self.open(name) as stream:
            return _read_all(stream, name, limit)


class LocalFolder(PackFolder):
    """A folder on disk.

    Args:
        trusted: the folder is the caller's own: links that lead out of it are followed, and a file that
            cannot be opened is the OSError that it is.
    """

    path: Path

    def __init__(self, folder: Path, trusted: bool = False) -> None:
        self.path = folder if trusted else folder.resolve()
        self.address, self.name = str(self.path), self.path.name
        self._trusted = trusted

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb") if self._trusted else open_inside(self.path, name)

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def on_disk(self, name: str) -> Path:
        self.open(name).close()
        return (self.path / name).resolve()


def open_inside(folder: Path, name: str) -> IO[bytes]:
    """Open a regular file of ``folder`` (a resolved path) for reading; links that lead out are refused.

    Raises:
        PackError: it is missing, leads out of the folder, is not a regular file, or may not be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        raise PackError(f"{name} is missing; copy the pack again, or {AGAIN}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(f"{name!r:.60} cannot be found ({why(error)}); {AGAIN}") from None
    if not path.is_relative_to(folder):
        raise PackError(f"{name} is a link that leads out of the folder; put the file itself there")
    try:
        stream = open(path, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise PackError(f"{name} cannot be read ({why(error)}); check its permissions") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise PackError(f"{name} is no regular file; copy the pack again, or {AGAIN}")
    return stream


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise block until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a file of ``folder``, at most ``limit``.

    Raises:
        PackError: as :func:`open_inside`, or the file is larger.
    """
    with open_inside(folder, name) as stream:
        return _read_all(stream, name, limit)


def _read_all(stream: IO[bytes], name: str, limit: int) -> bytes:
    size = stream.seek(0, os.SEEK_END)
    if size > limit:
        raise PackError(f"{name} has {size:,} bytes, over the limit of {limit:,}")
    stream.seek(0)
    try:
        return stream.read(size + 1)
    except OSError as error:
        raise PackError(f"{name} cannot be read ({why(error)}); try again") from None


def why(error: BaseException) -> str:
    """The reason in an error, on one line and without a path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split())[:200] or type(error).__name__
