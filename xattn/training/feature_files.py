"""The files of a feature cache, and reading them: memory-mapped tokens of every photo.

A cache is a folder with one file a tap, (views x n, N, C) numbers in row-major order; one for the prefix
tokens, (views x n, P, C); ``rows`` with the state of every row; ``sha256`` with the checksum of every row
over all files; ``key.json`` with what the numbers depend on; and, once all rows are there,
``features.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Taps
from xattn.heads.attentive import Tokens
from xattn.runtime import strict_json

INDEX, KEY, ROWS, PREFIX, CHECKSUMS = "features.json", "key.json", "rows", "prefix", "sha256"
DIGEST = 32  # bytes of a SHA-256
MISSING, STORED, UNREADABLE = 0, 1, 2  # states of a row
FORMAT = 2  # format 1 told photos apart by their names and sizes alone


@dataclass(frozen=True, eq=False)
class Features:
    """Cached features; photo i is the i-th that could be read.

    ``names`` are those of the photos, ``skipped`` holds (name, reason) of the photos that could not be
    read, ``channels`` the width of every tap, ``grid`` their common (h, w), and ``key`` what the numbers
    depend on.
    """

    folder: Path
    key: dict[str, Any]
    names: list[str]
    skipped: list[tuple[str, str]]
    channels: tuple[int, ...]
    grid: tuple[int, int]
    prefix_tokens: int
    _rows: NDArray[np.int64] = field(repr=False)
    _photos: int
    _maps: tuple[NDArray[Any], ...] = field(repr=False)
    _checksums: NDArray[np.uint8] | None = field(default=None, repr=False)
    _checked: NDArray[np.bool_] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return key_digest(self.key)

    @property
    def views(self) -> int:
        """The number of crops of every photo: the evaluation crop, then random ones."""
        return int(self.key["views"])

    def batch(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Tokens:
        """Tokens of photos in float32: (B, N, C_i) of every tap, and the prefix (B, P, C).

        Args:
            index: numbers of photos, 0 .. len - 1.
            view: the crop, 0 .. views - 1: one for all photos, or one for each.

        Raises:
            ValueError: the numbers are not those that were written. Each row is compared with its
                checksum when it is read for the first time.
        """
        photos = self._rows[np.asarray(index, dtype=np.int64)]
        rows = np.asarray(view, dtype=np.int64) * self._photos + photos
        read = [m[rows] for m in self._maps]
        self._check(rows, read)
        *patches, prefix = (torch.from_numpy(m).float() for m in read)
        return Tokens(tuple(patches), prefix, self.grid)

    def _check(self, rows: NDArray[np.int64], read: Sequence[NDArray[Any]]) -> None:
        if self._checksums is None or self._checked is None:
            return
        for place in np.flatnonzero(~self._checked[rows]).tolist():
            row = int(rows[place])
            if checksum(read, place) != self._checksums[row].tobytes():
                raise ValueError(
                    f"features: the numbers of {self.names[self._position(row)]} in {self.folder} are "
                    f"not those that were written; delete the folder and cache again"
                )
            self._checked[row] = True

    def _position(self, row: int) -> int:
        return int(np.searchsorted(self._rows, row % self._photos))

    def taps(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Taps:
        """The same as :class:`~xattn.backbone.Taps` with empty logits (B, 0), for a head to read."""
        tokens = self.batch(index, view)
        maps = tuple(p.transpose(1, 2).unflatten(2, self.grid) for p in tokens.patches)
        return Taps(tokens.prefix.new_empty(len(tokens.prefix), 0), maps, tokens.prefix)


def open_features(folder: str | Path) -> Features:
    """The finished features in ``folder``.

    Raises:
        ValueError: they are damaged, or not finished. FileNotFoundError: there are none.
    """
    folder = Path(folder)
    if not (folder / KEY).is_file():
        raise FileNotFoundError(
            f"features: no features in {folder}; name a folder of cache_features"
        )
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"features: {folder} is not finished; cache the same photos again to go on"
        )
    return read_features(folder)


def read_features(
    folder: Path, key: dict[str, Any] | None = None, names: list[str] | None = None
) -> Features:
    """The features in ``folder``; ``key`` and the ``names`` of the photos are read there, too, if None."""
    try:
        return _read(folder, key, names)
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError
    ) as error:  # fmt: skip
        raise ValueError(
            f"features: {folder} is damaged ({type(error).__name__}: {error}); delete it and cache "
            f"again"
        ) from None


def _read(folder: Path, key: dict[str, Any] | None, names: list[str] | None) -> Features:
    key = key or strict_json.parse((folder / KEY).read_bytes())
    index = strict_json.parse((folder / INDEX).read_bytes())
    if index["key"] != key_digest(key):
        raise ValueError(f"it belongs to the key {index['key']}, {KEY} has {key_digest(key)}")
    unchecked = "sha256" not in index and not (folder / CHECKSUMS).exists()  # of an older version
    if not unchecked and index["sha256"] != index_digest(index):
        raise ValueError(f"{INDEX} is not as it was written")
    photos, names = int(index["photos"]), names or index["names"]
    if not isinstance(names, list) or len(names) != photos:
        raise ValueError(f"{INDEX} does not name {photos} photos")
    skipped = {int(i): str(reason) for i, reason in index["skipped"]}
    if not set(skipped) < set(range(photos)):
        raise ValueError(f"{INDEX} skips photos that do not exist, or all of them")
    total, grid = photos * int(key["views"]), (int(index["grid"][0]), int(index["grid"][1]))
    shapes = _shapes(index, total, grid)
    *taps, _ = shapes
    maps = tuple(_mapped(folder / file, shape, key["dtype"]) for file, shape in shapes.items())
    checksums = None
    if not unchecked:
        _check_size(folder / CHECKSUMS, total * DIGEST)
        checksums = np.fromfile(folder / CHECKSUMS, np.uint8).reshape(total, DIGEST)
    kept = [i for i in range(photos) if i not in skipped]
    return Features(
        folder=folder,
        key=key,
        names=[names[i] for i in kept],
        skipped=[(names[i], reason) for i, reason in sorted(skipped.items())],
        channels=tuple(shapes[file][2] for file in taps),
        grid=grid,
        prefix_tokens=shapes[PREFIX][1],
        _rows=np.asarray(kept, dtype=np.int64),
        _photos=photos,
        _maps=maps,
        _checksums=checksums,
        _checked=None if checksums is None else np.zeros(total, np.bool_),
    )


def _shapes(index: dict[str, Any], total: int, grid: tuple[int, int]) -> dict[str, list[int]]:
    """The shape of every file, taps first and the prefix last."""
    shapes = {str(file): [int(n) for n in shape] for file, shape in index["shapes"].items()}
    *taps, last = shapes
    if not taps or last != PREFIX or any(Path(file).name != file for file in shapes):
        raise ValueError(f"{INDEX} has the files {', '.join(shapes)}")
    for file, shape in shapes.items():
        rows, tokens, _ = shape
        wrong = file != PREFIX and tokens != grid[0] * grid[1]
        if rows != total or min(shape) < 0 or wrong:
            raise ValueError(f"{file} has the shape {shape}")
    return shapes


def _mapped(path: Path, shape: list[int], dtype: str) -> NDArray[Any]:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    _check_size(path, size)
    if not size:  # an empty file cannot be mapped
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r", shape=tuple(shape))


def _check_size(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")


def key_digest(key: dict[str, Any]) -> str:
    """SHA-256 of a key, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def index_digest(index: dict[str, Any]) -> str:
    """SHA-256 of the index in ``features.json``, its own entry aside."""
    return key_digest({name: value for name, value in index.items() if name != "sha256"})


def checksum(maps: Sequence[NDArray[Any]], row: int) -> bytes:
    """SHA-256 of one row of all files, one after the other."""
    digest = hashlib.sha256()
    for values in maps:
        digest.update(np.ascontiguousarray(values[row]).tobytes())
    return digest.digest()
