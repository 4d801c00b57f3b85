"""Access to files in a folder that somebody else may have filled; only files inside that folder are ever
read.

:class:`PackFolder` is the interface that the pack reader uses. :class:`LocalFolder` is a folder on this
machine's disk. :class:`RemoteFolder` is a folder in an object store; its files are read by range, so
that reading a map transfers only that map's bytes.
"""

from __future__ import annotations

import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import short_reason
from xattn.runtime.stores import BLOCK, StoreError, StorePath, resolve_place

AGAIN = "make the pack again"
SMALL = 1 << 20  # bytes; smaller files in a store are cached
KEPT = 32 << 20  # bytes of small files that are cached


class PackError(ValueError):
    """A problem with a pack; the message tells the person who opens the pack what is wrong and what to do
    about it."""


class PackFolder(ABC):
    """Read access to the files of one pack; thread-safe, and no file is left open.

    Attributes:
        address: the folder's path or URL.
        name: the folder's name, the last part of its address.
        path: the folder on this machine's disk; None if it is elsewhere.
    """

    address: str
    name: str
    path: Path | None

    @abstractmethod
    def part(self, name: str, start: int, end: int) -> bytes:
        """Read the bytes ``start`` to ``end`` of a file, or fewer if the file ends earlier.

        Raises:
            PackError: the file is missing, is outside the folder, or cannot be read.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes; the errors are those of :meth:`part`."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name; raise a PackError or OSError if this cannot be
        determined."""

    @abstractmethod
    def on_disk(self, name: str) -> Path:
        """Return the path of a file, for readers that need one; for a remote folder, it is a copy that
        exists as long as this object."""

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Read all bytes of a file, at most ``limit``.

        Raises:
            PackError: as in :meth:`part`, or the file is larger than ``limit``.
        """


def folder_of(
    given: str | Path | StorePath, argument: str = "pack", trusted: bool = False
) -> PackFolder:
    """Return the folder of a pack, on disk or in a store.

    Raises:
        ValueError: the URL does not name a store that can be read.
    """
    place = resolve_place(given, argument)
    return RemoteFolder(place) if isinstance(place, StorePath) else LocalFolder(place, trusted)


class LocalFolder(PackFolder):
    """A folder on disk.

    Args:
        trusted: whether the folder is the caller's own. If so, links that lead out of it are
            followed, and the OSError of a file that cannot be opened is raised unchanged.
    """

    path: Path

    def __init__(self, folder: Path, trusted: bool = False) -> None:
        self.path = folder if trusted else folder.resolve()
        self.address, self.name = str(self.path), self.path.name
        self._trusted = trusted

    def _open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb") if self._trusted else open_inside(self.path, name)

    def part(self, name: str, start: int, end: int) -> bytes:
        with self._open(name) as stream:
            return _read(stream, name, start, end)

    def read(self, name: str, limit: int) -> bytes:
        with self._open(name) as stream:
            size = os.fstat(stream.fileno()).st_size
            _check_limit(name, size, limit)
            return _read(stream, name, 0, size)

    def size(self, name: str) -> int:
        with self._open(name) as stream:
            return os.fstat(stream.fileno()).st_size

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    def on_disk(self, name: str) -> Path:
        self._open(name).close()
        return (self.path / name).resolve()


class RemoteFolder(PackFolder):
    """A folder in an object store.

    Sizes and small files are requested only once. Files are assumed not to change while this object
    exists, because a pack's manifest contains their hashes.
    """

    path: None = None

    def __init__(self, place: StorePath) -> None:
        self.place = place
        self.address, self.name = place.url, place.name
        self._sizes: dict[str, int] = {}
        self._kept = LRUCache(KEPT)
        self._copying = threading.Lock()
        self._copies: TemporaryDirectory[str] | None = None

    def part(self, name: str, start: int, end: int) -> bytes:
        with self._asking(name) as file:
            return file.read(start, end)

    def size(self, name: str) -> int:
        if name not in self._sizes:
            with self._asking(name) as file:
                self._sizes[name] = file.known_size()
        return self._sizes[name]

    def exists(self, name: str) -> bool:
        with self._asking(name) as file:
            return file.is_file()

    def read(self, name: str, limit: int) -> bytes:
        data: bytes | None = self._kept.get(name)
        if data is None:
            data = self.part(name, 0, SMALL)  # without asking for the size of a small file
        size = len(data) if len(data) < SMALL else self.size(name)
        _check_limit(name, size, limit)
        if len(data) < SMALL:
            self._kept.put(name, data, size)
            return data
        return data + self.part(name, SMALL, size)

    def on_disk(self, name: str) -> Path:
        with self._copying:
            if self._copies is None:
                self._copies = TemporaryDirectory(prefix="xattn-")
            path = Path(self._copies.name, name.replace("/", "__"))
            if not path.exists():
                size = self.size(name)
                with path.with_suffix(".part").open("wb") as copy:
                    for start in range(0, size, BLOCK):
                        copy.write(self.part(name, start, min(start + BLOCK, size)))
                path.with_suffix(".part").rename(path)
        return path

    @contextmanager
    def _asking(self, name: str) -> Iterator[StorePath]:
        """A file in this folder; a name that could lead out of it, a missing file, or a store that does not
        respond raises a PackError."""
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\\0?#"):
            raise PackError(f"{name!r:.60} cannot be the name of a file of a pack; {AGAIN}")
        try:
            yield self.place / name
        except FileNotFoundError:
            raise PackError(
                f"{self.place}/{name} is missing; upload the pack again, or {AGAIN}"
            ) from None
        except StoreError as error:
            raise PackError(str(error)) from None


def open_inside(folder: Path, name: str) -> IO[bytes]:
    """Open a regular file in ``folder`` (a resolved path) for reading; links that lead out of it are
    rejected.

    Raises:
        PackError: the file is missing, leads out of the folder, is not a regular file, or may not be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        raise PackError(f"{name} is missing; copy the pack again, or {AGAIN}") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise PackError(f"{name!r:.60} cannot be found ({short_reason(error)}); {AGAIN}") from None
    if not path.is_relative_to(folder):
        raise PackError(f"{name} is a link that leads out of the folder; put the file itself there")
    try:
        stream = open(path, "rb", opener=_open_without_waiting)
    except OSError as error:
        raise PackError(
            f"{name} cannot be read ({short_reason(error)}); check its permissions"
        ) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise PackError(f"{name} is not a regular file; copy the pack again, or {AGAIN}")
    return stream


def _check_limit(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise PackError(f"{name} has {size:,} bytes, over the limit of {limit:,}")


def _read(stream: IO[bytes], name: str, start: int, end: int) -> bytes:
    stream.seek(start)
    try:
        return stream.read(end - start)
    except OSError as error:
        raise PackError(f"{name} cannot be read ({short_reason(error)}); try again") from None


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a named pipe would otherwise block until somebody writes to it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
