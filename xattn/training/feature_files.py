"""The files of a feature cache, and reading them: memory-mapped tokens of every photo.

A cache is a folder of :mod:`~xattn.training.row_files` with one file a tap, (views x n, N, C), and one for
the prefix tokens, (views x n, P, C). Its index is ``features.json``.
"""

from __future__ import annotations

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
from xattn.training.row_files import (
    Index,
    RowFormat,
    checksum,
    damage_named,
    key_digest,
    listing,
    mapped,
    read_checksums,
    read_index,
    require_whole,
)

PREFIX = "prefix"
FEATURES = RowFormat(
    argument="features",
    holds="features",
    index="features.json",
    version=2,  # format 1 told photos apart by their names and sizes alone
    files=("tap-*", PREFIX),
    writer="cache_features",
    verb="cache",
    smaller="use dtype='float16', ",
)


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
    require_whole(folder, FEATURES)
    return read_features(folder)


def read_features(
    folder: Path, key: dict[str, Any] | None = None, names: list[str] | None = None
) -> Features:
    """The features in ``folder``; ``key`` and the ``names`` of the photos are read there, too, if None."""
    with damage_named(folder, FEATURES):
        return _read(folder, read_index(folder, FEATURES, key, older=True), names)


def _read(folder: Path, index: Index, names: list[str] | None) -> Features:
    found, key = listing(index, FEATURES, names), index.key
    total = found.photos * int(key["views"])
    grid = (int(index.values["grid"][0]), int(index.values["grid"][1]))
    shapes = _shapes(index.values, total, grid)
    *taps, _ = shapes
    return Features(
        folder=folder,
        key=key,
        names=found.names,
        skipped=found.skipped,
        channels=tuple(shapes[file][2] for file in taps),
        grid=grid,
        prefix_tokens=shapes[PREFIX][1],
        _rows=np.asarray(found.kept, dtype=np.int64),
        _photos=found.photos,
        _maps=tuple(mapped(folder / file, shape, key["dtype"]) for file, shape in shapes.items()),
        _checksums=read_checksums(folder, total) if index.checked else None,
        _checked=np.zeros(total, np.bool_) if index.checked else None,
    )


def _shapes(index: dict[str, Any], total: int, grid: tuple[int, int]) -> dict[str, list[int]]:
    """The shape of every file, taps first and the prefix last."""
    shapes = {str(file): [int(n) for n in shape] for file, shape in index["shapes"].items()}
    *taps, last = shapes
    if not taps or last != PREFIX or any(Path(file).name != file for file in shapes):
        raise ValueError(f"{FEATURES.index} has the files {', '.join(shapes)}")
    for file, shape in shapes.items():
        rows, tokens, _ = shape
        wrong = file != PREFIX and tokens != grid[0] * grid[1]
        if rows != total or min(shape) < 0 or wrong:
            raise ValueError(f"{file} has the shape {shape}")
    return shapes
