"""Packs whose files somebody signed who wants them to be read, with their own hashes, as the library and as
the viewer read them; and comparisons."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_packs import VIEW, described, explanation, picture

from fuzz.engine import target
from fuzz.heads import nasty_safetensors
from fuzz.labels import nasty_json
from fuzz.mutations import deep
from fuzz.photos import _nasty_photos, photos
from xattn.app.library import Library
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pictures import rendering
from xattn.app.pictures.rendering import Look
from xattn.app.triage.maps_table import MapsTable
from xattn.app.triage.selection import ALL, Selection, View
from xattn.app.triage.selection_files import selection_csv
from xattn.eval.evaluation.results import ImageRecord, MethodResult, Results
from xattn.eval.metrics.base import Column
from xattn.eval.protocol import Protocol
from xattn.eval.report.leaderboard_files import write_report
from xattn.eval.report.results_files import read_json
from xattn.packs.contained_files import PackError
from xattn.packs.format import MANIFEST, MAPS
from xattn.packs.reader import load_pack
from xattn.packs.writer import pack_writer

SAYS = r"pack: |map: |source: |image: |[A-Z][^\n]{10,}"
PERSON = "[A-Z][^\n]{10,}"  # a sentence for the person at the page; its type is checked


THUMBNAILS = "thumbnails-00000.safetensors"


@functools.cache
def pack_files() -> dict[str, bytes]:
    """The files of a pack with two shards, by name."""
    with tempfile.TemporaryDirectory() as folder:
        with pack_writer(Path(folder) / "pack", photos=2) as writer:
            writer.metrics = described()
            for i in range(3):
                writer.add([explanation(i, m, source=picture(i)) for m in ("gradcam", "random")])
        _show_all(Path(folder))  # the first table of pandas reserves a gigabyte of address space
        return {p.name: p.read_bytes() for p in (Path(folder) / "pack").iterdir()}


def _pack(folder: Path) -> None:
    (folder / "pack").mkdir()
    for name, data in pack_files().items():
        (folder / "pack" / name).write_bytes(data)


def _sign(folder: Path) -> None:
    """Let the manifest name the hashes and sizes that files have."""
    manifest = json.loads(pack_files()[MANIFEST])
    for shard in manifest["shards"]:
        for record in shard.values():
            data = (folder / "pack" / record["file"]).read_bytes()
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "pack" / MANIFEST).write_text(json.dumps(manifest))


def _look_at(folder: Path) -> None:
    """As a script would."""
    for found in load_pack(folder / "pack"):
        found.normalized()
        if found.source is not None:
            found.overlay(max_side=64)


_OPENED: list[str] | None = None  # while a pack is shown, the files that were opened


def _watch(event: str, arguments: Any) -> None:
    if _OPENED is not None and event == "open" and isinstance(arguments[0], str | bytes | Path):
        _OPENED.append(os.fsdecode(arguments[0]))


sys.addaudithook(_watch)


def _show(folder: Path) -> None:
    """As the viewer does, and no file is opened but the pack's own and what programs are made of."""
    global _OPENED
    _OPENED = opened = []
    try:
        _show_all(folder)
    finally:
        _OPENED = None
        inside, scratch = (folder / "pack").resolve(), f"{tempfile.gettempdir()}/xattn-live-"
        known = (str(inside), scratch, *filter(None, sys.path), sys.base_prefix, "/proc/")
        strange = [path for path in opened if not path.startswith(known)]
        assert not strange, strange


def _show_all(folder: Path) -> None:
    """The list, the gallery's table, pictures, and a CSV."""
    library = Library(folder)
    problems = [info.problem for info in library.packs() if info.problem]
    try:
        for info in library.packs():
            pack = library.open(info.id)
            everything = Selection(MapsTable(pack), View(method=ALL, maps="every"))
            assert "".join(selection_csv(everything, None))
            assert len(pack.images) == len(pack.image_ids)
            for entry_id in list(pack.entry_ids)[:4]:
                image_id = pack.key(entry_id)[0]
                pack.provenance(entry_id), pack.entries_of(image_id), pack.top(image_id)
                assert np.isfinite(
                    [v for curve in pack.curves(entry_id).values() for v in curve]
                ).all()
                rendering.overlay_bytes(pack, entry_id, Look(side=64))
    except PackError:
        raise
    except ValueError as error:  # of another kind: the page shows a traceback
        raise RuntimeError("no PackError") from error
    assert not problems


def _edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    manifest = json.loads(pack_files()[MANIFEST])
    change(manifest)
    return json.dumps(manifest).encode()


def _nasty_manifests() -> list[bytes]:
    def file(kind: str, **changes: Any) -> bytes:
        return _edited(lambda m: m["shards"][0][kind].update(changes))

    names = ["../pack/maps-00000.safetensors", "/etc/passwd", "maps-00000.safetensors/..", "", "maps-00001.safetensors",
             "entries-00000.parquet", "maps-99999.safetensors", "maps-\u0660\u0660\u0660\u0660\u0660.safetensors", 5, None, "x" * 10**5]  # fmt: skip
    numbers = [-1, 0, 1, 10**9, 10**400, 1.5, "5", None, True]
    whole = pack_files()[MANIFEST].decode()
    return [
        *(file("maps", file=name) for name in names),
        *(file(kind, **{key: value}) for kind in ("entries", "maps") for key in ("rows", "bytes") for value in numbers),
        *(file(kind, sha256=value) for kind in ("entries", "images", "maps") for value in ("0" * 64, "x", None, 5)),
        *(_edited(lambda m, key=key, value=value: m.update({key: value}))
          for key in ("entries", "images", "shards", "methods", "metrics", "shares", "skipped", "video")
          for value in ([], {}, [{}], ["x"], 10**9, -1, None, "x", [[[]]])),
        _edited(lambda m: m.update(shards=m["shards"] * 2)), _edited(lambda m: m["shards"].reverse()),
        _edited(lambda m: m["shards"][0].pop("thumbnails")), _edited(lambda m: m.update(version=10**30)), _edited(lambda m: m.update(version=2)),
        _edited(lambda m: m.update(version=True)), _edited(lambda m: m.update(metrics={"id": {"higher_is_better": True}})),
        _edited(lambda m: m.update(metrics={"min": {"higher_is_better": True}})), _edited(lambda m: m.update(video={"file": "x", "sha256": "0" * 64})),
        _edited(lambda m: m.update(shares={"deletion": ["x"]})), _edited(lambda m: m.update(shares={"deletion": [10**400]})),
        whole.replace('"metrics": {', f'"metrics": {{"head": {deep(900)}, ', 1).encode(), whole.replace("{", '{"format": 5, ', 1).encode(),
        *nasty_json(),
    ]  # fmt: skip


@target("pack manifest", f"pack/{MANIFEST}", lambda: [pack_files()[MANIFEST]], _nasty_manifests,
        template=_pack, says="pack: |source: |image: |The file ", share=2)  # fmt: skip
def pack_manifest(folder: Path) -> None:
    _look_at(folder)


@target("viewer manifest", f"pack/{MANIFEST}", lambda: [pack_files()[MANIFEST]], _nasty_manifests,
        template=_pack, says=PERSON, share=2)  # fmt: skip
def viewer_manifest(folder: Path) -> None:
    _show(folder)


def _parquet(table: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) and f.name not in ("entry_id", "curves", "top", "answer")]  # fmt: skip
    options = {"compression": "none", "store_schema": False, "use_dictionary": texts} | options
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def _other_tables(name: str) -> list[bytes]:
    """Whole files with other values, columns, types, encodings and counts."""
    table = pq.read_table(pa.BufferReader(pack_files()[name]))
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
    texts = [*nasty_json(), json.dumps({"deletion": [0.0] * 150_000}).encode(), b'{"deletion": [NaN]}', b'{"d": [1e999]}', b'{"d": 5}',
             b'[[1, "x", 2]]', b"[[1, 2]]", b'{"mode": "crop"}', *_views()]  # fmt: skip
    for i, field in enumerate(table.schema):
        if field.name in ("curves", "top", "answer", "protocol", "view"):
            for text in texts:
                column = pa.array([text.decode("utf-8", "replace")] * len(table), field.type)
                made.append(_parquet(table.set_column(i, field, column)))
    return made


def _views() -> list[bytes]:
    values = ([10**9] * 4, [0] * 4, "12", [1e999, 1], [10**400, 5], [1.5, 2.5], [1, 1], [-(10**6)] * 4)  # fmt: skip
    keys = ("photo_size", "resized", "box", "input_size")
    return [json.dumps({**VIEW.to_json(), key: value}).encode() for key in keys for value in values]


def _both(folder: Path) -> None:
    _sign(folder)
    problem: PackError | None = None
    try:
        _show(folder)
    except PackError as error:
        problem = error
    _look_at(folder)
    if problem is not None:
        raise problem


ENTRIES, IMAGES = "entries-00000.parquet", "images-00000.parquet"


@target("pack entries", f"pack/{ENTRIES}", lambda: [pack_files()[ENTRIES]], lambda: _other_tables(ENTRIES), template=_pack, says=SAYS, share=2)  # fmt: skip
@target("pack images", f"pack/{IMAGES}", lambda: [pack_files()[IMAGES]], lambda: _other_tables(IMAGES), template=_pack, says=SAYS, share=2)  # fmt: skip
@target("pack maps", f"pack/{MAPS}", lambda: [pack_files()[MAPS]], lambda: [*_other_maps(), *nasty_safetensors("photo-00000@0.gradcam")], template=_pack, says=SAYS)  # fmt: skip
@target("pack thumbnails", f"pack/{THUMBNAILS}", lambda: [pack_files()[THUMBNAILS]], lambda: nasty_safetensors("photo-00000"), template=_pack, says=SAYS, share=0.5)  # fmt: skip
def signed_pack(folder: Path) -> None:
    _both(folder)


def _other_maps() -> list[bytes]:
    """Whole files whose maps have other shapes and values than the rows say."""
    from safetensors.numpy import save

    maps = [np.zeros((1, 50_000)), np.zeros((7, 7)), np.full((7, 7), np.nan), np.full((7, 7), 1e38),
            np.zeros((0, 7)), np.zeros((7, 7, 1))]  # fmt: skip
    names = [f"photo-0000{i}@{i}.{m}" for i in (0, 1) for m in ("gradcam", "random")]
    return [
        save({name: values.astype(dtype) for name in names})
        for values in maps
        for dtype in (np.float32, np.float64)
    ]


@target("thumbnail", "photo.jpg", photos, _nasty_photos, template=lambda _: pack_files(), says=f"source: |image: |explanations: |{PERSON}")  # fmt: skip
def thumbnail(folder: Path) -> None:
    """A JPEG file that a pack holds with its hash."""
    data = (folder / "photo.jpg").read_bytes()
    with pack_writer(folder / "root" / "pack") as writer:
        writer.add([explanation(0, metrics={})], data)
    _show(folder / "root")
    _look_at(folder / "root")


@target("pack values unchecked", "values.bin", lambda: [np.ones((7, 7), "<f4").tobytes()],
        lambda: [np.full((7, 7), v, "<f4").tobytes() for v in (np.nan, np.inf, 3e38, 0)],
        template=_pack, says=f"pack: |map: |{PERSON}", share=0.5)  # fmt: skip
def pack_values(folder: Path) -> None:
    """The values of a map, with its own hash in the rows."""
    data = (folder / "values.bin").read_bytes()[:196].ljust(196, b"\0")
    table = pq.read_table(folder / "pack" / ENTRIES)
    first = {"place": table["place"][0].as_py(), "sha256": hashlib.sha256(data).digest()}
    whole = bytearray(pack_files()[MAPS])
    whole[first["place"] : first["place"] + 196] = data
    (folder / "pack" / MAPS).write_bytes(whole)
    i = table.schema.get_field_index("sha256")
    column = pa.array([first["sha256"], *table["sha256"].to_pylist()[1:]], pa.binary(32))
    data = _parquet(table.set_column(i, table.schema.field(i), column))
    (folder / "pack" / ENTRIES).write_bytes(data)
    _both(folder)


@functools.cache
def results() -> Results:
    """Two methods and a sanity row on three photos."""
    columns = (Column("AD", 0.5), Column("insertion"))
    methods = {
        name: MethodResult(
            forwards=1, is_mask=False, valid=np.ones(3, bool), reasons={}, failed={},
            scores={"deletion": np.linspace(0.8, 0.1, 12).reshape(3, 4)},
            values={columns[0]: np.arange(3.0) + i, columns[1]: np.array([0.5, np.nan, 0.1 * i])},
        )
        for i, name in enumerate(("gradcam", "saliency", "random"))
    }  # fmt: skip
    return Results(
        protocol=Protocol(n=3),
        images=[ImageRecord(f"photo {i}.jpg", i, f"class {i}", 0.9) for i in range(3)],
        methods=methods, backbone={"name": "made up", "sha256": "0" * 64}, n_resamples=50,
        options={c.key: {} for c in columns},
    )  # fmt: skip


@functools.cache
def leaderboard() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_report(results(), Path(folder))
        return (Path(folder) / "leaderboard.json").read_bytes()


def _nasty_leaderboards() -> list[bytes]:
    def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
        record = json.loads(leaderboard())
        change(record)
        return json.dumps(record).encode()

    return [
        *(edited(lambda r, key=key, value=value: r.update({key: value})) for key in ("backbone", "options", "notes") for value in ([], [5], 5, {"x": 5})),
        edited(lambda r: r.update(methods={})), edited(lambda r: r.update(methods=[])), edited(lambda r: r.update(images=[])), edited(lambda r: r.update(images=5)),
        edited(lambda r: r.update(n_resamples=10**12)), edited(lambda r: r.update(n_resamples="x")), edited(lambda r: r.update(n_resamples=True)),
        edited(lambda r: r["protocol"].update(seed="x")), edited(lambda r: r["protocol"].update(n=10**400)), edited(lambda r: r["protocol"].update(levels=5)),
        edited(lambda r: r["methods"]["gradcam"].update(valid=[[1]])), edited(lambda r: r["methods"]["gradcam"].update(reasons={"x": "y"})),
        edited(lambda r: r["methods"]["gradcam"].update(scores={"d": [[1], [2, 3]]})), edited(lambda r: r["methods"]["gradcam"].update(scores={"d": [[10**400]]})),
        edited(lambda r: r["methods"]["gradcam"].update(values=[])), edited(lambda r: r["methods"]["gradcam"]["values"][0].update(metric=[])),
        edited(lambda r: r["methods"]["gradcam"]["values"][0].update(level=10**400)), edited(lambda r: r["methods"]["gradcam"]["values"][0].update(values=["x"])),
        edited(lambda r: r["methods"]["gradcam"]["values"][0].update(metric="nothing")), edited(lambda r: r.update(standings=[])), edited(lambda r: r.update(skipped=5)),
        edited(lambda r: r.update(skipped=[{"id": 1}])), edited(lambda r: r["images"][0].update(p="x")), edited(lambda r: r["images"][0].update(more=1)),
        edited(lambda r: r["methods"]["gradcam"].update(objective=5)), edited(lambda r: r["methods"]["gradcam"].update(objective=["mask"])),
        *nasty_json(),
    ]  # fmt: skip


@target(
    "leaderboard",
    "comparison/leaderboard.json",
    lambda: [leaderboard()],
    _nasty_leaderboards,
    says="leaderboard.json cannot",
)
def leaderboard_page(folder: Path) -> None:
    library = Library(folder)
    info = library.comparisons()[0]
    board = leaderboard_file.read(library, info.id)
    for method in board.ranked:
        for key in board.columns:
            board.verdict(method, key)
            board.title_with_arrow(key)
    assert isinstance(board.curves, list)
    board.results.warnings()


@target(
    "results",
    "results.json",
    lambda: [leaderboard()],
    _nasty_leaderboards,
    says="results: ",
)
def results_file(folder: Path) -> None:
    read_json(folder / "results.json")
