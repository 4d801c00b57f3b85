"""A million ids in little memory: Arrow's texts and a sorted array of their fingerprints.

A fingerprint is sum_i (byte_i + 1) r_i mod 2^64 with random r_i, other ones in every process; what two ids
of one fingerprint are is decided by the texts.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xattn.packs.sharded.columns import MAX_TEXT

MAX_BYTES = 128 << 20  # of all ids of a kind
_FACTORS = np.frombuffer(secrets.token_bytes(8 * MAX_TEXT), np.uint64)


class Ids(Sequence[str]):
    """The ids of all rows, shard by shard; ``row`` finds one.

    Raises:
        ValueError: an id comes twice, or they are too many.
    """

    def __init__(self, shards: Sequence[pa.ChunkedArray]) -> None:
        chunks = [chunk for shard in shards for chunk in shard.chunks if len(chunk)]
        if sum(chunk.nbytes for chunk in chunks) > MAX_BYTES:
            raise ValueError(f"its ids have more than {MAX_BYTES:,} bytes")
        self.texts = pa.chunked_array(chunks, pa.string())
        marks = np.concatenate([_fingerprints(chunk) for chunk in chunks])
        self._rows = np.argsort(marks, kind="stable").astype(np.int32)
        self._marks = marks[self._rows]
        for place in np.flatnonzero(self._marks[1:] == self._marks[:-1]):
            first, second = (self[int(i)] for i in self._rows[place : place + 2])
            if first == second:
                raise ValueError(f"the id {first[:60]} comes twice")

    def row(self, id: Any) -> int:
        """The row of an id; KeyError where there is none."""
        if not isinstance(id, str):
            raise KeyError(id)
        try:
            mark = _fingerprints(pa.array([id], pa.string()))[0]
        except (ValueError, IndexError):  # a lone surrogate, or longer than any id
            raise KeyError(id) from None
        begin, end = (np.searchsorted(self._marks, mark, side) for side in ("left", "right"))
        for place in range(int(begin), int(end)):
            if self[row := int(self._rows[place])] == id:
                return row
        raise KeyError(id)

    def __contains__(self, id: object) -> bool:
        try:
            self.row(id)
        except KeyError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.texts[range(len(self))[index]].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.texts.chunks:
            yield from chunk.to_pylist()


def _fingerprints(texts: pa.StringArray) -> NDArray[np.uint64]:
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    begin, lengths = ends[:-1] - ends[0], np.diff(ends)
    if not lengths.all():
        raise ValueError("an id is empty")
    values = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    place = np.arange(len(values)) - np.repeat(begin, lengths)
    return np.add.reduceat((values.astype(np.uint64) + 1) * _FACTORS[place], begin)
