"""Tags in the gallery: filters, badges, who sees what, and tag files that cannot be used."""

import shutil
from importlib.util import find_spec

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack
from viewer_pages import cells, checked
from viewer_pages import run_viewer as run

from xattn.app import state
from xattn.app.navigation import chosen
from xattn.app.pages.image import page
from xattn.app.triage import tag_files
from xattn.app.triage.store import Mark, Store, identity
from xattn.app.triage.tag_files import Person

HOSTILE = "<b>x</b> $y$ :red[z]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pack(tmp_path_factory.mktemp("root") / "first", 8, ("gradcam",))


@pytest.fixture(autouse=True)
def started(folder, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=folder.parent))
    yield
    for left in folder.parent.glob("*.sqlite"):
        left.unlink()


@pytest.fixture
def pack():
    [info] = state.library().packs()
    return state.library().open(info.id)


@pytest.fixture
def store(pack):
    return tag_files.store_of(pack)


def ids(app):
    return [cell["photo"] for cell in cells(app)]


def photo(number):
    return f"photo-{number:05}"


def test_the_tag_file_lies_beside_the_pack(store, folder):
    assert store.path == folder.with_name("first.tags.sqlite")


def test_badges_are_on_the_cells_as_text(store):
    store.change_tags("ann", [photo(1)], [HOSTILE, "a", "b", "c"])
    store.set_rating("ann", [photo(1)], 4)
    store.set_note("ann", photo(1), "a note")
    found = {cell["photo"]: cell["marks"] for cell in cells(run())}
    assert found[photo(0)] == []
    assert found[photo(1)] == [HOSTILE, "a", "b", "+1", "★★★★", "note"]


def test_an_address_filters_by_tag_rating_and_note(store):
    store.change_tags("ann", [photo(1), photo(2), photo(3)], [HOSTILE])
    store.set_rating("ann", [photo(2), photo(3)], 3)
    store.set_note("ann", photo(3), "a note")
    app = run(tag=HOSTILE)
    assert ids(app) == [photo(1), photo(2), photo(3)]
    assert "3 maps, filtered from 8" in app.caption[0].value
    app.session_state["gallery.filters"] = True  # the popover is open
    assert checked(app.run()).multiselect(key="gallery.tag").value == [HOSTILE]
    assert ids(run(tag=HOSTILE, rating="3")) == [photo(2), photo(3)]
    assert ids(run(rating="2", note="with")) == [photo(3)]
    assert ids(run(tag="nobody's")) == []


def test_another_tabs_change_is_seen_at_the_next_run(store):
    app = run(tag="x")
    assert ids(app) == []
    store.change_tags("bob", [photo(5)], ["x"])
    assert ids(checked(app.run())) == [photo(5)]
    checked(app.button(key="gallery.clear").click().run())
    assert len(cells(app)) == 8 and "tag" not in app.query_params


def test_stars_are_of_the_photos_that_were_chosen_then(pack, store):
    app = run()
    now = [photo(1)]
    app.session_state[chosen.HELD] = chosen.ChosenPhotos(pack.id, now)
    app.session_state["chosen.tags"] = True  # the popover is open
    checked(app.run())
    app.feedback[0].set_value(2)
    known = app._tree.get_widget_states()  # what the browser sends from now on
    checked(app._run(known))
    now[:] = [photo(4)]
    checked(app._run(known))
    assert store.marks([photo(1), photo(4)]) == {photo(1): Mark(rating=3)}
    assert app.feedback[0].value is None
    checked(app.feedback[0].set_value(4).run())
    assert store.marks([photo(4)]) == {photo(4): Mark(rating=5)}

    checked(app.button(key="chosen.no_stars").click().run())
    assert store.marks([photo(4)]) == {}


def test_stars_whose_callback_was_cut_off_are_taken_up_by_the_next_run(pack, store):
    app = run()
    app.session_state[chosen.HELD] = chosen.ChosenPhotos(pack.id, [photo(4)])
    app.session_state["chosen.tags"] = True
    app.session_state[chosen.STARS] = given = chosen._Stars(7, [photo(1)])
    app.session_state[given.key] = 2
    checked(app.run())
    assert store.marks([photo(1), photo(4)]) == {photo(1): Mark(rating=3)}
    assert app.feedback[0].value is None


def test_changes_of_a_photo_come_faster_than_it_is_drawn(store, monkeypatch):
    held = {name: page._Held(photo(1), name, value) for name, value in
            {"stars": None, "note": "", "tags": []}.items()}  # fmt: skip
    me = Person("me", store, [])
    for stars, note, tags in ((2, "a", ["x"]), (4, "b", ["x", "y"]), (None, "", ["y"])):
        monkeypatch.setattr(page.st, "session_state", {"stars": stars, "note": note, "tags": tags})
        for change, name in ((page._rate, "stars"), (page._note, "note"), (page._tag, "tags")):
            change(me, held[name])
        rating = 0 if stars is None else stars + 1
        assert store.marks([photo(1)])[photo(1)] == Mark(tuple(tags), note, rating)
    assert me.messages == []


@pytest.mark.parametrize("name, value", [("rating", "9"), ("rating", "x"), ("note", "perhaps")])
def test_a_bad_filter_is_a_message(name, value):
    app = run(**{name: value})
    assert f"there is no “{value}”" in app.warning[0].value.replace("\\", "")
    assert len(cells(app)) == 8


def test_the_whole_selection_is_chosen_tagged_and_undone(store):
    app = run(q="photo-0000", size="24")
    checked(app.button(key="gallery.choose_all").click().run())
    assert all(cell["chosen"] for cell in cells(app))
    app.session_state["chosen.tags"] = True  # the popover is open
    checked(app.run())
    app.selectbox(key="chosen.tag_name").set_value("wrong label").run()
    checked(app.button(key="chosen.tag_True").click().run())
    assert app.toast[0].value == "wrong label\\: 8 photos"
    assert store.counts() == {"wrong label": 8}
    checked(app.button(key="chosen.undo").click().run())
    assert store.counts() == {}
    checked(app.button(key="chosen.redo").click().run())
    checked(app.button(key="chosen.tag_False").click().run())
    assert store.counts() == {}
    checked(app.button(key="chosen.none").click().run())
    assert not any(cell["chosen"] for cell in cells(app))


def test_too_many_photos_cannot_be_chosen(store, monkeypatch):
    monkeypatch.setattr("xattn.app.navigation.chosen.MOST_AT_ONCE", 7)
    app = run()
    checked(app.button(key="gallery.choose_all").click().run())
    assert "8 photos are in this selection; at most 7 can be chosen" in app.warning[0].value
    assert not any(cell["chosen"] for cell in cells(app))


def test_chosen_photos_become_a_pack_below_the_root(folder):
    app = run(q="00003")
    checked(app.button(key="gallery.choose_all").click().run())
    app.session_state["chosen.export"] = True  # the popover is open
    checked(app.run())
    checked(app.button(key="chosen.export_pack").click().run())
    assert "Give a name of letters" in app.warning[0].value
    app.text_input(key="chosen.export_name").set_value("part").run()
    checked(app.button(key="chosen.export_pack").click().run())
    assert app.toast[0].value == "part is written\\: 1 map\\."
    library = state.library()
    part = library.open(next(i.id for i in library.packs() if i.name == "part"))
    assert list(part.image_ids) == [photo(3)]
    assert app.button(key="chosen.export_fiftyone").disabled == (find_spec("fiftyone") is None)
    shutil.rmtree(folder.with_name("part"))


def test_keys_get_other_tags(store):
    app = run()
    app.text_input(key="gallery.key9 ").set_value("night")
    checked(app.button(key="FormSubmitter:gallery.keys-Save the keys").click().run())
    assert store.keys()[9] == "night" and store.keys()[1] == "look again"
    app.text_input(key="gallery.key8 ").set_value("night")
    checked(app.button(key="FormSubmitter:gallery.keys-Save the keys").click().run())
    assert "is on two keys" in app.warning[0].value


def test_the_tags_of_another_pack_are_one_sentence_and_the_gallery_goes_on(folder):
    path = folder.with_name("first.tags.sqlite")
    Store(path, identity(["other"])).toggle("ann", ["other"], "x")
    before = path.read_bytes()
    app = run(tag="x")
    assert "contains the tags of a pack with other photos" in app.warning[0].value
    assert "No map passes" in app.markdown[0].value
    app = run()
    assert len(cells(app)) == 8
    assert len(app.warning) == 1
    assert path.read_bytes() == before


def test_where_nothing_can_be_written_the_viewer_keeps_tags_itself(
    pack, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    store.change_tags("ann", [photo(1)], ["x"])
    monkeypatch.setattr("os.access", lambda *_: False)
    own = tag_files.store_of(pack)
    assert own.path.parent == tmp_path / "xattn" / "tags"
    assert own.marks([photo(1)]) == {photo(1): Mark(("x",))}
    own.change_tags("ann", [photo(1)], ["y"])
    assert tag_files.store_of(pack).marks([photo(1)]) == {photo(1): Mark(("x", "y"))}
    assert store.marks([photo(1)]) == {photo(1): Mark(("x",))}
    assert f"kept in {own.path}" in tag_files.place(pack)
    assert any("so its tags are kept in" in c.value.replace("\\", "") for c in run().caption)


def test_another_folder_of_the_same_photos_has_its_own_tags(pack, folder, store):
    store.toggle("ann", [photo(1)], "x")
    small_pack(folder, 8, ("gradcam", "saliency"))
    [info] = state.library().packs()
    again = state.library().open(info.id)
    assert again.version != pack.version
    assert tag_files.store_of(again).counts() == {"x": 1}


# ---------------------------------------------------------------------- the image page


def image(number, **params):
    def script():
        from xattn.app import state
        from xattn.app.pages.image.page import page

        [info] = state.library().packs()
        page(state.Context(state.library(), state.library().open(info.id)))

    app = AppTest.from_function(script, default_timeout=600)
    app.query_params.update({"image": photo(number), **params})
    return checked(app.run())


def tags_of(app):
    [widget] = [widget for widget in app.multiselect if widget.label == "Tags"]
    return widget


def test_a_photo_shows_its_tags_note_and_stars_and_changes_them(store):
    store.change_tags("bob", [photo(1)], ["wrong label"])
    store.set_note("bob", photo(1), "**bold** <b>")
    store.set_rating("bob", [photo(1)], 2)
    app = image(1)
    tags = tags_of(app)
    assert tags.value == ["wrong label"]
    assert app.text_area[0].value == "**bold** <b>"
    assert app.feedback[0].value == 1
    store.change_tags("eve", [photo(1)], ["looks elsewhere"])  # in another tab, meanwhile
    checked(tags.set_value(["wrong label", "look again"]).run())
    assert store.marks([photo(1)])[photo(1)].tags == (
        "look again",
        "looks elsewhere",
        "wrong label",
    )
    checked(app.text_area[0].set_value("mine").run())
    checked(app.feedback[0].set_value(4).run())
    assert store.marks([photo(1)])[photo(1)] == Mark(
        ("look again", "looks elsewhere", "wrong label"), "mine", 5
    )


def test_what_the_browser_has_not_seen_yet_is_not_taken_back(store):
    app = image(1)
    known = app._tree.get_widget_states()  # what the browser sends until the next run has ended
    store.change_tags("me", [photo(1)], ["look again"])
    store.set_note("me", photo(1), "a note")
    store.set_rating("me", [photo(1)], 3)
    for _ in range(2):
        checked(app._run(known))
    assert store.marks([photo(1)])[photo(1)] == Mark(("look again",), "a note", 3)
    tags = tags_of(app)
    assert (tags.value, app.text_area[0].value) == (["look again"], "a note")
    assert app.feedback[0].value == 2
    app.text_area[0].set_value("another note")
    app.feedback[0].set_value(0)
    known = app._tree.get_widget_states()
    checked(app._run(known))
    store.set_note("me", photo(1), "")
    store.set_rating("me", [photo(1)], 5)
    for _ in range(2):
        checked(app._run(known))
    assert store.marks([photo(1)])[photo(1)] == Mark(("look again",), "", 5)
    tags = tags_of(app)
    checked(tags.set_value(["look again", "a tag of my own"]).run())
    assert tags_of(app).id == tags.id  # its list stays open


def test_two_people_writing_a_note_at_once_are_told(store):
    app = image(1)
    store.set_note("eve", photo(1), "from eve")
    checked(app.text_area[0].set_value("from me").run())
    assert "Somebody else wrote a note in the meantime" in app.toast[0].value
    assert app.text_area[0].value == "from eve\n\nfrom me"


def test_a_photo_opens_without_its_tags_if_their_file_cannot_be_used(folder):
    folder.with_name("first.tags.sqlite").write_text("no database, but a text\n" * 50)
    app = image(1)
    assert "first.tags.sqlite is" in app.warning[0].value.replace("\\", "")
    assert not app.text_area and app.tabs


# ---------------------------------------------------------------------- slices


def test_a_view_is_saved_opened_renamed_and_deleted(store):
    app = run(q="tench", sort="name")
    app.text_input(key="gallery.slice_name").set_value("night photos, wrong").run()
    checked(app.button(key="gallery.slice_save").click().run())
    assert app.toast[0].value == "Saved\\: night photos, wrong"
    assert store.slices() == {"night photos, wrong": "sort=name&q=tench"}
    app.text_input(key="gallery.slice_name").set_value("night photos, wrong").run()
    checked(app.button(key="gallery.slice_save").click().run())
    assert "There is a slice" in app.warning[0].value
    app = run()
    checked(app.button(key="gallery.slice_open").click().run())
    assert len(cells(app)) == 1 and store.slices()
    app.text_input(key="gallery.slice_new").set_value("day").run()
    checked(app.button(key="gallery.slice_rename").click().run())
    assert list(store.slices()) == ["day"]
    checked(app.button(key="gallery.slice_delete").click().run())
    assert store.slices() == {}


def mistakes():
    def script():
        from xattn.app import state
        from xattn.app.pages.mistakes import page

        [info] = state.library().packs()
        page(state.Context(state.library(), state.library().open(info.id)))

    app = AppTest.from_function(script, default_timeout=600)
    app.query_params["table"] = "Slices"
    return checked(app.run())


def test_slices_and_tags_are_compared(pack, store):
    app = mistakes()
    assert "There is no slice yet" in app.info[0].value
    store.save_slice("wrong ones", "right=wrong")
    store.save_slice("none", "q=nothing+has+this+name")
    store.change_tags("ann", [photo(1), photo(4)], [HOSTILE])
    table = mistakes().dataframe[0].value
    assert list(table["slice"]) == ["none", "wrong ones", f"tag: {HOSTILE}"]
    assert list(table["photos"]) == [0, 2, 2]  # every fourth photo is told wrong
    assert list(table["right"])[1:] == [0, 50]
    assert table["right, 95 %"][2] == "9% to 91%"
    own = pack.entries["image_id"].isin([photo(1), photo(4)])
    ad = pack.entries[own & (pack.entries["method"] == "gradcam")]["AD@50"].mean()
    assert table["AD@50"][2].startswith(f"{ad:.3f}")
