"""Packs, as the library and as the viewer read them, and comparisons."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.engine import target
from fuzz.heads import nasty_safetensors
from fuzz.labels import nasty_json
from fuzz.mutations import deep
from fuzz.photos import _nasty_photos, photos
from xattn.app.library import Library
from xattn.app.navigation.maps_table import MapsTable
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pictures import rendering
from xattn.app.pictures.export import maps_csv
from xattn.app.pictures.rendering import Look
from xattn.app.synthetic_packs import small_pack
from xattn.eval.metrics.base import Column
from xattn.eval.protocol import Protocol
from xattn.eval.report.leaderboard_files import write_report
from xattn.eval.report.results_files import read_json
from xattn.eval.results import ImageRecord, MethodResult, Results
from xattn.packs.contained_files import PackError
from xattn.packs.format import MANIFEST, MAPS
from xattn.packs.reader import load_pack

PERSON = "[A-Z][^\n]{10,}"  # a sentence for the person at the page; its type is checked


@functools.cache
def pack_files() -> dict[str, bytes]:
    """The files of a pack, by their paths."""
    with tempfile.TemporaryDirectory() as folder:
        small_pack(Path(folder) / "pack", 2, ("gradcam", "random"))
        Library(folder).packs()  # the first table of pandas reserves a gigabyte of address space
        root = Path(folder) / "pack"
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _pack(folder: Path) -> None:
    for name, data in pack_files().items():
        path = folder / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _look_at(folder: Path) -> None:
    """As a script would."""
    for explanation in load_pack(folder / "pack"):
        explanation.normalized()
        if explanation.source is not None:
            explanation.overlay(max_side=64)


def _show(folder: Path) -> None:
    """As the viewer does: the list, the gallery's table, pictures, and a CSV."""
    library = Library(folder)
    problems = [info.problem for info in library.packs() if info.problem]
    try:
        for info in library.packs():
            pack = library.open(info.id)
            MapsTable(pack)
            maps_csv(pack, pack.entries.index)
            for entry_id in pack.entries.index[:4]:
                pack.provenance(entry_id)
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


def _set(key: str, value: Any) -> bytes:
    return _edited(lambda m: m["entries"][0].update({key: value}))


def _view(**changes: Any) -> bytes:
    return _edited(lambda m: m["entries"][0]["view"].update(changes))


def _nasty_manifests() -> list[bytes]:
    whole = pack_files()[MANIFEST].decode()
    values = [
        ("thumbnail", "../../etc/passwd"), ("thumbnail", "thumbnails/.."), ("thumbnail", 5), ("shape", [10**9, 10**9]), ("shape", [7, 7.0]),
        ("shape", []), ("probability", 2), ("probability", 10**400), ("target", -1), ("target", 10**30), ("id", "../x"), ("id", ""), ("id", "x" * 10_000),
        ("image_id", "a/b"), ("image_id", "\ud800"), ("method", None), ("protocol", -1), ("protocol", 10**9), ("protocol", True), ("sha256", "0" * 64),
        ("sha256", 5), ("metrics", {"AD@50": "x"}), ("metrics", {"AD@50": 10**400}), ("metrics", []), ("curves", {"deletion": "x"}), ("curves", {"d": [10**400]}),
        ("curves", {"deletion": [1] * 200_000}), ("is_mask", "yes"), ("min", 1e999), ("file_name", "\x1b[31m"), ("target_name", "x" * 100_000), ("view", {}),
    ]  # fmt: skip
    return [
        *(_set(key, value) for key, value in values),
        *(_view(**{key: value}) for key in ("photo_size", "resized", "box", "input_size")
          for value in ([10**9] * (4 if key == "box" else 2), [0] * 4, "12", [1e999, 1], [10**400, 5], [1.5, 2.5], [1, 1], [-(10**6)] * 4)),
        _edited(lambda m: m.update(entries=[])), _edited(lambda m: m.update(entries=m["entries"] * 2)), _edited(lambda m: m.update(entries={})),
        _edited(lambda m: m.update(images=[])), _edited(lambda m: m.update(protocols=[])), _edited(lambda m: m.update(protocols=[5])),
        _edited(lambda m: m.update(version=10**30)), _edited(lambda m: m.update(version=2)), _edited(lambda m: m.update(version=True)),
        _edited(lambda m: m.update(metrics={"id": {"higher_is_better": True}})), _edited(lambda m: m.update(metrics={"min": {"higher_is_better": True}})),
        _edited(lambda m: m.update(metrics={"file_name": {"higher_is_better": True}})), _edited(lambda m: m.update(video="overlay.mp4")),
        _edited(lambda m: m.update(shares={"deletion": ["x"]})), _edited(lambda m: m["images"].update({"photo-00000": {"top": [[1, 2, 3]]}})),
        _edited(lambda m: m["images"].update({"photo-00000": {"top": 5, "label": "x"}})), _edited(lambda m: m["images"].update({"photo-00000": []})),
        _edited(lambda m: m.update(images={"photo-00000": {"label": 10**30, "label_name": 5}})),
        whole.replace('"protocols": [', f'"protocols": [{{"head": {deep(900)}}}, ', 1).encode(), whole.replace("{", '{"format": 5, ', 1).encode(),
        *nasty_json(),
    ]  # fmt: skip


@target(
    "pack manifest",
    f"pack/{MANIFEST}",
    lambda: [pack_files()[MANIFEST]],
    _nasty_manifests,
    kind="json",
    template=_pack,
    says="pack: ",
    share=2,
)
def pack_manifest(folder: Path) -> None:
    _look_at(folder)


@target(
    "viewer manifest",
    f"pack/{MANIFEST}",
    lambda: [pack_files()[MANIFEST]],
    _nasty_manifests,
    kind="json",
    template=_pack,
    says=PERSON,
    share=2,
)
def viewer_manifest(folder: Path) -> None:
    _show(folder)


def _other_maps() -> list[bytes]:
    """Whole files whose maps have other shapes and values than the manifest says."""
    from safetensors.numpy import save

    names = [entry["id"] for entry in json.loads(pack_files()[MANIFEST])["entries"]]
    maps = [
        np.zeros((1, 50_000)),
        np.zeros((7, 7)),
        np.full((7, 7), np.nan),
        np.full((7, 7), 1e38),
        np.zeros((0, 7)),
        np.zeros((7, 7, 1)),
    ]
    return [
        save({name: values.astype(dtype) for name in names})
        for values in maps
        for dtype in (np.float32, np.float64)
    ]


@target("pack maps", f"pack/{MAPS}", lambda: [pack_files()[MAPS]], lambda: [*_other_maps(), *nasty_safetensors("photo-00000@0.gradcam")],
        kind="safetensors", template=_pack, says="pack: ")  # fmt: skip
def pack_maps(folder: Path) -> None:
    _look_at(folder)


@target("viewer maps", f"pack/{MAPS}", lambda: [pack_files()[MAPS]], lambda: [*_other_maps(), *nasty_safetensors("photo-00000@0.gradcam")],
        kind="safetensors", template=_pack, says=PERSON)  # fmt: skip
def viewer_maps(folder: Path) -> None:
    _show(folder)


def _unchecked(folder: Path) -> None:
    """A pack without hashes, as earlier versions wrote them: all that is read is looked at."""
    _pack(folder)
    manifest = json.loads(pack_files()[MANIFEST])
    for entry in manifest["entries"]:
        del entry["sha256"]
    for image in manifest["images"].values():
        del image["thumbnail_sha256"]
    (folder / "pack" / MANIFEST).write_text(json.dumps(manifest))


@target(
    "pack maps unchecked",
    f"pack/{MAPS}",
    lambda: [pack_files()[MAPS]],
    _other_maps,
    kind="safetensors",
    template=_unchecked,
    says=f"pack: |map: |{PERSON}",
    share=0.5,
)
def pack_maps_unchecked(folder: Path) -> None:
    _look_at(folder)
    _show(folder)


THUMBNAIL = "pack/thumbnails/photo-00000.jpg"


@target(
    "thumbnail",
    THUMBNAIL,
    photos,
    _nasty_photos,
    template=_unchecked,
    says=f"source: |image: |{PERSON}",
)
def thumbnail(folder: Path) -> None:
    _show(folder)
    _look_at(folder)


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
        edited(lambda r: r.update(methods={})), edited(lambda r: r.update(methods=[])), edited(lambda r: r.update(images=[])), edited(lambda r: r.update(images=5)),
        edited(lambda r: r.update(n_resamples=10**12)), edited(lambda r: r.update(n_resamples="x")), edited(lambda r: r.update(n_resamples=True)),
        edited(lambda r: r["protocol"].update(seed="x")), edited(lambda r: r["protocol"].update(n=10**400)), edited(lambda r: r["protocol"].update(levels=5)),
        edited(lambda r: r["methods"]["gradcam"].update(valid=[[1]])), edited(lambda r: r["methods"]["gradcam"].update(reasons={"x": "y"})),
        edited(lambda r: r["methods"]["gradcam"].update(scores={"d": [[1], [2, 3]]})), edited(lambda r: r["methods"]["gradcam"].update(scores={"d": [[10**400]]})),
        edited(lambda r: r["methods"]["gradcam"].update(values=[])), edited(lambda r: r["methods"]["gradcam"]["values"][0].update(metric=[])),
        edited(lambda r: r["methods"]["gradcam"]["values"][0].update(level=10**400)), edited(lambda r: r["methods"]["gradcam"]["values"][0].update(values=["x"])),
        edited(lambda r: r["methods"]["gradcam"]["values"][0].update(metric="nothing")), edited(lambda r: r.update(standings=[])), edited(lambda r: r.update(skipped=5)),
        edited(lambda r: r.update(skipped=[{"id": 1}])), edited(lambda r: r["images"][0].update(p="x")), edited(lambda r: r["images"][0].update(more=1)),
        edited(lambda r: r["methods"]["gradcam"].update(objective=5)), edited(lambda r: r["methods"]["gradcam"].update(objective=["masking"])),
        *nasty_json(),
    ]  # fmt: skip


@target(
    "leaderboard",
    "comparison/leaderboard.json",
    lambda: [leaderboard()],
    _nasty_leaderboards,
    kind="json",
    says="leaderboard.json cannot",
)
def leaderboard_page(folder: Path) -> None:
    library = Library(folder)
    info = library.comparisons()[0]
    board = leaderboard_file.read(library, info.id)
    for method in board.ranked:
        for key in board.columns:
            board.verdict(method, key)
            board.titled(key)
    assert isinstance(board.curves, list)
    board.results.warnings()


@target(
    "results",
    "results.json",
    lambda: [leaderboard()],
    _nasty_leaderboards,
    kind="json",
    says="results: ",
)
def results_file(folder: Path) -> None:
    read_json(folder / "results.json")
