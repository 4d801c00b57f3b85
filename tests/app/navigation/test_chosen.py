"""The selection: the same chosen photos on every page, after a reload, in another tab and in files."""

import io
import os
import sqlite3
import urllib.request
from contextlib import closing

import pytest

pytest.importorskip("streamlit")

import pyarrow.parquet
from synthetic_packs import small_pack
from viewer_pages import cells, checked, data, opened, run_viewer

from xattn.app import state
from xattn.app.navigation import chosen
from xattn.app.triage import selection, selection_files, store, tag_files
from xattn.app.triage.store import Store


def script():
    import streamlit as st

    from xattn.app import main

    main._run(st.query_params["shown"])


def address_of(app):
    """What the address says is chosen."""
    [digest] = (
        [app.query_params["chosen"]]
        if isinstance(app.query_params["chosen"], str)
        else (app.query_params["chosen"])
    )
    return digest


def photo(number):
    return f"photo-{number:05}"


THREE = [photo(i) for i in (5, 1, 2)]


@pytest.fixture
def pack(tmp_path, monkeypatch):
    small_pack(tmp_path / "pack", 8, ("gradcam",))
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    [info] = state.library().packs()
    return state.library().open(info.id)


@pytest.fixture
def tags(pack):
    return tag_files.store_of(pack)


def test_a_set_has_one_digest_in_any_order_and_the_latest_is_known(tags):
    digest = tags.keep_set(THREE)
    assert store.DIGEST.fullmatch(digest) and tags.keep_set(sorted(THREE)) == digest
    assert tags.keep_set([]) != digest
    assert tags.set_of() == [] and tags.set_of(digest) == sorted(THREE)
    assert tags.set_of("0" * 10) is None


def test_old_sets_go_unless_a_slice_names_them(tags, monkeypatch):
    monkeypatch.setattr(store, "MOST_SETS", 2)
    digests = [tags.keep_set([photo(0)])]
    tags.save_slice("first", f"only={digests[0]}")
    digests += [tags.keep_set([photo(i)]) for i in range(1, 5)]
    assert [tags.set_of(d) for d in digests] == [[photo(0)], None, None, [photo(3)], [photo(4)]]


def test_only_other_sets_make_a_set_an_old_one_and_large_sets_do_so_sooner(tags, monkeypatch):
    first = tags.keep_set([photo(0)])
    for i in range(store.MOST_SETS + 10):
        tags.keep_set([photo(1 + i % 2)])
    assert tags.set_of(first) == [photo(0)]
    monkeypatch.setattr(store, "MOST_LETTERS", 80)  # three photos take 45
    second = tags.keep_set(THREE)
    assert tags.set_of(first) is None and tags.set_of(second) == THREE
    third = tags.keep_set([photo(i) for i in range(8)])  # the last is kept, however large
    assert tags.set_of(second) is None and len(tags.set_of(third)) == 8


def test_a_file_from_before_selections_keeps_its_tags_and_gets_them(tmp_path):
    own = Store(tmp_path / "pack.tags.sqlite", "me")
    own.toggle("ann", ["a"], "x")
    with closing(sqlite3.connect(own.path)) as base:
        base.executescript("DROP TABLE sets; PRAGMA user_version = 1")
    assert own.set_of() is None and own.counts() == {"x": 1}
    digest = own.keep_set(["a"])
    assert own.set_of(digest) == ["a"] and own.counts() == {"x": 1}


def test_a_set_in_a_strange_file_chooses_no_more_than_the_photos_of_the_pack(pack, tags):
    digest = tags.keep_set([photo(1)])
    with closing(sqlite3.connect(tags.path)) as base, base:
        base.execute("UPDATE sets SET photos = ?", [r'["\ud800", [["x"]], null, "photo-00002"]'])
    app = run_viewer(chosen=digest, only=digest)
    assert [c["photo"] for c in cells(app)] == [photo(2)] and not app.error


def test_an_empty_parameter_chooses_nothing(pack, tags):
    tags.keep_set(THREE)
    assert not any(cell["chosen"] for cell in cells(run_viewer(chosen="")))


def test_a_set_that_could_not_be_kept_for_a_moment_is_kept_later(pack, tags, monkeypatch):
    tags.keep_set([])
    monkeypatch.setattr(store, "PATIENCE", 0.01)
    app = run_viewer()
    with closing(sqlite3.connect(tags.path, isolation_level=None)) as base:
        base.execute("BEGIN IMMEDIATE")
        checked(app.button(key="gallery.choose_all").click().run())
        assert "chosen" not in app.query_params
    checked(app.run())
    assert len(tags.set_of(address_of(app))) == 8


def test_what_a_filter_chose_survives_a_reload_and_another_tab(pack):
    app = run_viewer(q=photo(3))
    checked(app.button(key="gallery.choose_all").click().run())
    assert store.DIGEST.fullmatch(address_of(app))
    other = run_viewer(chosen=address_of(app))
    assert [c["photo"] for c in cells(other) if c["chosen"]] == [photo(3)]
    assert "**1 chosen**" in [m.value for m in other.markdown]
    checked(other.button(key="chosen.none").click().run())
    assert "chosen" not in other.query_params
    assert run_viewer(chosen="0" * 10).warning[0].value.startswith("The photos chosen in this")


@pytest.mark.parametrize("shown", ["gallery", "image", "mistakes", "photomap", "whatif"])
def test_every_page_has_the_bar_and_keeps_the_address(pack, tags, shown):
    digest = tags.keep_set(THREE)
    app = opened(script, shown=shown, pack=pack.id, chosen=digest, image=photo(1))
    assert [m.value for m in app.markdown if "chosen**" in m.value] == ["**2 of 3 chosen**"]
    assert address_of(app) == digest


def test_the_chosen_photos_are_a_view_a_step_and_points_of_the_map(pack, tags):
    digest = tags.keep_set(THREE)
    app = opened(script, shown="gallery", pack=pack.id, chosen=digest, only=digest)
    assert {cell["photo"] for cell in cells(app)} == set(THREE)
    assert any(b.label == "chosen photos" for b in app.button)
    app = opened(script, shown="image", image=photo(2), view=f"only={digest}", chosen=digest)
    assert "2 of 3" in [c.value for c in app.caption]
    app = opened(script, shown="photomap", chosen=digest)
    points = data(app, "photomap.points")
    assert {points["ids"][i] for i in points["chosen"]} == set(THREE)
    app.button(key="chosen.none").click().run()
    cleared = data(app, "photomap.points")
    assert cleared["chosen"] == [] and cleared["turn"] == points["turn"] + 1


def test_a_cell_of_the_matrix_chooses_its_photos_and_slices_compare_them(pack, tags):
    app = opened(script, shown="mistakes", pack=pack.id, table="Slices")
    checked(app.button(key="mistakes.choose").click().run())
    digest = address_of(app)
    found = tags.set_of(digest)
    images = pack.images.loc[found]
    assert len(found) and images["label"].nunique() == images["predicted"].nunique() == 1
    table = app.dataframe[0].value
    assert table.set_index("slice").loc["chosen photos", "photos"] == len(found)


def test_the_parquet_file_has_the_rows_of_the_csv(pack, tags, monkeypatch):
    monkeypatch.setattr(selection_files, "CHUNK", 2)
    tags.change_tags("ann", [photo(1)], ["x", "y"])
    only = tags.keep_set(THREE)
    found = selection.select(pack, selection.View(only=only))
    written = pyarrow.parquet.read_table(io.BytesIO(selection_files.selection_parquet(found, tags)))
    nothing = selection.select(pack, selection.View(q="no such photo"))
    empty = pyarrow.parquet.read_table(io.BytesIO(selection_files.selection_parquet(nothing, None)))
    assert empty.num_rows == 0 and empty.column_names == written.column_names
    assert str(empty.schema.field("rating").type) == str(written.schema.field("rating").type)
    table = written.to_pandas()
    lines = list(selection_files.selection_csv(found, tags))
    assert len(table) == found.count == "".join(lines).count("\r\n") - 1
    assert {*table["image_id"]} == set(THREE)
    assert list(table.set_index("image_id").loc[photo(1), "tags"]) == ["x", "y"]


def test_a_set_that_cannot_be_kept_stays_in_the_session(pack, tags):
    tags.path.write_text("no database, but a text\n" * 50)
    app = run_viewer()
    checked(app.button(key="gallery.choose_all").click().run())
    assert all(cell["chosen"] for cell in cells(app)) and "chosen" not in app.query_params
    assert chosen.KEY + "gallery" not in [b.key for b in app.button]


def test_python_opens_a_viewer_and_shares_its_selection(tmp_path, monkeypatch):
    import xattn

    small_pack(tmp_path / "-pack", 4, ("gradcam",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XATTN_APP_TOKEN", "a-token-for-this-test")
    with xattn.open_viewer("-pack", selection=[photo(1)]) as viewer:  # no option of xattn app
        # An interrupt of this process, as a notebook sends it to a cell, does not reach the viewer.
        assert os.getpgid(viewer._process.pid) not in (os.getpgrp(), 0)
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(viewer.url) as page:
            assert page.status == 200 and "token=" not in page.url and "chosen=" in page.url
        assert viewer.url.startswith("http://127.0.0.1:") and "chosen=" in viewer.url
        assert viewer.url in viewer._repr_html_().replace("&amp;", "&")
        assert viewer.selection == [photo(1)]
        tag_files.store_of(viewer.pack).keep_set([photo(2), photo(3)])  # as a tab does
        assert viewer.selection == [photo(2), photo(3)]
        with pytest.raises(ValueError, match="selection: the pack has no photo 'x'"):
            viewer.selection = ["x"]
        viewer.selection = []
        assert "chosen=" not in viewer.url
    with pytest.raises(ValueError, match="is not the folder of a pack"):
        xattn.open_viewer(tmp_path / "none")
