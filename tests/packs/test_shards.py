"""Packs of several shards: what is written, read back, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_files import edit, rewritten
from synthetic_packs import described, explanation, picture

from xattn.app.library import Library
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import ImageFacts
from xattn.packs.format import is_pack
from xattn.packs.reader import Pack, load_pack
from xattn.packs.writer import pack_writer

METHODS = ("gradcam", "saliency", "random")


def fill(writer: Any, photos: int = 7) -> None:
    writer.metrics = described()
    writer.skipped = [("broken.jpg", "cut short")]
    for i in range(photos):
        side = 5 + i % 3
        writer.add([explanation(i, m, side, source=picture(i)) for m in METHODS])


def shards(folder: Path, photos: int = 7, shard: int = 3) -> Path:
    with pack_writer(folder, photos=shard) as writer:
        fill(writer, photos)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_at_a_known_place_is_found_without_all_ids(tmp_path, monkeypatch):
    ids = list(Pack(shards(tmp_path / "pack")).entry_ids)
    monkeypatch.setattr("xattn.packs.contents.Ids", None)
    pack = Pack(tmp_path / "pack")
    assert pack.first_entry == ids[0]
    pack.remember_rows({ids[10]: 10, ids[4]: 5}, {"photo-00003": 3})
    assert pack.key(ids[10])[0] == "photo-00003"
    assert pack.explanation(ids[10]).map.shape == (5, 5)
    assert pack.photo("photo-00003").size == (128, 96)
    with pytest.raises(PackError, match="changed since it was opened"):
        pack.key(ids[4])
    with pytest.raises(TypeError):  # the ids that it cannot make
        pack.key(ids[11])


def test_numbers_of_a_table_are_as_narrow_as_in_the_files(tmp_path):
    table = Pack(shards(tmp_path / "pack")).entries
    assert table.dtypes[["target", "min", "is_mask", "ROAD"]].tolist() == [
        np.dtype(kind) for kind in ("int32", "float32", "bool", "float64")
    ]


def test_a_trusted_pack_has_its_thumbnails_as_sources(tmp_path):
    found = load_pack(shards(tmp_path / "pack", 2))
    assert [e.photo().size for e in found] == [(128, 96)] * 6


def test_photos_without_pixels_have_no_thumbnails(tmp_path):
    with pack_writer(tmp_path / "pack") as writer:
        writer.add([explanation(0, metrics={})])
    pack = Pack(tmp_path / "pack")
    assert "thumbnails-00000.safetensors" not in contents(tmp_path / "pack")
    with pytest.raises(PackError, match="has no picture of photo-00000"):
        pack.photo_bytes("photo-00000")
    assert load_pack(tmp_path / "pack")[0].source is None


def test_metrics_and_labels_that_some_photos_lack(tmp_path):
    with pack_writer(tmp_path / "pack", photos=1) as writer:
        writer.metrics = {"ROAD": {"higher_is_better": True}}
        writer.add([explanation(0, metrics={}, curves={})])
        writer.add([explanation(1, metrics={"ROAD": 0.5}, curves={"deletion": [0.1, 0.2]})])
    pack = Pack(tmp_path / "pack")
    assert [pack.explanation(id).metrics for id in pack.entry_ids] == [{}, {"ROAD": 0.5}]
    assert [pack.curves(id) for id in pack.entry_ids] == [{}, {"deletion": [0.1, 0.2]}]
    assert pack.entries["ROAD"].isna().tolist() == [True, False]


def test_any_safetensors_reader_has_the_maps_and_thumbnails_by_their_ids(tmp_path):
    from safetensors.numpy import load_file

    folder = shards(tmp_path / "pack", 2)
    pack = Pack(folder)
    maps = load_file(folder / "maps-00000.safetensors")
    assert sorted(maps) == sorted(pack.entry_ids)
    for id in maps:
        np.testing.assert_array_equal(maps[id], pack.explanation(id).map)
    jpeg = load_file(folder / "thumbnails-00000.safetensors")["photo-00001"]
    assert jpeg.tobytes() == pack.photo_bytes("photo-00001")


def test_parquet_files_have_one_group_of_rows_and_no_schema_of_arrow(tmp_path):
    for path in sorted(shards(tmp_path / "pack", photos=6, shard=6).glob("*.parquet")):
        found = pq.read_metadata(path)
        assert found.num_rows >= 6 and found.num_row_groups == 1, path.name
        assert b"ARROW:schema" not in (found.metadata or {}), path.name


def test_duckdb_reads_the_rows_as_they_come_and_as_files(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    pack = Pack(shards(tmp_path / "pack"))
    wanted = pytest.approx(pack.entries["ROAD"].sum())
    tables = list(pack.rows("entries", ["method", "metric:ROAD"]))
    assert [len(table) for table in tables] == [9, 9, 3]
    rows = duckdb.from_arrow(pa.concat_tables(tables))
    assert rows.aggregate('sum("metric:ROAD")').fetchall() == [(wanted,)]
    files = [str(p) for p in sorted((tmp_path / "pack").glob("entries-*.parquet"))]
    sums = f'select count(*), sum("metric:ROAD") from read_parquet({files})'
    assert duckdb.sql(sums).fetchall() == [(21, wanted)]


def test_a_pack_appears_whole_or_not_at_all(tmp_path):
    before = contents(shards(tmp_path / "pack", 2))

    def stopped() -> None:
        with pack_writer(tmp_path / "pack") as writer:
            fill(writer, 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert contents(tmp_path / "pack") == before and [p.name for p in tmp_path.iterdir()] == [
        "pack"
    ]


def test_a_shard_writer_that_keeps_makes_a_pack_of_what_came_before_an_error(tmp_path):
    def stopped(photos: int) -> None:
        with pack_writer(tmp_path / "pack", photos=2, keep=True) as writer:
            fill(writer, photos)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped(0)
    assert not (tmp_path / "pack").exists()
    with (
        pytest.warns(RuntimeWarning, match="pack contains what was explained so far"),
        pytest.raises(KeyboardInterrupt),
    ):
        stopped(3)
    whole = Pack(shards(tmp_path / "whole", 3, 2))
    assert list(Pack(tmp_path / "pack").entry_ids) == list(whole.entry_ids)
    skipped = json.loads((tmp_path / "pack" / "manifest.json").read_text())["skipped"]
    assert [row["reason"] for row in skipped] == [
        "cut short",
        "stopped after photo-00002 by KeyboardInterrupt",
    ]


def test_a_pack_replaces_another_whole_and_keeps_notes(tmp_path):
    folder = shards(tmp_path / "pack")
    (folder / "notes.txt").write_text("mine")
    shards(folder, 2)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["entries-00000.parquet", "images-00000.parquet", "manifest.json",
                     "maps-00000.safetensors", "notes.txt", "thumbnails-00000.safetensors"]  # fmt: skip


def test_a_photo_that_comes_twice_is_refused_also_in_another_shard(tmp_path):
    for second in (0, 1):
        with (
            pytest.raises(ValueError, match="photo-00000"),
            pack_writer(tmp_path / "pack", photos=1) as writer,
        ):
            writer.metrics = described()
            writer.add([explanation(0)])
            if second:
                writer.add([explanation(1)])
            writer.add([explanation(0)])


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"target_name": "x" * 5000}, "target_name: .* give a shorter text"),
        ({"image_id": "x" * 500}, "image_id: .* has 5.. characters; give at most 400"),
        ({"curves": {"deletion": [float("nan")]}}, "curves: .* not finite"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, changes, named):
    with (
        pytest.raises(ValueError, match=named),
        pack_writer(tmp_path / "pack") as writer,
    ):
        writer.metrics = described()
        writer.add([explanation(0, **changes)])
    assert not (tmp_path / "pack").exists()


def test_a_shard_ends_when_it_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr("xattn.packs.writer.SHARD_BYTES", 20_000)
    pack = Pack(shards(tmp_path / "pack", 7, 4096))
    sizes = [p.stat().st_size for p in (tmp_path / "pack").iterdir()]
    assert pack.counts == (21, 7) and len(sizes) > 6 and max(sizes) < 60_000
    assert [e.image_id for e in load_pack(tmp_path / "pack")[::3]] == list(pack.image_ids)


def test_large_maps_end_a_shard_as_photos_do(tmp_path, monkeypatch):
    monkeypatch.setattr("xattn.packs.writer.SHARD_BYTES", 20_000)
    with pack_writer(tmp_path / "pack") as writer:
        for i in range(4):
            writer.add([explanation(i, side=50, metrics={}, curves={})])  # of 10,000 bytes
    assert len([*(tmp_path / "pack").glob("maps-*")]) == 2


def test_a_shard_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("xattn.packs.columns.MAX_ROWS", 20)
    with pytest.raises(ValueError, match="21 rows, over the limit of 20.*fewer photos in a shard"):
        shards(tmp_path / "pack", 7, 7)
    assert not (tmp_path / "pack").exists()


def test_a_metric_that_nobody_described_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="^metrics: AD@50 of .* is not described"),
        pack_writer(tmp_path / "pack") as writer,
    ):
        writer.metrics = {"ROAD": {"higher_is_better": True}}
        writer.add([explanation(0)])


def test_long_curves_are_read_back(tmp_path):
    curve = np.linspace(0, 1, 30_000).tolist()
    with pack_writer(tmp_path / "pack") as writer:
        for i in range(75):
            writer.add([explanation(i, metrics={}, curves={"deletion": curve})])
    pack = Pack(tmp_path / "pack")
    assert pack.curves(pack.entry_ids[74]) == {"deletion": curve}


def test_the_library_lists_a_pack_without_its_rows(tmp_path, monkeypatch):
    shards(tmp_path / "runs" / "large")
    monkeypatch.setattr(Pack, "entries", property(lambda self: pytest.fail("rows were read")))
    info = Library(tmp_path / "runs").packs()[0]
    titles = tuple(explanation(0, method=m).method_title for m in METHODS)
    assert (info.name, info.entries, info.images, info.methods) == ("large", 21, 7, titles)
    assert is_pack(tmp_path / "runs" / "large")


def with_features(folder: Path, rows: dict[int, Any]) -> Path:
    with pack_writer(folder, photos=2) as writer:
        for i in range(5):
            facts = ImageFacts(features=rows.get(i))
            writer.add([explanation(i, metrics={}, facts=facts)])
    return folder


def test_features_of_all_photos_are_kept_in_the_order_of_the_images(tmp_path):
    rows = {i: np.arange(3, dtype=np.float16) + i for i in range(5)}
    pack = Pack(with_features(tmp_path / "pack", rows))
    assert pack.has_features
    np.testing.assert_array_equal(pack.features(), np.stack([rows[i] for i in range(5)]))
    file = tmp_path / "pack" / "features-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PackError, match="features-00001.safetensors.*not the file"):
        pack.features()


def test_features_of_some_photos_are_left_out(tmp_path):
    pack = Pack(with_features(tmp_path / "pack", {i: np.ones(3) for i in (0, 1, 2, 4)}))
    assert not pack.has_features and pack.features() is None
    assert not list((tmp_path / "pack").glob("features-*"))


def test_features_of_another_length_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"features: the features of photo-00001 have shape \(4,\)"
    ):
        with_features(tmp_path / "pack", {0: np.ones(3), 1: np.ones(4)})


def test_a_feature_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"features: the features of photo-00001 are not finite"):
        with_features(tmp_path / "pack", {0: np.ones(3), 1: np.array([1, np.nan, 1])})


# ---------------------------------------------------------------------- damage


def read_all(folder: Path) -> None:
    """All that a page asks of a pack."""
    pack = Pack(folder)
    len(pack.entries), len(pack.images)
    for id in pack.entry_ids:
        pack.explanation(id), pack.provenance(id), pack.photo(pack.key(id)[0])


@pytest.mark.parametrize("file", ["entries-00001.parquet", "images-00000.parquet", "maps-00002.safetensors", "thumbnails-00000.safetensors"])  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "a link out", "a folder"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, file, damage):
    folder = shards(tmp_path / "pack")
    data = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "cut":
        (folder / file).write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) - 9 if file.endswith("safetensors") else len(data) // 2
        (folder / file).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "a link out":
        (tmp_path / "elsewhere").write_bytes(data)
        (folder / file).symlink_to(tmp_path / "elsewhere")
    elif damage == "a folder":
        (folder / file).mkdir()
    with pytest.raises(PackError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    if damage != "flipped" or file.endswith("parquet"):
        assert file in str(caught.value)


@pytest.mark.parametrize("file", ["entries-00001.parquet", "maps-00001.safetensors"])
@pytest.mark.parametrize("cut", [True, False])
def test_load_pack_names_the_file_that_is_missing_or_cut(tmp_path, file, cut):
    folder = shards(tmp_path / "pack")
    if cut:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-9] + bytes(9))
    else:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=f"^pack: .*{file} is missing or damaged") as caught:
        load_pack(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0]["maps"].update(file="../maps-00000.safetensors"),
        lambda m: m["shards"][0]["maps"].update(file="/etc/passwd"),
        lambda m: m["shards"][0]["maps"].update(rows=10**30),
        lambda m: m["shards"][0]["maps"].update(file="maps-00001.safetensors"),
        lambda m: m["shards"][0]["entries"].update(bytes=-1),
        lambda m: m["shards"][0]["entries"].update(sha256="0" * 64),
        lambda m: m["shards"][0].pop("images"),
        lambda m: m.update(shards=[]),
        lambda m: m.update(entries=10**15),
        lambda m: m.update(video={"file": "overlay.mp4"}),
        lambda m: m.update(shares={"deletion": ["a half"]}),
        lambda m: m["metrics"].update(min=m["metrics"]["ROAD"]),
        lambda m: m.update(metrics={}),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(tmp_path, change):
    folder = shards(tmp_path / "pack", 4)
    edit(folder, change)
    with pytest.raises(PackError):
        read_all(folder)


@pytest.mark.parametrize(
    "column, value",
    [
        ("entry_id", "photo-00001@1.gradcam"),
        ("entry_id", ""),
        ("image_id", "x" * 500),
        ("image_id", "nobody"),
        ("target", -1),
        ("probability", 1.5),
        ("probability", float("nan")),
        ("protocol", "[]"),
        ("protocol", "{"),
        ("view", "{}"),
        ("place", -1),
        ("place", 1 << 40),
        ("height", 0),
        ("height", 1 << 30),
        ("width", 17),
        ("min", float("inf")),
        ("sha256", bytes(32)),
        ("metric:ROAD", float("inf")),
        ("target_name", "x" * 5000),
        ("curves", '{"deletion": [NaN]}'),
        ("curves", '{"deletion": [1e999]}'),
        ("curves", '{"deletion": "x"}'),
        ("curves", '{"deletion": [' + "1," * 100_000 + "1]}"),
    ],
)
def test_rows_that_no_pack_can_hold_are_refused(tmp_path, column, value):
    folder = shards(tmp_path / "pack", 2)
    rewritten(folder, column, value)
    with pytest.raises(PackError):
        read_all(folder)


@pytest.mark.parametrize(
    "column, value",
    [
        ("image_id", "photo-00001"),
        ("label", -1),
        ("methods", 0),
        ("top", "[[1, 2, 3]]"),
        ("top", "5"),
        ("top", '[[0, "x", 1.5]]'),
        ("thumbnail_place", 1 << 40),
        ("thumbnail_bytes", 1 << 40),
        ("thumbnail_sha256", bytes(32)),
    ],
)
def test_photos_that_no_pack_can_hold_are_refused(tmp_path, column, value):
    folder = rewritten(shards(tmp_path / "pack", 2), column, value, "images-00000.parquet")
    with pytest.raises(PackError):
        read_all(folder)
