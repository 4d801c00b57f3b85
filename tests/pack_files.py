"""Changes to the files of a pack, by somebody who wants them to be read: with their own hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ENTRIES, IMAGES, MAPS = (
    "entries-00000.parquet",
    "images-00000.parquet",
    "maps-00000.safetensors",
)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Let ``change`` do something to the manifest of a pack."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def signed(folder: Path, name: str, data: bytes, **changes: Any) -> Path:
    """Put ``data`` in place of a file; ``changes`` are those of its record."""
    (folder / name).write_bytes(data)
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **changes}
    return edit(folder, lambda m: [r.update(about) for s in m["shards"] for r in s.values() if r["file"] == name])  # fmt: skip


def parquet(table: Any, **options: Any) -> bytes:
    """A Parquet file as the writer of packs makes it, but for ``options``."""
    sink = pa.BufferOutputStream()
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) and f.name not in ("entry_id", "curves", "top", "answer")]  # fmt: skip
    known = {"compression": "none", "store_schema": False, "use_dictionary": texts}
    pq.write_table(table, sink, **(known | options))
    return sink.getvalue().to_pybytes()


def replaced(table: Any, column: str, values: Any) -> Any:
    """A table with other values of a column."""
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    return table.set_column(place, field, pa.array(values, field.type))


def rewritten(folder: Path, column: str, value: Any, name: str = ENTRIES) -> Path:
    """A pack whose first row has another value."""
    table = pq.read_table(folder / name)
    values = [value, *table[column].to_pylist()[1:]]
    return signed(folder, name, parquet(replaced(table, column, values)))
