"""The gallery page: widgets, URL, paging, what is sent to the browser, empty and damaged packs."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("streamlit")

from synthetic_packs import explanation, million_pack, picture, small_pack
from viewer_pages import cells, checked, opened
from viewer_pages import run_viewer as run

from xattn.app import state
from xattn.app.navigation import frame
from xattn.app.pages import first_run
from xattn.packs import contents as pack_contents
from xattn.packs.contained_files import PackError
from xattn.packs.format import MAPS
from xattn.packs.writer import save_pack

NAMES = [
    "<img src=x onerror=alert(1)>",
    'a "quote" & more',
    "😀 party",
    "تصویر",
    "**bold** $x$ :red[y]",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    found = [explanation(i, file_name=name, source=picture(i)) for i, name in enumerate(NAMES)]
    save_pack(root / "odd <b>", found, overlays=False)
    small_pack(root / "first", 30, ("gradcam", "random"))  # the newest, so what opens first
    return root


@pytest.fixture(autouse=True)
def started(root, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))


def opened_filters(app):
    """The page with its popover of filters open."""
    app.session_state["gallery.filters"] = True
    return checked(app.run())


def pack_id(name):
    return next(info.id for info in state.library().packs() if info.name == name)


def opened_pack(name):
    return state.library().open(pack_id(name))


def test_a_page_of_pictures_is_sent_and_no_more():
    app = run()
    assert len(cells(app)) == 24
    assert "1 to 24 of 30 maps" in app.caption[0].value
    first = cells(app)[0]
    assert first["src"].startswith("/xattn/overlay?")
    assert "page=" not in first["href"]
    assert f"pack={pack_id('first')}" in first["href"]


def test_the_next_page_has_the_rest_and_its_own_url():
    app = run()
    seen = [c["id"] for c in cells(app)]
    checked(app.button(key="gallery.Next").click().run())
    assert app.query_params["page"] == "2"
    seen += [c["id"] for c in cells(app)]
    pack = opened_pack("first")
    assert seen == list(pack.entries.index[pack.entries["method"] == "gradcam"])
    assert app.button(key="gallery.Next").disabled
    checked(app.button(key="gallery.Previous").click().run())
    assert "page" not in app.query_params


def test_a_url_restores_every_widget():
    app = run(
        pack=pack_id("first"),
        method="random",
        sort="ROAD",
        order="desc",
        show="photo",
        size="36",
        q="photo",
        label=["1", "2"],
        predicted=["1", "2"],
        right="right",
        measure="AD@50",
        low="0.1",
        high="0.9",
    )
    assert not app.warning
    opened_filters(app)
    assert app.selectbox(key="gallery.method").value == "random"
    assert app.selectbox(key="gallery.sort").value == "ROAD"
    assert app.selectbox(key="gallery.order").value == "desc"
    assert app.selectbox(key="gallery.size").value == 36
    assert app.text_input(key="gallery.q").value == "photo"
    assert app.multiselect(key="gallery.label").value == ["1", "2"]
    assert app.multiselect(key="gallery.predicted").value == ["1", "2"]
    assert app.radio(key="gallery.right").value == "right"
    assert app.selectbox(key="gallery.measure").value == "AD@50"
    assert (
        app.number_input(key="gallery.low").value,
        app.number_input(key="gallery.high").value,
    ) == (0.1, 0.9)
    pack = opened_pack("first")
    images, entries = pack.images, pack.entries
    wanted = images[images["label"].isin([1, 2]) & (images["right"] == True)].index  # noqa: E712
    rows = entries[entries["image_id"].isin(wanted) & (entries["method"] == "random")]
    rows = rows[rows["AD@50"].between(0.1, 0.9)].sort_values("ROAD", ascending=False)
    assert [c["id"] for c in cells(app)] == list(rows.index)
    assert len(rows)
    assert all(c["src"].startswith("/xattn/picture?") for c in cells(app))


def test_widgets_write_the_url_and_begin_at_the_first_page():
    app = run(page="2")
    app.selectbox(key="gallery.sort").select("AD@50")
    app.selectbox(key="gallery.order").select("desc")
    checked(app.run())
    assert app.query_params == {"pack": pack_id("first"), "sort": "AD@50", "order": "desc"}
    figures = opened_pack("first").entries
    figures = figures[figures["method"] == "gradcam"]["AD@50"].sort_values(ascending=False)
    assert [c["id"] for c in cells(app)] == list(figures.index[:24])
    assert cells(app)[0]["lines"][-1] == f"AD@50: {figures.iloc[0]:.3g}"


def test_another_url_wins_over_the_widgets_and_the_same_does_not():
    app = run(sort="AD@50")
    app.query_params["sort"] = "ROAD"  # Back, or an address that was typed
    checked(app.run())
    assert app.selectbox(key="gallery.sort").value == "ROAD"
    app.selectbox(key="gallery.sort").select("name")
    checked(app.run())
    assert app.query_params["sort"] == "name"


def test_a_click_that_comes_with_the_url_of_the_click_before_is_not_undone():
    app = run(method="all")
    checked(app.button(key="gallery.Next").click().run())
    del app.query_params["page"]  # the browser has not heard of the new one yet
    checked(app.button(key="gallery.Next").click().run())
    assert len(cells(app)) == 12
    assert app.query_params["page"] == "3"


def test_the_address_that_back_leads_to_after_an_image_restores_the_gallery():
    app = run(image="photo-00003", view="sort=ROAD&order=desc&size=36")
    assert app.selectbox(key="gallery.sort").value == "ROAD"
    assert [c["id"] for c in cells(app) if c["selected"]] == ["photo-00003@3.gradcam"]
    app.selectbox(key="gallery.order").select("asc")
    checked(app.run())
    assert app.query_params == {"pack": pack_id("first"), "sort": "ROAD", "size": "36"}


def test_bad_values_are_defaults_with_a_message():
    app = run(sort="<script>alert(1)</script>", page="x", low="inf", size="7", label="no class")
    assert len(app.warning) == 1
    for name in ("sort", "page", "low", "size", "label"):
        assert f"{name}:" in app.warning[0].value.replace("\\", "")
    assert "<script>" not in app.warning[0].value
    assert len(cells(app)) == 24
    assert app.query_params == {"pack": pack_id("first")}


def test_a_page_beyond_the_last_is_the_last():
    app = run(page="999")
    assert len(cells(app)) == 6
    assert app.query_params == {"pack": pack_id("first"), "page": "2"}
    assert app.number_input(key="gallery.jump").value == 2


def test_no_result_says_so_and_leads_back():
    app = run(q="nothing like it", right="wrong")
    assert not cells(app)
    assert any("No map passes" in m.value for m in app.markdown)
    checked(app.button(key="gallery.all_maps").click().run())
    assert len(cells(app)) == 24
    assert app.query_params == {"pack": pack_id("first")}


@pytest.mark.parametrize(
    "params, text",
    [
        ({}, "1 to 24 of 30 maps"),
        ({"page": "2"}, "25 to 30 of 30 maps"),
        ({"size": "36"}, "30 maps"),
        ({"q": "photo-00003"}, "1 map, filtered from 30"),
        ({"q": "photo", "page": "2"}, "25 to 30 of 30 maps, filtered from 30"),
        ({"q": "nothing like it"}, "No maps, filtered from 30"),
    ],
)
def test_the_number_of_maps_is_said_in_words_that_fit_it(params, text):
    assert run(**params).caption[0].value == text


def test_a_last_page_of_one_map_names_its_number(tmp_path, monkeypatch):
    small_pack(tmp_path / "root", 25, ("gradcam",))
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    assert run(page="2").caption[0].value == "Map 25 of 25"


def test_clearing_the_filters_keeps_the_order():
    app = run(sort="ROAD", right="wrong", measure="ROAD", low="0.5")
    checked(app.button(key="gallery.clear").click().run())
    assert app.query_params == {"pack": pack_id("first"), "sort": "ROAD"}
    assert opened_filters(app).number_input(key="gallery.low").value is None


FILTERED = {
    "sort": "ROAD",
    "q": "photo",
    "label": ["1", "2"],
    "right": "right",
    "measure": "ROAD",
    "low": "0.05",
}


def chips(app):
    """What the chips say, with their buttons."""
    buttons = [b for b in app.button if (b.key or "").startswith("gallery.chip ")]
    return {button.label.replace("\\", ""): button for button in buttons}


def test_each_filter_is_a_chip_that_takes_it_alone_away():
    app = run(**FILTERED)
    said = ["“photo”", "true: great white shark", "true: hen", "Right", "ROAD: from 0.05"]
    assert list(chips(app)) == said
    checked(chips(app)["true: hen"].click().run())
    assert app.query_params["label"] == "1"
    for text, name in (("“photo”", "q"), ("Right", "right"), (said[-1], "low")):
        checked(chips(app)[text].click().run())
        assert name not in app.query_params
    checked(chips(app)["true: great white shark"].click().run())
    assert not chips(app)
    assert app.query_params == {"pack": pack_id("first"), "sort": "ROAD"}
    assert len(cells(app)) == 24


def test_a_chip_begins_at_the_first_page():
    app = run(q="photo", page="2")
    checked(chips(app)["“photo”"].click().run())
    assert "page" not in app.query_params


def test_classes_are_listed_with_their_photos_the_most_frequent_first_or_by_name():
    app = opened_filters(run())
    counts = opened_pack("first").images["predicted_name"].value_counts()
    shown = app.multiselect(key="gallery.predicted").options
    assert shown[0].endswith(f"({counts.max()})") and shown[-1].endswith(f"({counts.min()})")
    assert f"tench ({counts['tench, Tinca tinca']})" in shown
    labels = app.multiselect(key="gallery.label").options
    numbers = [int(text.rpartition("(")[2][:-1]) for text in labels]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) > 1
    checked(app.button_group(key="gallery.classes").set_value("name").run())
    labels = app.multiselect(key="gallery.label").options
    assert labels == sorted(labels)


def test_another_measure_has_no_range_yet():
    app = opened_filters(run(measure="ROAD", low="0.5"))
    checked(app.selectbox(key="gallery.measure").select("AD@50").run())
    assert app.number_input(key="gallery.low").value is None
    assert "low" not in app.query_params


def test_names_are_data_and_never_markup():
    app = run(pack=pack_id("odd <b>"))
    lines = [c["lines"][-1] for c in cells(app)]
    assert lines == [name.rpartition("/")[2] for name in NAMES]
    assert all(h.value != "odd <b>" and "\\<b\\>" in h.value for h in app.title)


def test_every_method_is_a_cell_each():
    app = run(method="all", sort="name")
    pack = opened_pack("first")
    assert [c["id"] for c in cells(app)] == list(pack.entries.index[:24])
    assert cells(app)[1]["lines"][0] == "Random"


def test_another_pack_is_another_url_without_the_old_filters():
    app = run(sort="ROAD", right="wrong")
    app.session_state["_picked"] = pack_id("odd <b>")
    checked(app.run())
    assert app.query_params == {"pack": pack_id("odd <b>")}
    assert len(cells(app)) == len(NAMES)


def test_back_in_a_pack_the_other_packs_view_is_gone():
    app = run()
    app.session_state["_picked"] = pack_id("odd <b>")
    checked(app.run())
    app.selectbox(key="gallery.sort").select("name")
    checked(app.run())
    app.session_state["_picked"] = pack_id("first")
    checked(app.run())
    assert app.selectbox(key="gallery.sort").value == "pack"
    assert app.query_params == {"pack": pack_id("first")}


def test_a_pack_that_is_not_there_is_a_message_with_a_way_on():
    app = run(pack="../../etc/passwd")
    assert len(app.error) == 1
    assert not cells(app)
    assert app.get("page_link")
    app.session_state["_picked"] = pack_id("first")
    checked(app.run())
    assert len(cells(app)) == 24


def test_packs_with_problems_are_named_and_do_not_hide_the_others(root):
    bad = root / "cut *short*"
    small_pack(bad, 1)
    (bad / MAPS).write_bytes(b"\x00" * 5)
    try:
        assert len(cells(run())) == 24
        found = frame.pack_options(state.library().packs(), None)
        (line,) = found["problems"]
        assert line["title"] == bad.name and "maps" in line["line"]
        assert bad.name not in [line["title"] for line in found["packs"]]
    finally:
        for path in sorted(bad.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        bad.rmdir()


def test_a_damaged_map_leaves_the_others_and_the_page(tmp_path, monkeypatch):
    pack = small_pack(tmp_path / "root", 3, ("gradcam",))
    data = bytearray((pack / MAPS).read_bytes())
    data[-1] ^= 64  # of the last map
    (pack / MAPS).write_bytes(data)
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    app = run()
    assert not app.error
    assert len(cells(app)) == 3
    with pytest.raises(PackError, match="photo-00002"):
        opened_pack("root").explanation(cells(app)[2]["id"])
    assert any("min-max per map" in e.proto.body for e in app.get("html"))


def test_without_a_pack_the_first_run_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    app = run()
    assert app.title[0].value == first_run.AIM
    assert any("xattn explain" in code.value for code in app.code)


def test_maps_of_one_value_on_the_page_are_named_once(tmp_path, monkeypatch):
    found = [explanation(i, source=picture(i)) for i in range(3)]
    found[1] = replace(found[1], map=np.zeros((7, 7)))
    save_pack(tmp_path / "some", found, overlays=False)
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    (said,) = [c.value for c in run().caption if "the same value everywhere" in c.value]
    assert r"Grad\-CAM" in said and r"photo\-00001\.jpg" in said
    assert not [c for c in run(show="photo").caption if "the same value" in c.value]


def test_frames_of_a_clip_are_told_apart_and_found_by_number(tmp_path, monkeypatch):
    video = {**explanation().protocol, "video": {"fps": 10.0, "every": 1, "smoothing": 0.0}}
    found = [
        explanation(
            i, image_id=f"frame-{i:06}", file_name="w.mp4", source=picture(i), protocol=video
        )
        for i in (3, 14)
    ]
    save_pack(tmp_path / "clip", found, overlays=False)
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    names = [cell["lines"][-1] for cell in cells(run())]
    assert names == ["w.mp4, frame 3, 0:00.30", "w.mp4, frame 14, 0:01.40"]
    assert len(cells(run(q="frame 14"))) == 1


def test_pages_of_a_pack_of_many_files_do_without_all_its_ids(tmp_path, monkeypatch):
    million_pack(tmp_path / "pack", 40)
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    monkeypatch.setattr(pack_contents, "Ids", None)
    assert [info.problem for info in state.library().packs()] == [None]
    cell = cells(run(sort="confidence"))[0]

    def photo():
        from xattn.app import state
        from xattn.app.pages.image.page import page

        [info] = state.library().packs()
        page(state.Context(state.library(), state.library().open(info.id)))

    page = opened(photo, image=cell["photo"])
    assert len([c for c in cells(page) if "src" in c]) == 5, "the photo and four maps"
