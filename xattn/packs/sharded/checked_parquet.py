"""Parquet files that may be hostile: nothing is decoded before its size is known and bounded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from xattn.packs.sharded.columns import MAX_TEXT, by_dictionary
from xattn.packs.sharded.parquet_pages import Bounds, check_pages

MAX_FILE = 64 << 20  # bytes of a Parquet file
MAX_ROWS = 1 << 18  # of a file
MAX_FOOTER = 8 << 20  # bytes
MAX_GROUPS = 1024  # row groups of a file
MAX_COLUMN = 32 << 20  # decompressed bytes of a column of a row group
MAX_DECODED = 128 << 20  # decompressed bytes of what is read at once
MAX_VALUES = 1 << 22  # of a column of lists in a row group
_FOOTER_TEXT = _FOOTER_ITEMS = 1 << 16


class CheckedParquet:
    """One Parquet file, whole in memory, whose schema, counts and places were checked; threads may share
    it.

    Args:
        data: the file; it is at most ``MAX_FILE`` bytes.
        schema: the columns that it must have, exactly.
        rows: how many rows it must have.
        unique: the column of the rows' own ids.

    Raises:
        ValueError: it is damaged, or another file than that.
    """

    def __init__(self, data: bytes, schema: pa.Schema, rows: int, unique: str) -> None:
        if rows > MAX_ROWS:
            raise ValueError(f"it has {rows:,} rows, over the limit of {MAX_ROWS:,}")
        footer = int.from_bytes(data[-8:-4], "little")
        if footer > min(MAX_FOOTER, len(data) - 12):
            raise ValueError(f"its footer has {footer:,} bytes")
        self._data, self._schema = data, schema
        self._lock = threading.Lock()
        self._by_dictionary = by_dictionary(schema, unique)
        self._file = _arrow(self._opened)
        metadata = self._file.metadata
        if metadata.metadata or not _arrow(self._plain_schema).equals(schema):
            raise ValueError("it has other columns")
        if metadata.num_rows != rows:
            raise ValueError(f"it has {metadata.num_rows:,} rows, the manifest says {rows:,}")
        if (groups := metadata.num_row_groups) > MAX_GROUPS:
            raise ValueError(f"it has {groups:,} row groups, over the limit of {MAX_GROUPS:,}")
        counts = [metadata.row_group(g).num_rows for g in range(groups)]
        if sum(counts) != rows or min(counts, default=1) < 1:
            raise ValueError("its row groups do not add up")
        self.group_rows = counts
        self._check_places()

    def read(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """Columns of some row groups, by default of all; texts that repeat are dictionaries.

        Raises:
            ValueError: a page is damaged or larger than it may be, or a text is too long.
        """
        wanted = range(len(self.group_rows)) if groups is None else groups
        self.check(columns, wanted)
        with self._lock:
            table = _arrow(
                lambda: self._file.read_row_groups(
                    list(wanted), columns=list(columns), use_threads=False
                )
            )
        if table.num_rows != sum(self.group_rows[g] for g in wanted):
            raise ValueError("its rows do not add up")
        _arrow(lambda: table.validate(full=True))
        for name in columns:
            _check_texts(table[name])
        return table

    def check(
        self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
    ) -> None:
        """Check the page headers of columns, by default of all; nothing is decoded.

        Raises:
            ValueError: as :meth:`read`.
        """
        wanted = range(len(self.group_rows)) if groups is None else groups
        total, metadata = 0, self._file.metadata
        for g in wanted:
            group = metadata.row_group(g)
            for j, name in enumerate(self._leaves):
                if columns is not None and name not in columns:
                    continue
                place = group.column(j)
                begin, end = _place(place)
                rows, nested = self.group_rows[g], pa.types.is_list(self._schema.field(name).type)
                if place.num_values > MAX_VALUES if nested else place.num_values != rows:
                    raise ValueError(f"its column {name[:60]} has {place.num_values:,} values")
                bounds = Bounds(place.num_values, MAX_COLUMN, name in self._by_dictionary)
                total += check_pages(memoryview(self._data)[begin:end], bounds)
                if columns is not None and total > MAX_DECODED:
                    raise ValueError(f"its columns have more than {MAX_DECODED:,} bytes")

    def _opened(self) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.BufferReader(self._data),
            read_dictionary=self._by_dictionary,
            pre_buffer=False,
            thrift_string_size_limit=_FOOTER_TEXT,
            thrift_container_size_limit=_FOOTER_ITEMS,
        )

    def _plain_schema(self) -> pa.Schema:
        return self._file.schema.to_arrow_schema()

    def _check_places(self) -> None:
        """Raise unless the columns lie side by side between the first bytes and the footer."""
        metadata, at = self._file.metadata, 4
        self._leaves = [
            name for field in self._schema for name in [field.name] * _leaves(field.type)
        ]
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for j in range(metadata.num_columns):
                column = group.column(j)
                begin, end = _place(column)
                if begin != at or end < begin or column.compression not in ("ZSTD", "UNCOMPRESSED"):
                    raise ValueError("its columns are not where they should be")
                at = end
        footer = int.from_bytes(self._data[-8:-4], "little")
        if at != len(self._data) - 8 - footer:
            raise ValueError("its columns do not fill it")


def _place(column: Any) -> tuple[int, int]:
    """Where the pages of a column begin and end."""
    begin = column.data_page_offset
    if column.has_dictionary_page:
        begin = min(begin, column.dictionary_page_offset)
    return begin, begin + column.total_compressed_size


def _leaves(kind: pa.DataType) -> int:
    if pa.types.is_list(kind):
        return _leaves(kind.value_type)
    return kind.num_fields if pa.types.is_struct(kind) else 1


def _check_texts(column: pa.ChunkedArray) -> None:
    for chunk in column.chunks:
        texts = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        if pa.types.is_string(texts.type) and len(texts):
            longest = pa.compute.max(pa.compute.binary_length(texts)).as_py() or 0
            if longest > MAX_TEXT:
                raise ValueError(f"a text in it has {longest:,} bytes")


def _arrow(call: Callable[[], Any]) -> Any:
    """``call()``, whose errors become a ``ValueError`` of one line."""
    try:
        return call()
    except (pa.ArrowException, OSError, MemoryError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"it is no readable Parquet file ({reason})") from None
