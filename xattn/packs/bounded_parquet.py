"""Parquet files that may be hostile, read in memory that their size and number of rows bound.

* The file is whole in memory, at most ``MAX_FILE``, and its columns lie side by side in it.
* No column is compressed, so a page is never larger than the bytes that it has in the file.
* No column repeats or nests, so no more values are made than there are rows.
* Every text is read as a dictionary, so that a long text with many rows stays one text; the encodings that
  make long texts of short ones (DELTA_BYTE_ARRAY) cannot be read that way.

Page headers that say something else end in an error of pyarrow's before anything is made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAX_FILE = 96 << 20  # bytes of a Parquet file
MAX_ROWS = 1 << 18  # of a file
MAX_FOOTER = 8 << 20  # bytes
MAX_GROUPS = 1024  # row groups of a file
_FOOTER_TEXT = _FOOTER_ITEMS = 1 << 16


class BoundedParquet:
    """One Parquet file whose schema, counts and places were checked; threads may share it.

    Args:
        data: the file; it is at most ``MAX_FILE`` bytes.
        schema: the columns that it must have, exactly; all of them flat.
        rows: how many rows it must have.

    Attributes:
        group_rows: the number of rows of each row group.

    Raises:
        ValueError: it is damaged, or another file than that.
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
            raise ValueError("it has other columns")
        if metadata.num_rows != rows:
            raise ValueError(f"it has {metadata.num_rows:,} rows, the manifest says {rows:,}")
        if (groups := metadata.num_row_groups) > MAX_GROUPS:
            raise ValueError(f"it has {groups:,} row groups, over the limit of {MAX_GROUPS:,}")
        self.group_rows = [metadata.row_group(g).num_rows for g in range(groups)]
        if sum(self.group_rows) != rows or min(self.group_rows, default=1) < 1:
            raise ValueError("its row groups do not add up")
        self._check_places(len(data) - 8 - footer)

    def read(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
        """Columns of some row groups, by default of all; texts are dictionaries.

        Raises:
            ValueError: a page is damaged, or is none that is read.
        """
        wanted = list(range(len(self.group_rows)) if groups is None else groups)
        with self._lock:
            table = _arrow(
                lambda: self._file.read_row_groups(wanted, list(columns), use_threads=False)
            )
        if table.num_rows != sum(self.group_rows[g] for g in wanted):
            raise ValueError("its rows do not add up")
        _arrow(lambda: table.validate(full=True))
        return table

    def _check_places(self, footer: int) -> None:
        """Raise unless the columns lie side by side between the first bytes and the footer."""
        metadata, at = self._file.metadata, 4
        for g in range(metadata.num_row_groups):
            group = metadata.row_group(g)
            for j in range(metadata.num_columns):
                column = group.column(j)
                if column.compression != "UNCOMPRESSED" or column.num_values != group.num_rows:
                    raise ValueError("its columns are compressed, or have other numbers of values")
                begin = column.data_page_offset
                if column.has_dictionary_page:
                    begin = min(begin, column.dictionary_page_offset)
                if begin != at or column.total_compressed_size < 0:
                    raise ValueError("its columns are not where they should be")
                at += column.total_compressed_size
        if at != footer:
            raise ValueError("its columns do not fill it")


def _arrow(call: Callable[[], Any]) -> Any:
    """``call()``, whose errors become a ``ValueError`` of one line."""
    try:
        return call()
    except (pa.ArrowException, OSError, MemoryError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"it is no readable Parquet file ({reason})") from None
