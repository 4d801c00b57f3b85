"""The files of a pack of format 2 and the columns of its Parquet files.

    manifest.json                protocols, views, metrics, counts, and each shard with its hashes
    entries-00000.parquet        a row a map, photo by photo
    images-00000.parquet         a row a photo
    maps-00000.safetensors       every map, float32 (h, w), by entry_id, in the order of the rows
    thumbnails-00000.safetensors JPEG files as uint8 (n,), by image_id, in the order of the rows
    features-00000.safetensors   what the classifier reads of each photo, float16 (M, d), where it was kept

A shard holds the files of a fixed number of photos. Files are written with the encodings that
:mod:`xattn.packs.sharded.checked_parquet` reads: texts by dictionary where they repeat, all else plain.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

ROW_GROUP = 2048  # rows that are decoded to read one
MAX_TEXT = 4096  # bytes of a text in UTF-8


def shard_file(kind: str, number: int) -> str:
    """The name of a file of shard ``number``.

    >>> shard_file("maps", 12)
    'maps-00012.safetensors'
    """
    ending = "parquet" if kind in ("entries", "images") else "safetensors"
    return f"{kind}-{number:05}.{ending}"


def _column(name: str, kind: pa.DataType, missing: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=missing)


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(_column("element", kind))


CURVE = _list_of(pa.float64())
TOP = _list_of(
    pa.struct(
        [
            _column("class", pa.int32()),
            _column("name", pa.string()),
            _column("probability", pa.float64()),
        ]
    )
)
_ENTRY = [
    _column("entry_id", pa.string()),
    _column("image_id", pa.string()),
    _column("file_name", pa.string()),
    _column("title", pa.string()),
    _column("method", pa.string()),
    _column("target", pa.int32()),
    _column("target_name", pa.string()),
    _column("probability", pa.float64()),
    _column("is_value", pa.bool_()),
    _column("is_mask", pa.bool_()),
    _column("sanity", pa.bool_()),
    _column("protocol", pa.int32()),
    _column("view", pa.int32()),
    _column("height", pa.int32()),
    _column("width", pa.int32()),
    _column("min", pa.float32()),
    _column("max", pa.float32()),
    _column("sha256", pa.string()),
]
IMAGES = pa.schema(
    [
        _column("image_id", pa.string()),
        _column("file_name", pa.string()),
        _column("title", pa.string()),
        _column("label", pa.int32(), missing=True),
        _column("label_name", pa.string(), missing=True),
        _column("predicted", pa.int32(), missing=True),
        _column("predicted_name", pa.string(), missing=True),
        _column("confidence", pa.float64()),
        _column("right", pa.bool_(), missing=True),
        _column("disagreement", pa.float64()),
        _column("methods", pa.int32()),
        _column("top", TOP),
        _column("thumbnail_bytes", pa.int64()),
        _column("thumbnail_sha256", pa.string(), missing=True),
    ]
)
METRIC, CURVE_OF = "metric:", "curve:"
PLAIN_TEXTS = {"entry_id", "sha256", "thumbnail_sha256"}  # no two rows are equal


def entry_schema(metrics: Sequence[str], curves: Sequence[str]) -> pa.Schema:
    """The columns of ``entries-*.parquet`` of a pack with these metrics and curves."""
    measured = [_column(METRIC + key, pa.float64()) for key in metrics]
    return pa.schema([*_ENTRY, *measured, *(_column(CURVE_OF + name, CURVE) for name in curves)])


def by_dictionary(schema: pa.Schema, unique: str = "entry_id") -> list[str]:
    """The columns of text that are written by dictionary; ``unique`` is the ids' own column."""
    plain = PLAIN_TEXTS | {unique}
    return [f.name for f in schema if pa.types.is_string(f.type) and f.name not in plain]
