"""Files of rows, one row a photo and crop, with a checksum for each: how they are laid out and read.

A folder has a file for each kind of number, all rows in row-major order; ``rows`` with the state of every
row; ``sha256`` with its checksum over all files; ``key.json`` with what the numbers depend on; and, once
all rows are there, an index. Row c * n + i is crop c of photo i of n.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from xattn.runtime import strict_json

KEY, ROWS, CHECKSUMS = "key.json", "rows", "sha256"
DIGEST = 32  # bytes of a SHA-256
MISSING, STORED, UNREADABLE = 0, 1, 2  # states of a row
BLOCK = 256  # rows that are checked at a time


@dataclass(frozen=True)
class RowFormat:
    """One use of such files: its names, and the words of its messages."""

    argument: str
    """What messages begin with: the argument that names the folder."""
    holds: str
    """What such a folder holds."""
    index: str
    """The file of the index."""
    version: int
    """Of the format."""
    files: tuple[str, ...]
    """Patterns of the names of the files of numbers."""
    writer: str
    """The function that writes it."""
    verb: str
    """What that function does, for "delete it and VERB again"."""
    smaller: str = ""
    """An option that takes less space, as a part of a sentence."""
    repairs: bool = False
    """Whether what is damaged is written again. Checksums include the row's state, then."""


class RowFile(NamedTuple):
    """The numbers of one row in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return math.prod(self.shape) * self.dtype.itemsize


class Index(NamedTuple):
    """The ``key`` of a whole folder, what its index says, and whether its rows have checksums."""

    key: dict[str, Any]
    values: dict[str, Any]
    checked: bool


def read_index(
    folder: Path, kind: RowFormat, key: dict[str, Any] | None = None, older: bool = False
) -> Index:
    """The index of a folder; the ``key`` is read there, too, if None.

    Args:
        older: accept an index without a digest where the rows have none, either.

    Raises:
        ValueError, OSError, LookupError, TypeError: it is damaged, see :func:`damage_named`.
    """
    key = key or strict_json.parse((folder / KEY).read_bytes())
    index = strict_json.parse((folder / kind.index).read_bytes())
    if index["key"] != key_digest(key):
        raise ValueError(f"it belongs to the key {index['key']}, {KEY} has {key_digest(key)}")
    unchecked = older and "sha256" not in index and not (folder / CHECKSUMS).exists()
    if not unchecked and index["sha256"] != index_digest(index):
        raise ValueError(f"{kind.index} is not as it was written")
    return Index(key, index, not unchecked)


def is_indexed(folder: Path, kind: RowFormat, key: dict[str, Any]) -> bool:
    """Whether ``folder`` has an undamaged index that belongs to ``key``."""
    try:
        return read_index(folder, kind, key).checked
    except (OSError, ValueError, LookupError, TypeError):
        return False


class Listing(NamedTuple):
    """The photos of an index: ``photos`` in all, the numbers of those that were ``kept``, their ``names``,
    and (name, reason) of those that were ``skipped``."""

    photos: int
    kept: list[int]
    names: list[str]
    skipped: list[tuple[str, str]]


def listing(index: Index, kind: RowFormat, names: list[str] | None = None) -> Listing:
    """The photos of ``index``, by the ``names`` of today if they are given."""
    count, names = int(index.values["photos"]), names or index.values["names"]
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(f"{kind.index} does not name {count} photos")
    skipped = {int(i): str(reason) for i, reason in index.values["skipped"]}
    if not set(skipped) < set(range(count)):
        raise ValueError(f"{kind.index} skips photos that do not exist, or all of them")
    kept = [i for i in range(count) if i not in skipped]
    reasons = [(names[i], reason) for i, reason in sorted(skipped.items())]
    return Listing(count, kept, [names[i] for i in kept], reasons)


def require_whole(folder: Path, kind: RowFormat) -> None:
    """Raise an error unless ``folder`` has an index.

    Raises:
        ValueError: it is not finished. FileNotFoundError: there is nothing of this kind.
    """
    if not (folder / KEY).is_file():
        raise FileNotFoundError(
            f"{kind.argument}: no {kind.holds} in {folder}; name a folder of {kind.writer}"
        )
    if not (folder / kind.index).is_file():
        raise ValueError(
            f"{kind.argument}: {folder} is not finished; {kind.verb} the same photos again to go on"
        )


@contextlib.contextmanager
def damage_named(folder: Path, kind: RowFormat) -> Iterator[None]:
    """Turn what reading damaged files raises into a ``ValueError`` that names the folder and the remedy."""
    try:
        yield
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError
    ) as error:  # fmt: skip
        raise ValueError(
            f"{kind.argument}: {folder} is damaged ({type(error).__name__}: {error}); delete it and "
            f"{kind.verb} again"
        ) from None


# ---------------------------------------------------------------------- numbers


def mapped(path: Path, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """The numbers of a file, mapped into memory; a ``ValueError`` if its length is another."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    check_size(path, size)
    if not size:  # an empty file cannot be mapped
        return np.zeros(tuple(shape), dtype)
    return np.memmap(path, dtype, "r", shape=tuple(shape))


def read_checksums(folder: Path, total: int) -> NDArray[np.uint8]:
    """The checksums of all rows, (total, 32)."""
    check_size(folder / CHECKSUMS, total * DIGEST)
    return np.fromfile(folder / CHECKSUMS, np.uint8).reshape(total, DIGEST)


def check_size(path: Path, size: int) -> None:
    """Raise a ``ValueError`` unless the file has ``size`` bytes."""
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")


def rows_as_written(
    numbers: Sequence[NDArray[Any]],
    states: NDArray[np.uint8],
    checksums: NDArray[np.uint8],
    kind: RowFormat,
) -> NDArray[np.bool_]:
    """Whether each row has its checksum, (total,); rows that are missing have none."""
    good = np.zeros(len(states), np.bool_)
    for start in range(0, len(states), BLOCK):
        read = [np.asarray(values[start : start + BLOCK]) for values in numbers]
        own = states[start : start + BLOCK]
        for row in np.flatnonzero(own != MISSING).tolist():
            found = checksum(read, row, own[row] if kind.repairs else None)
            good[start + row] = found == checksums[start + row].tobytes()
    return good


# ---------------------------------------------------------------------- hashes


def key_digest(key: dict[str, Any]) -> str:
    """SHA-256 of a key, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def index_digest(index: dict[str, Any]) -> str:
    """SHA-256 of an index, its own entry aside."""
    return key_digest({name: value for name, value in index.items() if name != "sha256"})


def checksum(numbers: Sequence[NDArray[Any]], row: int, state: int | None = None) -> bytes:
    """SHA-256 of one row of all files, one after the other, and of its state if that is given."""
    digest = hashlib.sha256()
    for values in numbers:
        digest.update(np.ascontiguousarray(values[row]).tobytes())
    if state is not None:
        digest.update(bytes([state]))
    return digest.digest()
