"""The database of a pack's maps: a file of duckdb's own in a private folder, and the ways into it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa

from xattn.app.live.scratch import Scratch
from xattn.packs.contained_files import AGAIN, PackError, why

FILLING, MEMORY = "256MB", "128MB"  # while it is filled, and then; beyond that it sorts on disk
THREADS = 4


def fold(text: object) -> str:
    """Text as it is compared: composed, without case."""
    return unicodedata.normalize("NFC", str(text)).casefold()


_SCRATCH: list[Scratch] = []


def scratch() -> Scratch:
    """The folder of all databases of this process, deleted when the viewer ends."""
    if not (_SCRATCH and _SCRATCH[-1].path.is_dir()):
        _SCRATCH.append(Scratch())
    return _SCRATCH[-1]


def connect(folder: Path) -> duckdb.DuckDBPyConnection:
    """An empty database in a folder, with the room that filling it takes; it loads no extensions."""
    database = duckdb.connect(
        str(folder / "maps.duckdb"),
        config={
            "memory_limit": FILLING,
            "threads": min(THREADS, os.cpu_count() or 1),
            "temp_directory": str(folder / "sorting"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        },
    )
    database.execute("PRAGMA force_compression = 'uncompressed'")  # quicker, on more disk
    # ASCII needs no Python.
    database.create_function("fold_any", fold, ["VARCHAR"], "VARCHAR")
    database.execute(
        "CREATE MACRO fold(s) AS CASE WHEN strlen(s) = length(s) THEN lower(s) ELSE fold_any(s) END"
    )
    return database


def batches(tables: Iterable[pa.Table], names: Sequence[str]) -> pa.RecordBatchReader:
    """Tables one after the other, with their columns renamed."""
    renamed = (table.rename_columns(list(names)) for table in tables)
    first = next(renamed)
    return pa.RecordBatchReader.from_batches(
        first.schema, (batch for table in chain([first], renamed) for batch in table.to_batches())
    )


def listed(columns: Iterable[str]) -> str:
    """Columns as SQL lists them; their names are the viewer's own, never a pack's."""
    return ", ".join(f'"{column}"' for column in columns)


@contextmanager
def told() -> Iterator[None]:
    """What duckdb finds wrong as a :class:`PackError`."""
    try:
        yield
    except (duckdb.Error, pa.ArrowException) as error:
        raise PackError(f"The pack's tables cannot be read ({why(error)}); {AGAIN}") from None
