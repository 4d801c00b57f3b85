"""Rows of format 2 from explanations, and Parquet files from rows: equal rows give equal bytes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xattn.packs.explanation import Explanation
from xattn.packs.manifest import MAX_NAME, title_of
from xattn.packs.sharded.checked_parquet import MAX_FILE, CheckedParquet
from xattn.packs.sharded.columns import CURVE_OF, MAX_TEXT, METRIC, ROW_GROUP, by_dictionary
from xattn.packs.sharded.manifest_shards import ShardFile
from xattn.runtime.files import printable

_GROUP_VALUES = 1 << 21  # values of a curve in a row group


def entry_row(e: Explanation, sha256: str, protocol: int, view: int) -> dict[str, Any]:
    """The columns of a map, but for those of its pack: numbers of protocol and view are the shard's own.

    Raises:
        ValueError: a text is too long, or a curve is not finite.
    """
    if not all(math.isfinite(v) for values in e.curves.values() for v in values):
        raise ValueError(f"curves: those of {e.id} are not finite; give numbers")
    height, width = e.map.shape
    file_name = text("file_name", Path(e.file_name).name)
    return {
        "entry_id": id_text(e.id),
        "image_id": id_text(e.image_id),
        "file_name": file_name,
        "title": title_of(printable(e.image_id), file_name, e.protocol),
        "method": id_text(e.method),
        "target": e.target,
        "target_name": text("target_name", e.target_name),
        "probability": e.probability,
        "is_value": e.is_value,
        "is_mask": e.is_mask,
        "sanity": e.sanity,
        "protocol": protocol,
        "view": view,
        "height": height,
        "width": width,
        "min": float(e.map.min()),
        "max": float(e.map.max()),
        "sha256": sha256,
        **{METRIC + key: float(value) for key, value in e.metrics.items() if math.isfinite(value)},
        **{CURVE_OF + name: [float(v) for v in values] for name, values in e.curves.items()},
    }


def image_row(
    group: Sequence[Explanation], disagreement: float, jpeg: bytes | None
) -> dict[str, Any]:
    """The columns of a photo with its explanations."""
    first, facts = group[0], group[0].facts
    best = facts.top[0] if facts.top else _most_probable(group)
    predicted, predicted_name, confidence = best or (None, None, math.nan)
    file_name = text("file_name", Path(first.file_name).name)
    known = facts.label is not None and predicted is not None
    return {
        "image_id": id_text(first.image_id),
        "file_name": file_name,
        "title": title_of(printable(first.image_id), file_name, first.protocol),
        "label": facts.label,
        "label_name": None if facts.label_name is None else text("label", facts.label_name),
        "predicted": predicted,
        "predicted_name": None if predicted_name is None else text("top", predicted_name),
        "confidence": confidence,
        "right": facts.label == predicted if known else None,
        "disagreement": disagreement,
        "methods": len({e.method for e in group}),
        "top": [
            {"class": c, "name": text("top", name), "probability": p} for c, name, p in facts.top
        ],
        "thumbnail_bytes": 0 if jpeg is None else len(jpeg),
        "thumbnail_sha256": None if jpeg is None else hashlib.sha256(jpeg).hexdigest(),
    }


def id_text(value: str) -> str:
    """An id as the file has it.

    Raises:
        ValueError: it is longer than ids may be.
    """
    value = printable(value)
    if len(value) > MAX_NAME:
        raise ValueError(f"image_id: {value[:60]!r} has {len(value):,} characters; give {MAX_NAME}")
    return value


def text(argument: str, value: str) -> str:
    """A text as the file has it.

    Raises:
        ValueError: it is longer than texts may be.
    """
    value = printable(value)
    if len(value.encode()) > MAX_TEXT:
        raise ValueError(
            f"{argument}: {value[:60]!r} has over {MAX_TEXT:,} bytes; give a shorter one"
        )
    return value


def _most_probable(group: Sequence[Explanation]) -> tuple[int, str, float] | None:
    top = [e for e in group if e.protocol.get("classes") == "top"]
    if not top:
        return None
    best = max(top, key=lambda e: e.probability)
    return best.target, best.target_name, float(best.probability)


def completed(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with all columns of ``schema``: NaN for metrics that they lack, [] for curves."""
    columns = []
    for field in schema:
        if field.name in table.column_names:
            column = table[field.name].combine_chunks()
        elif pa.types.is_list(field.type):
            empty = pa.array([], field.type.value_type)
            column = pa.ListArray.from_arrays(
                pa.array([0] * (len(table) + 1), pa.int32()), empty, field.type
            )
        else:
            column = pa.array([math.nan] * len(table), pa.float64())
        columns.append(column)
    return pa.table(columns, schema=schema)


def write_parquet(
    path: Path, schema: pa.Schema, tables: Iterable[pa.Table], unique: str, longest: int = 0
) -> ShardFile:
    """Write rows that come in tables of any size; ``longest`` is the greatest length of a curve.

    Raises:
        ValueError: they are too many, or too large, to be read back.
    """
    rows = max(1, min(ROW_GROUP, _GROUP_VALUES // max(1, longest)))
    count = 0
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=by_dictionary(schema, unique),
        store_schema=False,
        data_page_version="1.0",
        write_batch_size=1024,
    ) as writer:
        for group in _groups(tables, rows):
            writer.write_table(group, row_group_size=rows)
            count += len(group)
    data = path.read_bytes()
    try:
        if len(data) > MAX_FILE:
            raise ValueError(f"it has {len(data):,} bytes, over the limit of {MAX_FILE:,}")
        CheckedParquet(data, schema, count, unique).check()
    except ValueError as error:
        raise ValueError(
            f"explanations: {path.name} could not be read back ({error}); put fewer photos in a shard"
        ) from None
    return ShardFile(path.name, count, len(data), hashlib.sha256(data).hexdigest())


def _groups(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` each, the last with what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= rows:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, rows)
            waiting = [whole.slice(rows)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)
