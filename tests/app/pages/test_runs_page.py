"""The page of two runs: its lists, its figures, a photo's two maps, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import CLASSES, described, explanation, picture, small_pack
from viewer_pages import data

from xattn.app import state
from xattn.packs.writer import save_pack

COUNT = 12


def retrained(e):
    """The explanation after a training that made photo 0 right and photo 1 wrong, and moved photo 5's map."""
    number = int(e.image_id[-5:])
    top = e.facts.top[0]
    if number < 2:
        facts = replace(e.facts, label=top[0] if number == 0 else (top[0] + 1) % 10)
        return replace(e, facts=replace(facts, label_name=CLASSES[facts.label]))
    return replace(e, map=np.flip(e.map).copy()) if number == 5 else e


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    before = [explanation(i, m, source=picture(i)) for i in range(COUNT) for m in ("cam", "lime")]
    save_pack(root / "before", before, overlays=False, metrics=described())
    after = [retrained(e) for e in before]
    save_pack(root / "after", after, overlays=False, metrics=described())
    named = [replace(e, image_id=f"fish/{e.image_id}") for e in after]
    save_pack(root / "renamed", named, overlays=False, metrics=described())
    strangers = [
        replace(e, image_id=f"other-{e.image_id}", source=picture(99 + i))
        for i, e in enumerate(before)
    ]
    save_pack(root / "strangers", strangers, overlays=False)
    return root


@pytest.fixture
def show(root, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))

    def show(before="before", after="after", **query):
        ids = {info.name: info.id for info in state.library().packs()}
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update({"pack": ids[before], **query})
        if after is not None:
            app.query_params["other"] = ids.get(after, after)
        app.run()
        assert not app.exception, [e.value for e in app.exception]
        return app

    return show


def script():
    from xattn.app import main

    main._run("runs")


def cells(app, key):
    return data(app, key)["cells"]


def test_the_headline_counts_what_turned(show):
    text = show().markdown[0].value
    assert "1 became right, 1 became wrong" in text and "by +0.0 points" in text


def test_each_list_holds_its_photos_as_pairs(show):
    wrong = cells(show(), "runs.pairs")
    assert [c["id"] for c in wrong] == ["0 photo-00001", "1 photo-00001"]
    assert [c["badge"]["text"] for c in wrong] == ["Right", "Wrong"]
    right = cells(show(list="right"), "runs.pairs")
    assert [c["id"] for c in right] == ["0 photo-00000", "1 photo-00000"]
    moved = cells(show(list="moved"), "runs.pairs")
    assert moved[0]["id"] == "0 photo-00005" and "map moved by" in moved[1]["lines"][-1]


def test_figures_are_paired_and_say_when_nothing_is_told_apart(show):
    table = show().dataframe[0].value
    assert list(table["measure"]) == ["accuracy", "AD@50", "insertion", "ROAD"]
    assert set(table["verdict"]) == {"no clear difference"} and set(table["photos"]) == {COUNT}


def test_a_photo_has_its_two_maps_and_their_difference(show):
    app = show(image="photo-00005", list="moved")
    found = cells(app, "runs.maps.0")
    assert [c["id"] for c in found] == ["photo", "before", "after", "difference"]
    assert found[3]["src"].startswith("data:image/jpeg;base64,")
    assert ["map" in c for c in found] == [
        False,
        True,
        True,
        False,
    ]  # whose values the pointer tells
    assert app.button(key="runs.Previous").disabled and not app.button(key="runs.Next").disabled
    back = app.button(key="runs.all").click().run()
    assert not back.exception and cells(back, "runs.pairs")


def test_two_methods_of_one_pack(show):
    app = show(after="before", by="cam", by2="lime")
    assert "explained by two methods" in app.markdown[0].value
    found = cells(app, "runs.pairs")
    assert [c["lines"][0] for c in found[:2]] == ["CAM", "LIME"]


def test_packs_of_other_photos_are_refused_in_a_sentence(show):
    assert "no photo in common" in show(after="strangers").error[0].value


def test_the_first_pack_with_the_same_photos_is_offered(show):
    app = show("strangers", None)
    assert app.selectbox(key="other").value.startswith("strangers")  # by another method
    assert show("before", None).selectbox(key="other").value.startswith("after")


@pytest.mark.parametrize("query", [{"after": "gone-123"}, {"image": "nobody"}])
def test_what_an_address_names_and_is_not_there_is_said(show, query):
    app = show(**query)
    assert "no longer exists" in app.warning[0].value or "do not both have" in app.warning[0].value
    assert cells(app, "runs.pairs")


def test_photos_of_other_ids_are_joined_by_their_pictures(show):
    app = show(after="renamed", list="moved")
    assert any(f"{COUNT} photos have a different id" in c.value for c in app.caption)
    plain = show(list="moved")
    ours, theirs = (cells(a, "runs.pairs") for a in (plain, app))
    assert [c["id"] for c in ours] == [c["id"] for c in theirs]
    assert all("fish" in c["src"] for c in theirs[1::2]) and "fish" not in theirs[0]["src"]
    maps = cells(show(after="renamed", image="photo-00005", list="moved"), "runs.maps.0")
    assert [c["id"] for c in maps] == ["photo", "before", "after", "difference"]
    assert "fish" in maps[2]["href"] and "fish" not in maps[1]["href"]


def test_the_pack_with_most_of_the_photos_and_a_method_of_both_come_first(tmp_path, monkeypatch):
    """Its maps of a class that only one of the two explains, such as one that is newly predicted, are shown."""
    own = [explanation(i, m, source=picture(i)) for i in range(4) for m in ("cam", "lime")]
    theirs = [replace(e, target=7, target_name="tree frog") for e in own if e.method == "lime"]
    for name, made in (("a", own[:2]), ("b", theirs[:3]), ("c", theirs[:1]), ("open", own)):
        save_pack(tmp_path / name, made, overlays=False)
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    [pack] = [info.id for info in state.library().packs() if info.name == "open"]
    app = AppTest.from_function(script, default_timeout=600)
    app.query_params.update({"pack": pack, "image": "photo-00001"})
    app.run()
    assert not app.exception and app.selectbox(key="other").value.startswith("b")
    assert app.selectbox(key="by").value == "lime"
    [_, before, after] = cells(app, "runs.maps.0")
    assert before["lines"] == ["open", "LIME"] and after["title"].startswith("tree frog")


def test_a_pack_alone_shows_the_command_that_makes_another(tmp_path, monkeypatch):
    small_pack(tmp_path / "only", 2, ("gradcam",))
    monkeypatch.setattr(state, "_settings", state.Settings(root=tmp_path))
    app = AppTest.from_function(script, default_timeout=600).run()
    assert not app.exception and "xattn explain" in app.code[0].value
