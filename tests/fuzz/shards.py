"""Packs of format 2, whose files somebody signed who wants them to be read: with their own hashes."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuzz.engine import target
from fuzz.heads import nasty_safetensors
from fuzz.labels import nasty_json
from xattn.app.library import Library
from xattn.app.pictures import rendering
from xattn.app.pictures.export import maps_csv
from xattn.app.pictures.rendering import Look
from xattn.app.synthetic_packs import described, explanation, picture
from xattn.packs.contained_files import PackError
from xattn.packs.format import MANIFEST
from xattn.packs.reader import load_pack
from xattn.packs.writer import pack_writer

SAYS = r"pack: |map: |source: |image: |[A-Z][^\n]{10,}"
ENTRIES, IMAGES = "entries-00000.parquet", "images-00000.parquet"
MAPS, THUMBNAILS = "maps-00000.safetensors", "thumbnails-00000.safetensors"


@functools.cache
def shard_files() -> dict[str, bytes]:
    """The files of a pack with two shards, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with pack_writer(Path(folder) / "pack", format=2, photos=2) as writer:
            writer.metrics = described()
            for i in range(3):
                writer.add([explanation(i, m, source=picture(i)) for m in ("gradcam", "random")])
        _look(Path(folder))  # the first table of pandas reserves a gigabyte of address space
        return {p.name: p.read_bytes() for p in (Path(folder) / "pack").iterdir()}


def _pack(folder: Path) -> None:
    (folder / "pack").mkdir()
    for name, data in shard_files().items():
        (folder / "pack" / name).write_bytes(data)


def _signed(folder: Path) -> None:
    """Let the manifest name the hashes and sizes that files have."""
    manifest = json.loads(shard_files()[MANIFEST])
    for shard in manifest["shards"]:
        for record in shard.values():
            data = (folder / "pack" / record["file"]).read_bytes()
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "pack" / MANIFEST).write_text(json.dumps(manifest))


def _look(folder: Path) -> None:
    """All that a page asks of a pack, and all that a script does."""
    library = Library(folder)
    problem: PackError | None = None
    for info in library.packs():
        try:
            pack = library.open(info.id)
            pack.parquet()
            maps_csv(pack, list(pack.entries.index[:3]))
            assert len(pack.images) == len(pack.image_ids)
            for entry_id in list(pack.entry_ids)[:4]:
                pack.provenance(entry_id), pack.entries_of(pack.key(entry_id)[0])
                rendering.overlay_bytes(pack, entry_id, Look(side=64))
        except PackError as error:
            problem = error
    for found in load_pack(folder / "pack"):
        found.normalized()
        if found.source is not None:
            found.overlay(max_side=64)
    if problem is not None:
        raise problem


def _edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(shard_files()[MANIFEST])
    change(manifest)
    return json.dumps(manifest).encode()


def _nasty_manifests() -> list[bytes]:
    def file(kind: str, **changes: Any) -> bytes:
        return _edited(lambda m: m["shards"][0][kind].update(changes))

    names = ["../pack/maps-00000.safetensors", "/etc/passwd", "maps-00000.safetensors/..", "", "maps-00001.safetensors",
             "entries-00000.parquet", "maps-99999.safetensors", "maps-\u0660\u0660\u0660\u0660\u0660.safetensors", 5, None, "x" * 10**5]  # fmt: skip
    numbers = [-1, 0, 1, 10**9, 10**400, 1.5, "5", None, True]
    return [
        *(file("maps", file=name) for name in names),
        *(file(kind, **{key: value}) for kind in ("entries", "maps") for key in ("rows", "bytes") for value in numbers),
        *(file(kind, sha256=value) for kind in ("entries", "images", "maps") for value in ("0" * 64, "x", None, 5)),
        *(_edited(lambda m, key=key, value=value: m.update({key: value}))
          for key in ("entries", "images", "shards", "views", "protocols", "curves", "methods", "metrics", "shares", "skipped")
          for value in ([], {}, [{}], ["x"], 10**9, -1, None, "x", [[[]]])),
        _edited(lambda m: m.update(shards=m["shards"] * 2)), _edited(lambda m: m["shards"].reverse()),
        _edited(lambda m: m.update(views=[{"mode": "crop"}])), _edited(lambda m: m["views"][0].update(box=[10**9] * 4)),
        _edited(lambda m: m["protocols"][0].update(probability="value")), _edited(lambda m: m.update(curves=["deletion"] * 2)),
        _edited(lambda m: m.update(metrics={"min": {"higher_is_better": True}})), _edited(lambda m: m["shards"][0].pop("thumbnails")),
        *nasty_json(),
    ]  # fmt: skip


@target(
    "shard manifest", f"pack/{MANIFEST}", lambda: [shard_files()[MANIFEST]], _nasty_manifests,
    kind="json", template=_pack, says=SAYS,
)  # fmt: skip
def shard_manifest(folder: Path) -> None:
    _look(folder)


def _parquet(table: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) and f.name not in ("entry_id", "sha256")]  # fmt: skip
    options = {"compression": "zstd", "store_schema": False, "use_dictionary": texts} | options
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def _other_tables(name: str) -> list[bytes]:
    """Whole files with other values, columns, types, encodings and counts."""
    table = pq.read_table(pa.BufferReader(shard_files()[name]))
    made = [
        _parquet(table, compression="gzip"), _parquet(table, compression="none"), _parquet(table, store_schema=True),
        _parquet(table, use_dictionary=True), _parquet(table, use_dictionary=False), _parquet(table, data_page_version="2.0"),
        _parquet(table, row_group_size=1), _parquet(table.slice(1)), _parquet(table.slice(0, 0)), _parquet(pa.concat_tables([table] * 9)),
        _parquet(table.drop_columns(["image_id"])), _parquet(table.append_column("more", table["image_id"])),
        _parquet(table.select(table.column_names[::-1])), _parquet(table, write_page_checksum=True), _parquet(table, data_page_size=1),
        _parquet(table.replace_schema_metadata({"ARROW:schema": "x"}), store_schema=False),
    ]  # fmt: skip
    values: dict[str, list[Any]] = {
        "string": ["", "x" * 10**6, "\0", "\x1b[31m", "../x", "\u202e"],
        "int32": [-1, 2**31 - 1, 0],
        "int64": [-1, 2**62, 0],
        "double": [np.nan, np.inf, 1e308, -1.0],
        "float": [np.nan, np.inf],
    }
    for i, field in enumerate(table.schema):
        for value in values.get(str(field.type), ()):
            column = pa.array([value] * len(table), field.type)
            made.append(_parquet(table.set_column(i, field, column)))
        wrong = pa.field(field.name, pa.binary(), nullable=field.nullable)
        made.append(_parquet(table.set_column(i, wrong, pa.array([b"\xff"] * len(table)))))
    curves = [n for n in table.column_names if n.startswith("curve:")]
    for name in curves[:1]:
        field = table.schema.field(name)
        for curve in ([0.0] * 150_000, [np.nan], []):
            column = pa.array([curve] * len(table), field.type)
            made.append(_parquet(table.set_column(table.column_names.index(name), field, column)))
    return made


@target("shard entries", f"pack/{ENTRIES}", lambda: [shard_files()[ENTRIES]], lambda: _other_tables(ENTRIES), template=_pack, says=SAYS, share=2)  # fmt: skip
@target("shard images", f"pack/{IMAGES}", lambda: [shard_files()[IMAGES]], lambda: _other_tables(IMAGES), template=_pack, says=SAYS, share=2)  # fmt: skip
@target("shard maps", f"pack/{MAPS}", lambda: [shard_files()[MAPS]], lambda: nasty_safetensors("photo-00000@0.gradcam"), kind="safetensors", template=_pack, says=SAYS, share=0.5)  # fmt: skip
@target("shard thumbnails", f"pack/{THUMBNAILS}", lambda: [shard_files()[THUMBNAILS]], lambda: nasty_safetensors("photo-00000"), kind="safetensors", template=_pack, says=SAYS, share=0.5)  # fmt: skip
def signed_shard(folder: Path) -> None:
    _signed(folder)
    _look(folder)
