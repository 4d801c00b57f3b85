"""The database of a pack's maps: a file of duckdb's own in a private folder, and the ways into it."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
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


def from_frame(frame: pd.DataFrame, types: Mapping[str, str], metrics: Mapping[str, str]) -> Any:
    """An arrow table of these columns, the metrics by their columns."""
    kinds = {
        "VARCHAR": pa.string(),
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
    }
    columns = {
        name: pa.array(frame[name], kinds[kind], from_pandas=True) for name, kind in types.items()
    }
    return pa.table(
        columns | {column: pa.array(frame[key], pa.float64()) for key, column in metrics.items()}
    )


def from_parquet(
    database: duckdb.DuckDBPyConnection,
    folder: Path,
    name: str,
    paths: Sequence[Path],
    types: Mapping[str, str],
    metrics: Mapping[str, str],
) -> duckdb.DuckDBPyRelation:
    """The rows of Parquet files, one file after the other, with columns of these names and types.

    The files are read through links, as duckdb takes marks in a path for patterns and partitions.
    """
    links = []
    for number, path in enumerate(paths):
        links.append(folder / f"{name}-{number:05}.parquet")
        links[-1].symlink_to(path.resolve())
    rows = database.read_parquet(
        [str(link) for link in links], union_by_name=True, hive_partitioning=False
    )
    known = [
        duckdb.ColumnExpression(column).cast(kind).alias(column) for column, kind in types.items()
    ]
    measured = [
        duckdb.ColumnExpression(key).cast("DOUBLE").alias(column) for key, column in metrics.items()
    ]
    return rows.select(*known, *measured)


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
