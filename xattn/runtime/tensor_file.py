"""Read one tensor at a time from a safetensors file, by its position in the file.

    8 bytes n | n bytes JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes

The format is https://github.com/huggingface/safetensors. Its own ``safe_open`` maps the file into
memory, so a file that is truncated while a server reads it kills the process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xattn.runtime import strict_json

MAX_HEADER = 100_000_000  # bytes, as in safetensors
MAX_DIMENSIONS, MAX_SIDE = 8, 1 << 40  # of a tensor, far more than any file can hold
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


_Place = tuple[str, tuple[int, ...], int, int]  # dtype, shape, begin, end


class TensorFile:
    """A safetensors file of float tensors.

    Args:
        opener: opens the file for reading bytes; called for every tensor, so that nothing stays open.

    Raises:
        ValueError: not a safetensors file, or truncated.
        OSError: it cannot be read.
    """

    def __init__(self, opener: Callable[[], IO[bytes]]) -> None:
        self._opener = opener
        with opener() as stream:
            self._size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if self._size < 8 or length > min(self._size - 8, MAX_HEADER):
                raise ValueError("it is truncated, or not a safetensors file")
            header = strict_json.parse(stream.read(length))
        self._start = 8 + length
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
        header.pop("__metadata__", None)
        self._places = {name: _place(entry) for name, entry in header.items()}
        _check_places(self._places, self._size - self._start)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if there is none of this name."""
        place = self._places.get(name)
        return None if place is None else place[1]

    def read(self, name: str, sha256: str | None = None) -> NDArray[np.float32]:
        """A tensor as float32; ``sha256`` is the expected hash of its bytes.

        Raises:
            KeyError: no such tensor.
            ValueError: the file has changed, or the bytes have another hash.
            OSError: it cannot be read.
        """
        dtype, shape, begin, end = self._places[name]
        with self._opener() as stream:
            if stream.seek(0, 2) != self._size:
                raise ValueError("it has changed since it was opened")
            stream.seek(self._start + begin)
            data = stream.read(end - begin)
        if len(data) != end - begin:
            raise ValueError("it is truncated")
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"the bytes of {name} are not those that were written")
        values = np.frombuffer(data, dtype).reshape(shape)
        with np.errstate(over="ignore"):
            return values.astype(np.float32)


def _place(entry: Any) -> _Place:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = int(_TYPES[dtype][-1])
        numbers = (*shape, begin, end)
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int for n in numbers):
            raise ValueError
        if not all(0 <= n <= MAX_SIDE for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"its header says {_shown(entry)}, which is not a tensor of floats"
        ) from None
    if end - begin != size * math.prod(shape):
        raise ValueError(f"its header says {_shown(entry)}, which does not add up")
    return _TYPES[dtype], shape, begin, end


def _shown(entry: Any) -> str:
    try:
        return str(entry)[:100]
    except ValueError:  # a number of more digits than Python writes
        return "a number of too many digits"


def _check_places(places: Mapping[str, _Place], size: int) -> None:
    """Raise unless the tensors fill the file without overlap, so that no more is read than it holds."""
    at = 0
    for _, _, begin, end in sorted(places.values(), key=lambda place: place[2:]):
        if begin != at:
            raise ValueError(f"its header says that a tensor begins at byte {begin}, not at {at}")
        at = end
    if at != size:
        raise ValueError(f"it has {size} bytes of tensors, its header says {at}")
