"""Whether decoded columns of format 2 hold what a pack can hold; column by column, without Python loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xattn.packs.explanation import MAX_CELLS
from xattn.packs.manifest import MAX_NAME
from xattn.packs.sharded.columns import METRIC
from xattn.packs.sharded.manifest_shards import ShardManifest

IDS = ("entry_id", "image_id", "method")
_RANGES = {
    "target": 0,
    "label": 0,
    "predicted": 0,
    "height": 1,
    "width": 1,
    "methods": 1,
    "thumbnail_bytes": 0,
}
_SHA256 = "^[0-9a-f]{64}$"


def numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column without missing values as an array (N,)."""
    return column.to_numpy()


def check_rows(table: pa.Table, manifest: ShardManifest) -> None:
    """Raise a ``ValueError`` unless all values of the columns that are there can be a pack's."""
    columns = {name: table[name] for name in table.column_names}
    for name in IDS:
        if name in columns:
            _check_ids(columns[name], name)
    for name, least in _RANGES.items():
        if name in columns and (pc.min(columns[name]).as_py() or least) < least:
            raise ValueError(f"a value of its column {name} is below {least}")
    for name in ("height", "width"):
        if name in columns and (pc.max(columns[name]).as_py() or 1) > MAX_CELLS:
            raise ValueError(f"a map has more than {MAX_CELLS:,} cells a side")
    for name, known in (("protocol", manifest.protocols), ("view", manifest.views)):
        if name in columns and not _within(columns[name], len(known)):
            raise ValueError(f"a {name} is not listed in the manifest")
    for name in ("sha256", "thumbnail_sha256"):
        if name in columns and not _all(pc.match_substring_regex(columns[name], _SHA256)):
            raise ValueError("a hash is no SHA-256")
    _check_numbers(columns, manifest)


def _check_ids(column: pa.ChunkedArray, name: str) -> None:
    for chunk in column.chunks:
        texts = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        lengths = pc.utf8_length(texts)
        if (pc.max(lengths).as_py() or 0) > MAX_NAME or (pc.min(lengths).as_py() or 1) < 1:
            raise ValueError(f"a {name} is empty or too long")
        if pc.any(pc.match_substring(texts, "\0")).as_py():
            raise ValueError(f"a {name} holds a zero")


def _check_numbers(columns: dict[str, pa.ChunkedArray], manifest: ShardManifest) -> None:
    for name in ("min", "max"):
        if name in columns and not np.isfinite(numbers(columns[name])).all():
            raise ValueError(f"a {name} is not finite")
    for name, column in columns.items():
        if (name.startswith(METRIC) or name == "disagreement") and np.isinf(numbers(column)).any():
            raise ValueError(f"a value of {name[:60]} is infinite")
    if "confidence" in columns:
        _check_shares(numbers(columns["confidence"]), missing=True)
    if "probability" in columns and "protocol" in columns:
        any_size = is_value(columns["protocol"], manifest)
        values = numbers(columns["probability"])
        _check_shares(values[~any_size])
        if not np.isfinite(values).all():
            raise ValueError("a probability is not finite")


def is_value(protocols: pa.ChunkedArray, manifest: ShardManifest) -> NDArray[np.bool_]:
    """Whether the probability of each row is a number of any size, by the numbers of the protocols."""
    of = np.array([p.get("probability") == "value" for p in manifest.protocols], bool)
    return of[numbers(protocols)] if len(protocols) else np.zeros(0, bool)


def _check_shares(values: NDArray[Any], missing: bool = False) -> None:
    inside = (values >= 0) & (values <= 1)
    if not (inside | np.isnan(values) if missing else inside).all():
        raise ValueError("a probability is not in 0..1")


def _within(column: pa.ChunkedArray, count: int) -> bool:
    found = pc.min_max(column).as_py()
    return found["min"] is None or (found["min"] >= 0 and found["max"] < count)


def _all(found: pa.ChunkedArray) -> bool:
    return pc.all(found, skip_nulls=True).as_py() is not False
