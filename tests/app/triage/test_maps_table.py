"""The database of a pack's maps: what it gives of both formats, and that it reads no other file."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("streamlit")

from pandas.testing import assert_frame_equal
from synthetic_packs import described, explanation, picture
from viewer_pages import only

from xattn.app.triage.maps_table import MapsTable
from xattn.app.triage.selection import Selection, defaults
from xattn.packs.contained_files import PackError
from xattn.packs.reader import Pack
from xattn.packs.writer import pack_writer, save_pack


@pytest.fixture(scope="module")
def table(pack):
    return MapsTable(pack)


def test_maps_and_photos_are_those_of_the_pack(pack, table):
    for image_id in pack.images.index:
        own = pack.entries[pack.entries["image_id"] == image_id]
        assert_frame_equal(
            table.entries_of(image_id), own, check_dtype=False, check_index_type=False
        )
        known = pack.images.loc[image_id].to_dict()
        assert table.image(image_id) == {"image_id": image_id, **known}
    for entry_id, row in pack.entries.iterrows():
        assert table.image_of_map(entry_id) == row["image_id"]
    assert table.entries_of("another").empty
    assert table.image("another") is table.image_of_map("another") is None


def test_first_maps_are_those_of_the_most_probable_class(pack, table):
    for method in pack.entries["method"].unique():
        own = pack.entries[pack.entries["method"] == method]
        own = own.sort_values("probability", ascending=False, kind="stable")
        first = own.drop_duplicates("image_id")
        found = table.first_maps(method, list(pack.images.index))
        assert list(found.items()) == list(zip(first["image_id"], first.index, strict=True))
    assert table.first_maps(method, ["another"]) == table.first_maps("another", []) == {}


def test_a_metric_may_have_the_name_of_a_column_of_the_photos(tmp_path):
    photos = [explanation(i, source=picture(i), metrics={"title": i / 2}) for i in range(2)]
    about = {"title": next(iter(described().values()))}
    save_pack(tmp_path / "pack", photos, overlays=False, metrics=about)
    measure = MapsTable(only(tmp_path)).choices.measures["title"]
    assert (measure.low, measure.high) == (0, 0.5)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_text('{path}')",
        "SELECT * FROM read_csv('{path}')",
        "SELECT * FROM '{path}'",
        "COPY images TO '{path}.copy'",
        "ATTACH '{path}.duckdb'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '100GB'",
    ],
)
def test_the_database_reads_and_writes_no_other_file(table, tmp_path, statement):
    secret = tmp_path / "secret.csv"
    secret.write_text("secret\n1\n")
    with pytest.raises(PackError, match="tables cannot be read"):
        table.answer(statement.format(path=secret))
    assert os.listdir(tmp_path) == ["secret.csv"]


def test_its_folder_is_the_owners_alone_and_goes_with_it(pack):
    table = MapsTable(pack)
    folder = Path(table._folder.name)
    assert [p.stat().st_mode & 0o077 for p in (folder, folder.parent)] == [0, 0]
    del table
    gc.collect()
    assert not folder.exists() and folder.parent.is_dir()


def test_threads_share_a_table(pack, table):
    view = defaults(table.choices)
    wanted = list(Selection(table, view).rows().index)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: list(Selection(table, view).rows().index), range(40)))
    assert found == [wanted] * 40


def test_names_are_made_visible(tmp_path):
    hidden = "\u202egpj.exe"
    with pack_writer(tmp_path / "pack") as writer:
        writer.metrics = described()
        writer.add([explanation(0, file_name=hidden, target_name=hidden, source=picture(0))])
    pack = Pack(tmp_path / "pack")
    table = MapsTable(pack)
    rows = table.rows(np.array([0]))
    assert rows["file_name"].iloc[0] == rows["target_name"].iloc[0] == "\ufffdgpj.exe"
    assert table.image("photo-00000")["title"] == "\ufffdgpj.exe"
    assert "\ufffdgpj.exe" in table.lines(np.array([0]))[0]
