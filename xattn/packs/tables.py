"""The entries and photos of a pack as pandas tables; the only module in packs that needs pandas.

Repeated texts are shared objects, other texts are in Arrow's memory, and numbers have the same width as in
the files: a million rows take some 200 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from xattn.packs import columns
from xattn.packs.contained_files import PackError
from xattn.packs.contents import Contents, Ids
from xattn.packs.manifest import TABLE_COLUMNS
from xattn.runtime.names import visible

MAX_ROWS = 1_500_000  # rows in a table
MAX_TEXTS = 64 << 20  # bytes of texts in a table
_PLAIN = ("image_id", "file_name", "title")


def entry_table(contents: Contents) -> pd.DataFrame:
    """Return the table of :attr:`xattn.packs.reader.Pack.entries`."""
    metrics = [columns.METRIC + m.key for m in contents.manifest.metrics]
    table = _table(contents, "entries", contents.entry_ids, [*TABLE_COLUMNS, *metrics])
    return table.rename(columns={name: name.removeprefix(columns.METRIC) for name in metrics})


def image_table(contents: Contents) -> pd.DataFrame:
    """Return the table of :attr:`xattn.packs.reader.Pack.images`."""
    return _table(contents, "images", contents.image_ids, columns.IMAGE_TABLE)


def _table(contents: Contents, kind: str, ids: Ids, names: Sequence[str]) -> pd.DataFrame:
    what = "maps" if kind == "entries" else "photos"
    if len(ids) > MAX_ROWS:
        raise PackError(
            f"This pack has {len(ids):,} {what}, but a table holds at most {MAX_ROWS:,}; split "
            "the pack"
        )
    parts: dict[str, list[Any]] = {name: [] for name in names}
    left = MAX_TEXTS
    try:
        for rows in contents.rows(kind, names):
            for name in names:
                column = rows[name]
                if name in _PLAIN:
                    made = columns.dense(column, left)
                    left -= made.nbytes
                elif pa.types.is_dictionary(column.type) or name in columns.MISSING:
                    made = _objects(column)
                else:
                    made = column.to_numpy()
                parts[name].append(made)
    except ValueError as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"The names in this pack are too long ({error}); split the pack") from None
    index = pd.Index(_text([ids.texts]), name="entry_id" if kind == "entries" else "image_id")
    texts = {
        name: _text(parts.pop(name), shown=name != "image_id") for name in _PLAIN if name in parts
    }
    made = {name: texts[name] if name in texts else np.concatenate(parts[name]) for name in names}
    # pandas 3 would copy the texts of an object array.
    series = {k: pd.Series(v, index, dtype=v.dtype, copy=False) for k, v in made.items()}
    return pd.DataFrame(series, copy=False)


def _objects(column: pa.ChunkedArray) -> np.ndarray:
    """Values as objects, None if missing; equal values share one object, and texts are made safe to
    display."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    parts = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        shown = [visible(v) if isinstance(v, str) else v for v in values]
        shared = np.array([*shown, None], object)
        parts.append(shared[chunk.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _text(parts: Sequence[pa.ChunkedArray], shown: bool = False) -> Any:
    """A pandas array of texts over Arrow's memory; with ``shown``, they are made safe to display."""
    column = pa.chunked_array([c for part in parts for c in part.chunks], pa.string())
    if shown and pc.all(pc.utf8_is_printable(column)).as_py() is False:
        column = pa.chunked_array([[visible(text) for text in column.to_pylist()]], pa.string())
    return pd.array(
        column.cast(pa.large_string()), dtype=pd.StringDtype("pyarrow", na_value=np.nan)
    )
