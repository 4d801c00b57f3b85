"""Packs in object stores: files read by range, so that a map costs its own bytes and no more."""

from __future__ import annotations

import io
import os
import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from xattn.packs.contained_files import AGAIN, LocalFolder, PackError, PackFolder
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.stores import BLOCK, StoreError, StorePath, place_of

HEAD = 64 << 10  # bytes that are read at once where a file begins
SMALL = 1 << 20  # bytes; smaller files are kept
KEPT = 32 << 20  # bytes of small files that are kept


def folder_of(
    given: str | Path | StorePath, argument: str = "pack", trusted: bool = False
) -> PackFolder:
    """The folder of a pack, on disk or in a store.

    Raises:
        ValueError: a URL of no store that can be read.
    """
    place = place_of(given, argument)
    return RemoteFolder(place) if isinstance(place, StorePath) else LocalFolder(place, trusted)


class RemoteFolder(PackFolder):
    """A folder of an object store.

    Files are taken to stay as they are while this object lives, since a pack's manifest has their hashes:
    sizes and small files are asked for once.
    """

    path: None = None

    def __init__(self, place: StorePath) -> None:
        self.place = place
        self.address, self.name = place.url, place.name
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._kept = LRUCache(KEPT)
        self._copying = threading.Lock()
        self._copies: TemporaryDirectory[str] | None = None

    def open(self, name: str) -> IO[bytes]:
        return cast("IO[bytes]", _Ranges(self, name, self.size(name)))

    def exists(self, name: str) -> bool:
        file = self.file(name)
        try:
            return file.exists()
        except StoreError as error:
            raise PackError(str(error)) from None

    def size(self, name: str) -> int:
        with self._lock:
            size = self._sizes.get(name)
        if size is None:
            try:
                size = self.file(name).known_size()
            except FileNotFoundError:
                raise self._missing(name) from None
            except StoreError as error:
                raise PackError(str(error)) from None
            with self._lock:
                self._sizes[name] = size
        return size

    def read(self, name: str, limit: int) -> bytes:
        data: bytes | None = self._kept.get(name)
        if data is None:
            data = self.range(name, 0, SMALL)  # without asking for the size of a small file
        size = len(data) if len(data) < SMALL else self.size(name)
        if size > limit:
            raise PackError(f"{name} has {size:,} bytes, over the limit of {limit:,}")
        if len(data) < SMALL:
            self._kept.put(name, data, size)
            return data
        return data + self.range(name, SMALL, size)

    def on_disk(self, name: str) -> Path:
        with self._copying:
            if self._copies is None:
                self._copies = TemporaryDirectory(prefix="xattn-")
            path = Path(self._copies.name, name.replace("/", "__"))
            if not path.exists():
                with self.open(name) as stream, path.with_suffix(".part").open("wb") as copy:
                    shutil.copyfileobj(stream, copy, BLOCK)
                path.with_suffix(".part").rename(path)
        return path

    def range(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` of a file; fewer where it ends before.

        Raises:
            PackError: the file is missing, or the store does not answer.
        """
        try:
            return self.file(name).read(start, end)
        except FileNotFoundError:
            raise self._missing(name) from None
        except StoreError as error:
            raise PackError(str(error)) from None

    def file(self, name: str) -> StorePath:
        """A file of this folder; PackError for a name that could lead out of it."""
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts) or any(c in name for c in "\\\0?#"):
            raise PackError(f"{name!r:.60} cannot be the name of a file of a pack; {AGAIN}")
        return self.place / name

    def _missing(self, name: str) -> PackError:
        return PackError(f"{self.place}/{name} is missing; upload the pack again, or {AGAIN}")


class _Ranges(io.RawIOBase):
    """An open file of a store; each read is one request, but for the head, which is kept."""

    def __init__(self, folder: RemoteFolder, name: str, size: int) -> None:
        self._folder, self._name, self._size, self._at = folder, name, size, 0
        self._head = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek: got {offset}; give a place in the file")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        data = self._range(self._at, end) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self._range(self._at, self._size) if self._size > self._at else b""
        self._at += len(data)
        return data

    def _range(self, start: int, end: int) -> bytes:
        if not self._head and start == 0:
            self._head = self._folder.range(self._name, 0, min(max(HEAD, end), self._size))
        if end <= len(self._head):
            return self._head[start:end]
        held = self._head[start:]
        return held + self._folder.range(self._name, start + len(held), end)
