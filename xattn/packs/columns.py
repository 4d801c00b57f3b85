"""The columns of a pack's Parquet files: code that builds them from explanations, writes them, and
checks them on reading.

Equal rows give files with equal bytes. Since a file may be hostile, the memory needed to read it is
bounded by its size and number of rows:

* The complete file, of at most ``MAX_FILE`` bytes, is held in memory, and its columns do not overlap.
* No column is compressed, so a page is never larger than its bytes in the file.
* No column is repeated or nested, so there are never more values than rows.
* Every text is read as a dictionary, so that a long text in many rows is stored only once; encodings that
  build long texts from short ones (DELTA_BYTE_ARRAY) cannot be read that way.

If a page header claims anything else, pyarrow raises an error before the claim has an effect.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from xattn.packs.answers import AnswerFacts
from xattn.packs.explanation import MAX_CELLS, Explanation
from xattn.packs.manifest import MAX_NAME, ShardFile
from xattn.runtime.files import printable

MAX_FILE = 96 << 20  # bytes in a Parquet file
MAX_ROWS = 1 << 18  # rows in a file
MAX_FOOTER = 8 << 20  # bytes
MAX_GROUPS = 1024  # row groups in a file
_FOOTER_TEXT = _FOOTER_ITEMS = 1 << 16
ROW_GROUP = 2048  # rows that are decoded together
MAX_TEXT = 4096  # bytes of a text in UTF-8
# Size limits for columns that hold JSON, in bytes.
LONG_TEXTS = {
    **dict.fromkeys(("protocol", "top"), 1 << 20),
    **{"view": MAX_TEXT, "curves": 16 << 20, "answer": 4 << 20},
}
METRIC = "metric:"
_TEXTS = pa.string()
_REPEAT = (_TEXTS, pa.int32(), pa.int64())
_ENTRY: dict[str, pa.DataType] = {
    "entry_id": _TEXTS,
    "image_id": _TEXTS,
    "file_name": _TEXTS,
    "title": _TEXTS,
    "method": _TEXTS,
    "target": pa.int32(),
    "target_name": _TEXTS,
    "probability": pa.float64(),
    "is_value": pa.bool_(),
    "is_mask": pa.bool_(),
    "sanity": pa.bool_(),
    "protocol": _TEXTS,  # as JSON, as are the view, the curves and the top classes
    "view": _TEXTS,
    "min": pa.float32(),
    "max": pa.float32(),
    "curves": _TEXTS,  # {name: values}
    "height": pa.int32(),
    "width": pa.int32(),
    "place": pa.int64(),  # position of the map's first byte in its file
    "sha256": pa.binary(32),
}
_IMAGE: dict[str, pa.DataType] = {
    "image_id": _TEXTS,
    "file_name": _TEXTS,
    "title": _TEXTS,
    "label": pa.int32(),
    "label_name": _TEXTS,
    "predicted": pa.int32(),
    "predicted_name": _TEXTS,
    "confidence": pa.float64(),
    "right": pa.bool_(),
    "disagreement": pa.float64(),
    "methods": pa.int32(),
    "top": _TEXTS,  # [[class, name, probability], ...]
    "answer": _TEXTS,  # from xattn.packs.answers, as JSON
    "thumbnail_place": pa.int64(),
    "thumbnail_bytes": pa.int64(),
    "thumbnail_sha256": pa.binary(32),
}
# Columns that may lack a value.
MISSING = {
    *("label", "label_name", "predicted", "predicted_name", "right", "answer", "thumbnail_sha256")
}
# All other texts and whole numbers repeat, and are dictionary-encoded.
_UNIQUE = {"entry_id", "curves", "top", "answer", "place", "thumbnail_place", "thumbnail_bytes"}
IMAGES = pa.schema([pa.field(k, kind, nullable=k in MISSING) for k, kind in _IMAGE.items()])
# Columns of Pack.images.
IMAGE_TABLE = ("file_name", "title", "label", "label_name", "predicted", "predicted_name", "confidence",
               "right", "disagreement", "methods")  # fmt: skip
_FRAME = re.compile(r"(?:.*#)?frame-([0-9]{6,15})", re.DOTALL)


def entry_schema(metrics: Sequence[str]) -> pa.Schema:
    """Return the columns of ``entries-*.parquet`` in a pack with these metrics."""
    kinds = _ENTRY | {METRIC + key: pa.float64() for key in metrics}
    return pa.schema([pa.field(k, kind, nullable=False) for k, kind in kinds.items()])


# ---------------------------------------------------------------------- rows of explanations


def entry_row(e: Explanation, sha256: bytes, metrics: Collection[str]) -> dict[str, Any]:
    """Return the columns of a map, except its position in the file.

    Raises:
        ValueError: a text is too long, a curve is not finite, a view is too large, or a metric is not
            among the pack's ``metrics``.
    """
    if unknown := set(e.metrics) - set(metrics):
        raise ValueError(
            f"metrics: {min(unknown)} of {e.id} is not described; set the writer's metrics first"
        )
    if not all(math.isfinite(v) for values in e.curves.values() for v in values):
        raise ValueError(f"curves: the curves of {e.id} are not finite; give numbers")
    curves = {name: [float(v) for v in values] for name, values in e.curves.items()}
    file_name = text("file_name", Path(e.file_name).name)
    height, width = e.map.shape
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
        "protocol": text(
            "protocol", json.dumps(e.protocol, allow_nan=False), LONG_TEXTS["protocol"]
        ),
        "view": json.dumps(e.view.check_size().to_json()),
        "min": float(e.map.min()),
        "max": float(e.map.max()),
        "curves": text("curves", json.dumps(curves), LONG_TEXTS["curves"]),
        "height": height,
        "width": width,
        "sha256": sha256,
        **{METRIC + key: _finite(e.metrics.get(key, math.nan)) for key in metrics},
    }


def image_row(
    group: Sequence[Explanation], disagreement: float, jpeg: bytes | None
) -> dict[str, Any]:
    """Return the columns of a photo with its explanations, except the position of its thumbnail."""
    first, facts = group[0], group[0].facts
    best = facts.top[0] if facts.top else _most_probable(group)
    predicted, predicted_name, confidence = best or (None, None, math.nan)
    file_name = text("file_name", Path(first.file_name).name)
    known = facts.label is not None and predicted is not None
    top = [(c, text("top", name), p) for c, name, p in facts.top]
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
        "top": text("top", json.dumps(top, ensure_ascii=False), LONG_TEXTS["top"]),
        "answer": None if facts.answer is None else _answer(facts.answer),
        "thumbnail_bytes": 0 if jpeg is None else len(jpeg),
        "thumbnail_sha256": None if jpeg is None else hashlib.sha256(jpeg).digest(),
    }


def _answer(answer: AnswerFacts) -> str:
    """The answer as JSON; the scores of text tokens are left out if there are too many."""
    most = LONG_TEXTS["answer"]
    try:
        return text("answer", answer.to_json(), most)
    except ValueError:
        warnings.warn(
            f"answer: {answer.text[:60]!r} and its prompt are too long for the pack to keep the "
            "scores that each word gives to their tokens",
            stacklevel=2,
        )
    words = tuple(replace(word, sources={}) for word in answer.words)
    return text("answer", replace(answer, words=words).to_json(), most)


def id_text(value: str) -> str:
    """Return an id as it is stored in the file; raise a ValueError if it is too long."""
    value = printable(value)
    if len(value) > MAX_NAME:
        raise ValueError(
            f"image_id: {value[:60]!r} has {len(value):,} characters; give at most {MAX_NAME}"
        )
    return value


def text(argument: str, value: str, most: int = MAX_TEXT) -> str:
    """Return a text as it is stored in the file; raise a ValueError if it is too long."""
    value = printable(value)
    if len(value.encode()) > most:
        raise ValueError(
            f"{argument}: {value[:60]!r} has more than {most:,} bytes; give a shorter text"
        )
    return value


def title_of(image_id: str, file_name: str, protocol: Mapping[str, Any]) -> str:
    """Return the title of an image: its file name and, for a frame, also its number and its time as a
    player shows them."""
    name = file_name or image_id
    video: Any = protocol.get("video")
    frame = _FRAME.fullmatch(image_id)
    if frame is None or type(video) is not dict:
        return name
    number, fps = int(frame[1]), video.get("fps") or 0
    title = f"{name}, frame {number:,}"
    if type(fps) not in (int, float) or not 0.001 <= fps <= 1000:
        return title
    minutes, hundredths = divmod(round(100 * number / fps), 6000)
    hours, left = divmod(minutes, 60)
    clock = f"{hours:,}:{left:02}" if hours else f"{minutes}"
    return f"{title}, {clock}:{hundredths / 100:05.2f}"


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _most_probable(group: Sequence[Explanation]) -> tuple[int, str, float] | None:
    top = [e for e in group if e.protocol.get("classes") == "top"]
    best = max(top, key=lambda e: e.probability, default=None)
    return None if best is None else (best.target, best.target_name, float(best.probability))


# ---------------------------------------------------------------------- files


def write_rows(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> ShardFile:
    """Write the columns of ``schema``, each a sequence of values.

    Raises:
        ValueError: there are too many values, or values are too large, for the file to be read again.
    """
    table = pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)
    written = pa.BufferOutputStream()  # pyarrow accepts only UTF-8 paths
    pq.write_table(
        table,
        written,
        row_group_size=ROW_GROUP,
        compression="none",
        use_dictionary=[f.name for f in schema if f.type in _REPEAT and f.name not in _UNIQUE],
        write_statistics=[f.name for f in schema if f.name not in LONG_TEXTS],
        store_schema=False,
        data_page_version="1.0",
    )
    data = written.getvalue().to_pybytes()
    path.write_bytes(data)
    try:
        if len(data) > MAX_FILE:
            raise ValueError(f"it has {len(data):,} bytes, over the limit of {MAX_FILE:,}")
        BoundedParquet(data, schema, len(table))
    except ValueError as error:
        raise ValueError(
            f"explanations: {path.name} could not be read back ({error}); put fewer photos in a shard"
        ) from None
    return ShardFile(path.name, len(table), len(data), hashlib.sha256(data).hexdigest())


# ---------------------------------------------------------------------- reading


class BoundedParquet:
    """A Parquet file whose schema, counts and positions have been checked; thread-safe.

    Args:
        data: the file; at most ``MAX_FILE`` bytes.
        schema: the exact columns that it must have; all of them must be flat.
        rows: the number of rows that it must have.

    Attributes:
        group_rows: the number of rows of each row group.

    Raises:
        ValueError: the file is damaged, or does not have the expected columns or rows.
    """

    def __init__(self, data: bytes, schema: pa.Schema, rows: int) -> None:
        if rows > MAX_ROWS:
            raise ValueError(f"it has {rows:,} rows, over the limit of {MAX_ROWS:,}")
        footer = int.from_bytes(data[-8:-4], "little")
        if footer > min(MAX_FOOTER, len(data) - 12):
            raise ValueError(f"its footer has {footer:,} bytes")
        self._lock = threading.Lock()
        self._file = _arrow(
            lambda: pq.ParquetFile(
                pa.BufferReader(data),
                read_dictionary=[f.name for f in schema if pa.types.is_string(f.type)],
                pre_buffer=False,
                thrift_string_size_limit=_FOOTER_TEXT,
                thrift_container_size_limit=_FOOTER_ITEMS,
            )
        )
        metadata = self._file.metadata
        if metadata.metadata or not _arrow(self._file.schema.to_arrow_schema).equals(schema):
            raise ValueError("its columns are not those of this kind of file")
        if metadata.num_rows != rows:
            raise ValueError(f"it has {metadata.num_rows:,} rows, but the manifest says {rows:,}")
        if (groups := metadata.num_row_groups) > MAX_GROUPS:
            raise ValueError(f"it has {groups:,} row groups, over the limit of {MAX_GROUPS:,}")
        self.group_rows = [metadata.row_group(g).num_rows for g in range(groups)]
        if sum(self.group_rows) != rows or min(self.group_rows, default=1) < 1:
            raise ValueError("its row groups do not add up")
        end = len(data) - 8
        codecs = codecs_of(data[end - footer : end])
        if codecs != [0] * (groups * metadata.num_columns):  # 0 means uncompressed
            raise ValueError("its columns are compressed")
        self._check_places(end - footer)

    def read(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """Read columns of some row groups, by default of all; texts are dictionary-encoded.

        Raises:
            ValueError: a page is damaged or has an unsupported encoding, or a value is not valid in a pack.
        """
        wanted = list(range(len(self.group_rows)) if groups is None else groups)
        with self._lock:
            table = _arrow(
                lambda: self._file.read_row_groups(wanted, list(columns), use_threads=False)
            )
        if table.num_rows != sum(self.group_rows[g] for g in wanted):
            raise ValueError("the rows in its groups do not add up")
        _arrow(lambda: table.validate(full=True))
        _check_rows(table)
        return table

    def _check_places(self, footer: int) -> None:
        """Raise unless the columns are side by side between the first bytes and the footer."""
        metadata, at = self._file.metadata, 4
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for j in range(metadata.num_columns):
                column = group.column(j)
                if column.num_values != group.num_rows:
                    raise ValueError("its columns have the wrong number of values")
                begin = column.data_page_offset
                if column.has_dictionary_page:
                    begin = min(begin, column.dictionary_page_offset)
                if begin != at or column.total_compressed_size < 0:
                    raise ValueError("its columns are not where they should be")
                at += column.total_compressed_size
        if at != footer:
            raise ValueError("its columns do not fill it")


# Thrift field numbers: a file's row groups, their columns, a column's metadata, its codec.
_TO_CODEC = (4, 1, 3, 4)


def codecs_of(footer: bytes) -> list[int]:
    """Return the codec of each column of each row group, read directly from the footer, which uses
    Thrift's compact protocol; pyarrow cannot be used, because it aborts the whole process if it meets a
    codec that it does not know. A damaged footer raises a ``ValueError``."""
    codecs: list[int] = []

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while (byte := footer[at]) > 127:
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        return value | byte << shift, at + 1

    def after(at: int, kind: int, depth: int) -> int:
        """Return the position at which a value that begins at ``at`` ends. ``depth`` is the
        number of fields already followed on the path to a codec, or -1 off that path."""
        if kind in (4, 5, 6):  # whole numbers of 16, 32 and 64 bits
            value, at = number(at)
            if depth == len(_TO_CODEC):
                codecs.append((value >> 1) ^ -(value & 1))
        elif kind == 8:  # a text
            count, at = number(at)
            at += count
        elif kind == 9:
            head = footer[at]
            count, at = (head >> 4, at + 1) if head >> 4 < 15 else number(at + 1)
            for _ in range(count):
                at = after(at, head & 15, depth)
        elif kind == 12:
            field = 0
            while head := footer[at]:
                if head < 16:
                    raise ValueError("its fields are out of order")
                field, at = field + (head >> 4), at + 1
                if head & 15 > 2:  # otherwise it is a flag, which has no bytes
                    leads = 0 <= depth < len(_TO_CODEC) and field == _TO_CODEC[depth]
                    at = after(at, head & 15, depth + 1 if leads else -1)
            at += 1
        elif kind == 3:  # a byte
            _, at = footer[at], at + 1
        else:
            raise ValueError(f"it holds a value of kind {kind}")
        return at

    try:
        after(0, 12, 0)
    except (ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"its footer is damaged ({type(error).__name__}: {error})") from None
    return codecs


def _arrow(call: Callable[[], Any]) -> Any:
    """The result of ``call()``, whose errors become a one-line ``ValueError``."""
    try:
        return call()
    except (pa.ArrowException, OSError, MemoryError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"it is not a readable Parquet file ({reason})") from None


_IDS = ("entry_id", "image_id", "method")


def _check_rows(table: pa.Table) -> None:
    """Raise a ``ValueError`` unless all values in the existing columns are valid in a pack."""
    for name in table.column_names:
        column = table[name]
        if pa.types.is_dictionary(column.type):
            _check_texts(column, name)
        elif pa.types.is_integer(column.type):
            sides = name in ("height", "width")
            found = pc.min_max(column).as_py()
            if found["min"] is not None and found["min"] < (sides or name == "methods"):
                raise ValueError(f"a value of its column {name} is too small")
            if sides and found["max"] > MAX_CELLS:
                raise ValueError(f"a map has more than {MAX_CELLS:,} cells per side")
        elif pa.types.is_floating(column.type):
            values = column.to_numpy()
            missing = name.startswith(METRIC) or name in ("disagreement", "confidence")
            if not (np.isfinite(values) | (np.isnan(values) & missing)).all():
                raise ValueError(f"a value of {name[:60]} is not finite")
    if {"probability", "is_value"} <= set(table.column_names):
        values = table["probability"].to_numpy()[~table["is_value"].to_numpy()]
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("a probability is not in 0..1")


def _check_texts(column: pa.ChunkedArray, name: str) -> None:
    for chunk in column.chunks:
        texts = chunk.dictionary
        if (pc.max(pc.binary_length(texts)).as_py() or 0) > LONG_TEXTS.get(name, MAX_TEXT):
            raise ValueError(f"a text of its column {name} is too long")
        if name in _IDS:
            found = pc.min_max(pc.utf8_length(texts)).as_py()
            if (found["max"] or 0) > MAX_NAME or found["min"] == 0:
                raise ValueError(f"a {name} is empty or too long")
            if pc.any(pc.match_substring(texts, "\0")).as_py():
                raise ValueError(f"a {name} holds a zero")


def dense(column: pa.ChunkedArray, most: int) -> pa.ChunkedArray:
    """Return texts without dictionaries; raise a ValueError if they have more than ``most`` bytes in
    total."""
    lengths = [
        pc.sum(pc.binary_length(c.dictionary).take(c.indices)).as_py() or 0 for c in column.chunks
    ]
    if sum(lengths) > most:
        raise ValueError(f"its texts have more than {most:,} bytes")
    return column.cast(pa.string())


def join(tables: Iterable[pa.Table], name: str, most: int) -> pa.ChunkedArray:
    """One text column of several shards, without dictionaries; raises the same ``ValueError`` as
    :func:`dense`."""
    chunks: list[pa.Array] = []
    for table in tables:
        made = dense(table[name], most)
        most -= made.nbytes
        chunks += [chunk for chunk in made.chunks if len(chunk)]
    return pa.chunked_array(chunks, pa.string())
