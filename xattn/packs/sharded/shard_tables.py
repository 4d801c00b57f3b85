"""The entries and images of format 2 as pandas tables: a million rows in some 200 MB.

Texts that repeat are shared objects, texts that do not lie in Arrow's memory, numbers are as narrow as in
the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xattn.packs.contained_files import PackError
from xattn.packs.manifest import ENTRY_TABLE
from xattn.packs.sharded.columns import METRIC
from xattn.packs.sharded.ids import Ids
from xattn.packs.sharded.manifest_shards import ShardManifest
from xattn.packs.sharded.shard_rows import is_value, numbers
from xattn.runtime.names import visible

MAX_ROWS = 1_500_000  # of a table
MAX_TEXTS = 64 << 20  # bytes of texts of a table
TOO_LARGE = "ask for its rows by Pack.parquet(), or split the pack"
_Read = Callable[[Sequence[str]], Iterable[pa.Table]]
_SHARED = ("method", "target_name")


def entry_table(read: _Read, ids: Ids, manifest: ShardManifest) -> pd.DataFrame:
    """See :attr:`xattn.packs.reader.Pack.entries`; ``read`` gives columns shard by shard."""
    _check_rows(len(ids), "maps")
    metrics = {METRIC + metric.key: metric.key for metric in manifest.metrics}
    plain = ("target", "probability", "is_mask", "sanity", "min", "max", *metrics)
    columns = ("image_id", *_SHARED, "protocol", *plain)
    parts: dict[str, list[Any]] = {name: [] for name in (*columns, "is_value")}
    texts = _Texts()
    for table in read(columns):
        parts["image_id"].append(texts.plain(table["image_id"]))
        for name in _SHARED:
            parts[name].append(texts.shared(table[name]))
        for name in plain:
            parts[name].append(numbers(table[name]))
        parts["is_value"].append(is_value(table["protocol"], manifest))
    made = {name: _joined(parts[name]) for name in (*ENTRY_TABLE, *metrics)}
    made = {metrics.get(name, name): values for name, values in made.items()}
    return _table(made, _index(ids, "entry_id"))


def image_table(read: _Read, ids: Ids) -> pd.DataFrame:
    """See :attr:`xattn.packs.reader.Pack.images`; ``read`` gives columns shard by shard."""
    _check_rows(len(ids), "photos")
    kinds = {
        "file_name": "plain", "title": "plain", "label": "objects", "label_name": "shared",
        "predicted": "objects", "predicted_name": "shared", "confidence": "", "right": "objects",
        "disagreement": "", "methods": "",
    }  # fmt: skip
    parts: dict[str, list[Any]] = {name: [] for name in kinds}
    texts = _Texts()
    for table in read(list(kinds)):
        for name, kind in kinds.items():
            parts[name].append(getattr(texts, kind or "numbers")(table[name]))
    made = {name: _joined(values) for name, values in parts.items()}
    return _table(made, _index(ids, "image_id"))


def _check_rows(count: int, what: str) -> None:
    if count > MAX_ROWS:
        raise PackError(
            f"This pack has {count:,} {what}, a table at most {MAX_ROWS:,}; {TOO_LARGE}"
        )


class _Texts:
    """Columns of shards as arrays; equal values of all shards are one object."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._bytes = 0

    def plain(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Texts that seldom repeat, in Arrow's memory."""
        for chunk in column.chunks:
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
            self._count(pc.sum(lengths).as_py() or 0)
        column = column.cast(pa.string())
        printable = pc.utf8_is_printable(column)
        if pc.all(printable).as_py() is False:
            column = pa.chunked_array([[visible(text) for text in column.to_pylist()]], pa.string())
        return column.cast(pa.large_string())

    def shared(self, column: pa.ChunkedArray) -> NDArray[np.object_]:
        """Texts that repeat, None where they are missing."""
        return self._objects(column, visible)

    def objects(self, column: pa.ChunkedArray) -> NDArray[np.object_]:
        """Whole numbers or booleans, None where they are missing."""
        return self._objects(column, lambda value: value)

    def numbers(self, column: pa.ChunkedArray) -> NDArray[Any]:
        """Numbers as they are."""
        return numbers(column)

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > MAX_TEXTS:
            raise PackError(
                f"The names in this pack have more than {MAX_TEXTS:,} bytes; {TOO_LARGE}"
            )

    def _objects(self, column: pa.ChunkedArray, shown: Callable[[Any], Any]) -> NDArray[np.object_]:
        parts = []
        for chunk in column.chunks:
            found = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            self._count(found.dictionary.nbytes)
            values = [
                self._known.setdefault((type(v), v), shown(v)) for v in found.dictionary.to_pylist()
            ]
            shared = np.array([*values, None], object)
            parts.append(
                shared[found.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)]
            )
        return np.concatenate(parts)


def _table(columns: dict[str, Any], index: pd.Index) -> pd.DataFrame:
    # pandas 3 would copy the texts of an array of objects.
    series = {k: pd.Series(v, index, dtype=v.dtype, copy=False) for k, v in columns.items()}
    return pd.DataFrame(series, copy=False)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], pa.ChunkedArray):
        return _text(
            pa.chunked_array([c for part in parts for c in part.chunks], pa.large_string())
        )
    return np.concatenate(parts)


def _index(ids: Ids, name: str) -> pd.Index:
    return pd.Index(_text(ids.texts.cast(pa.large_string())), name=name)


def _text(values: pa.ChunkedArray) -> Any:
    """A pandas array of texts over Arrow's memory."""
    return pd.array(values, dtype=pd.StringDtype("pyarrow", na_value=np.nan))
