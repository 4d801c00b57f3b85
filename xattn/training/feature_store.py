"""Writing a feature cache: claim its folder, store rows, finish it; a killed run leaves whole rows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.photos.base import Photos
from xattn.runtime import strict_json
from xattn.runtime.files import output_error, write_json
from xattn.training.feature_files import (
    CHECKSUMS,
    DIGEST,
    FORMAT,
    INDEX,
    KEY,
    MISSING,
    PREFIX,
    ROWS,
    UNREADABLE,
    checksum,
    index_digest,
    key_digest,
)
from xattn.training.run_folder import LOCK_FILE, locked


@contextlib.contextmanager
def claimed(folder: Path, key: dict[str, Any]) -> Iterator[None]:
    """Own ``folder``, which is new or holds features with this ``key``.

    Raises:
        ValueError: it holds anything else, is damaged, or is in use.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"features: {folder} is a file; name a folder")
    held = folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK_FILE}
    if held and not (folder / KEY).is_file():
        raise ValueError(f"features: {folder} is not empty and holds no features; choose a new one")
    if held and _begun(folder):
        _check_key(folder, key)
    with locked(folder, "features"):
        if not _begun(folder):
            for path in (*folder.glob("tap-*"), *(folder / f for f in (PREFIX, ROWS, CHECKSUMS))):
                path.unlink(missing_ok=True)
            write_json(folder / KEY, key, "features")
        yield


def _begun(folder: Path) -> bool:
    """Whether a row is stored; otherwise nothing is worth keeping, as when the disk had no room."""
    rows = folder / ROWS
    return (folder / INDEX).exists() or (rows.is_file() and any(rows.read_bytes()))


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    try:
        old = strict_json.parse((folder / KEY).read_bytes())
        if not isinstance(old, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"features: {folder / KEY} is damaged ({error}); delete {folder} and cache again"
        ) from None
    if old == key:
        return
    if (found := old.get("format")) != FORMAT:
        age = "a newer" if isinstance(found, int) and found > FORMAT else "an older"
        raise ValueError(
            f"features: {folder} was written by {age} xattn, in format {found}, this one writes "
            f"{FORMAT}; choose another folder, or delete it and cache again"
        )
    differ = [
        f"{name}: {json.dumps(old.get(name))} there, {json.dumps(key.get(name))} here"
        for name in sorted({*old, *key})
        if old.get(name) != key.get(name)
    ]
    raise ValueError(
        f"features: {folder} has the key {key_digest(old)}, this backbone and data have "
        f"{key_digest(key)} ({'; '.join(differ)}); choose another folder, or delete it and cache again"
    )


class FeatureStore:
    """The files of a cache while it is filled.

    Rows are written with ``write`` and not through a memory map, where a full disk would be a signal
    that kills the process.
    """

    def __init__(
        self, folder: Path, backbone: Backbone, photos: Photos, key: dict[str, Any]
    ) -> None:
        self.folder, self.key = folder, key
        self.dtype: np.dtype[Any] = np.dtype(key["dtype"])
        self.grid = backbone.tap_sizes[-1]
        self.count, self.total = len(photos), len(photos) * key["views"]
        patches = self.grid[0] * self.grid[1]
        self.shapes = {
            f"tap-{i}": [self.total, patches, c] for i, c in enumerate(backbone.channels)
        }
        prefix = backbone.prefix_tokens
        self.shapes[PREFIX] = [self.total, prefix, backbone.channels[-1] if prefix else 0]
        try:
            self._allocate()
        except OSError as error:
            raise self._error(error) from error
        self.rows = np.fromfile(folder / ROWS, dtype=np.uint8)
        checksums = np.fromfile(folder / CHECKSUMS, dtype=np.uint8).reshape(-1, DIGEST)
        self.rows[~checksums.any(1)] = MISSING  # rows of an older version, which wrote no checksums

    def _allocate(self) -> None:
        """Give every file its length, if the disk has room for all of them."""
        sizes = {file: self._row_bytes(file) * self.total for file in self.shapes}
        there = sum(f.stat().st_blocks * 512 for f in self.folder.iterdir() if f.is_file())
        free, needed = shutil.disk_usage(self.folder).free + there, sum(sizes.values())
        if needed > free:
            raise OSError(
                f"features: {self.folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                f"make room, use dtype='float16', or choose another disk"
            )
        others = {ROWS: self.total, CHECKSUMS: self.total * DIGEST}
        for file, size in {**sizes, **others}.items():
            with (self.folder / file).open("ab") as stream:  # another process may be here, too
                if stream.tell() > size:
                    raise ValueError(
                        f"features: {self.folder / file} is longer than it should be; delete "
                        f"{self.folder} and cache again"
                    )
                stream.truncate(size)

    def _row_bytes(self, file: str) -> int:
        return int(np.prod(self.shapes[file][1:])) * self.dtype.itemsize

    def _error(self, error: OSError) -> OSError:
        return error if error.errno is None else output_error("features", self.folder, error)

    def put(self, first: int, states: NDArray[np.uint8], maps: Sequence[Tensor]) -> None:
        """Store rows from ``first`` on; their states last, so that no half row counts."""
        try:
            dtype = getattr(torch, self.dtype.name)
            numbers = [values.to(dtype).cpu().contiguous().numpy() for values in maps]
            for file, values in zip(self.shapes, numbers, strict=True):
                self._write(file, first * self._row_bytes(file), values.tobytes())
            checksums = b"".join(checksum(numbers, row) for row in range(len(states)))
            self._write(CHECKSUMS, first * DIGEST, checksums)
            self._write(ROWS, first, states.tobytes())
        except OSError as error:
            raise self._error(error) from error

    def _write(self, file: str, at: int, data: bytes) -> None:
        with (self.folder / file).open("r+b", buffering=0) as stream:
            stream.seek(at)
            _write_all(stream, data)

    def finish(self, photos: Photos) -> None:
        """Write the index, which makes the folder a whole cache."""
        rows = np.fromfile(self.folder / ROWS, dtype=np.uint8).reshape(-1, self.count)
        if (rows == MISSING).any():
            raise OSError(f"features: {self.folder} lacks rows that were written; check the disk")
        skipped = self._skipped(photos, np.flatnonzero((rows == UNREADABLE).any(0)).tolist())
        for file in (*self.shapes, CHECKSUMS, ROWS):
            with (self.folder / file).open("rb") as stream:
                os.fsync(stream.fileno())
        index = {
            "key": key_digest(self.key),
            "shapes": self.shapes,
            "grid": list(self.grid),
            "photos": self.count,
            "skipped": skipped,
            "names": [photos.name(i) for i in range(self.count)],
        }
        index = strict_json.parse(json.dumps(index))  # as it will be read
        index["sha256"] = index_digest(index)
        write_json(self.folder / INDEX, index, "features")

    def _skipped(self, photos: Photos, unreadable: list[int]) -> list[tuple[int, str]]:
        """The reason why each of the photos could not be read."""
        skipped = []
        for i in unreadable:
            try:
                photos.load(i, self.key["max_pixels"])
                reason = "could not be read when the features were cached"
            except (ValueError, OSError) as error:
                reason = str(error)
            skipped.append((i, reason))
        if len(skipped) == self.count:
            raise ValueError(
                f"data: none of the {self.count} images could be read; the first: {skipped[0][1]}"
            )
        return skipped


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
