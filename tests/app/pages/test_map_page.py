"""The page Map: its points and their colours, what is chosen, the groups, and more like one photo."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("streamlit")

from corner_photos import COUNT, photo
from streamlit.testing.v1 import AppTest
from synthetic_packs import CLASSES, described, small_pack

from xattn.app import state
from xattn.app.navigation import chosen
from xattn.app.pages.photomap import data, page
from xattn.eval.report.photo_map import pooled_maps
from xattn.packs.explanation import ImageFacts
from xattn.packs.writer import save_pack

CACHES = (data.photos, data.pooled_maps, data._features, data._toward, data.project_photos)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_pack(root / "whole", map(photo, range(COUNT)), overlays=False, metrics=described())
    without = [photo(i, features=False) for i in range(COUNT)]
    save_pack(root / "no-features", without, overlays=False)
    small_pack(root / "one", 1)
    blank = [replace(photo(i, False), map=np.ones((5, 5))) for i in range(4)]
    save_pack(root / "blank", blank, overlays=False)
    few = [
        replace(photo(i), facts=replace(photo(i).facts, label=None, label_name=None))
        for i in range(4)
    ]
    sizes = [replace(e, map=np.kron(e.map, np.ones((i + 1, 2 * i + 1)))) for i, e in enumerate(few)]
    save_pack(root / "unlabelled", sizes, overlays=False)
    return root


@pytest.fixture
def show(root, monkeypatch, tmp_path):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def show(name, page="photomap", session=(), **query):
        pack = next(info for info in state.library().packs() if info.name == name)
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update({"pack": pack.id, "shown": page, **query})
        for key, value in dict(session).items():
            app.session_state[key] = value
        app.run()
        assert not app.exception, [e.value for e in app.exception]
        return app

    return show


def script():
    import streamlit as st

    from xattn.app import main

    main._run(st.query_params["shown"])


def component(app, key):
    """What the component with this key was given."""
    [element] = [e for e in app.get("bidi_component") if e.proto.id.endswith(f"-{key}")]
    return json.loads(element.proto.json)


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed), "<u2")


def text_of(app):
    parts = [*app.caption, *app.markdown, *app.info, *app.warning, *app.code]
    return "\n".join(part.value.replace("\\", "") for part in parts)


def test_every_photo_is_a_point_in_the_colour_of_its_class(show):
    app = show("whole")
    found = component(app, "photomap.points")
    assert len(found["ids"]) == len(numbers(found["x"])) == COUNT
    counts = np.bincount(numbers(found["groups"]))
    pack = state.library().open(app.query_params["pack"])
    names = [CLASSES[i].split(",")[0] for i in range(4)]
    assert {g["name"] for g in found["legend"]} == set(names) and counts.sum() == COUNT
    for i, image_id in enumerate(found["ids"]):
        group = found["legend"][numbers(found["groups"])[i]]["name"]
        assert pack.images.loc[image_id, "predicted_name"].startswith(group)
    assert found["picture"].endswith("&image=")


def test_right_and_wrong_and_measures_are_colours_too(show):
    found = component(show("whole", colour="right"), "photomap.points")
    assert [g["name"] for g in found["legend"]] == ["right", "wrong"]
    assert np.bincount(numbers(found["groups"])).tolist() == [38, 10]
    found = component(show("whole", colour="confidence"), "photomap.points")
    assert found["scale"] == {"name": "Confidence", "low": "50%", "high": "74%"}
    levels = numbers(found["values"])
    assert np.argmax(levels) == COUNT - 1 and levels.min() == 1 and levels.max() == 65535
    assert "values" in component(show("whole", colour="measure:AD@50"), "photomap.points")


def test_the_address_restores_the_view_and_what_it_cannot_use_leaves_the_defaults(
    show, monkeypatch
):
    asked = []
    monkeypatch.setattr(data, "project", lambda rows, how: asked.append(how) or rows[:, :2])
    monkeypatch.setattr(page, "available_methods", lambda count: ["pca", "umap"])
    app = show("whole", near="maps", projection="umap", colour="label")
    chosen = {box.label: box.value for box in app.selectbox}
    found = chosen["Similar by"], chosen["Projection"], chosen["Colour"]
    assert found == ("maps", "umap", "label") and asked == ["umap"]
    app = show("whole", near="<b>", projection="tsne", colour="x" * 300)
    chosen = {box.label: box.value for box in app.selectbox}
    assert (chosen["Similar by"], chosen["Projection"], chosen["Colour"]) == (
        "features",
        "pca",
        "predicted",
    )


def test_near_photos_are_of_one_class_by_features(show):
    found = component(show("whole", colour="label"), "photomap.points")
    at = np.stack([numbers(found["x"]), numbers(found["y"])], 1).astype(float)
    group = numbers(found["groups"])
    own = np.mean([at[group == g].std(0).mean() for g in range(4)])
    assert own < 0.7 * at.std(0).mean()


def test_chosen_photos_are_told_and_shown_page_by_page(show):
    pack = next(info.id for info in state.library().packs() if info.name == "whole")
    pack = state.library().open(pack)
    held = {chosen.HELD: chosen.ChosenPhotos(pack.id, [f"photo-{i:05}" for i in range(30)])}
    app = show("whole", session=held)
    assert "30 photos" in text_of(app) and "classified correctly (95 % interval" in text_of(app)
    cells = component(app, "photomap.photos")["cells"]
    assert [c["id"] for c in cells] == list(pack.images.index[:24])
    assert "image?" in cells[0]["href"] and {c["badge"]["text"] for c in cells} == {
        "Right",
        "Wrong",
    }
    assert component(app, "photomap.points")["chosen"] == list(range(30))
    app.button(key="photomap.photos.Next").click().run()
    assert len(component(app, "photomap.photos")["cells"]) == 6
    assert "25 to 30 of 30" in text_of(app)
    one = show("whole", session={chosen.HELD: chosen.ChosenPhotos(pack.id, ["photo-00003"])})
    assert any(b.label == "More like this" for b in one.button)
    by_maps = show("whole", near="maps", session=held)
    assert len(component(by_maps, "photomap.points")["chosen"]) == 30


def test_the_group_in_the_corner_comes_first_and_leads_to_its_photos(show):
    app = show("whole", part="Groups")
    cards = component(app, "photomap.groups")["cells"]
    assert cards[0]["title"] == "Bottom right corner" and cards[0]["selected"]
    assert cards[0]["src"].startswith("data:image/jpeg;base64,")
    assert "group=2" in cards[1]["href"]
    shown = {c["id"] for c in component(app, "photomap.group")["cells"]}
    marked = {f"photo-{i:05}" for i in range(COUNT) if i % 8 == 4}
    assert len(shown & marked) >= 4 and shown <= marked
    other = show("whole", part="Groups", group="2")
    assert component(other, "photomap.groups")["cells"][1]["selected"]
    assert "There is no such group" in text_of(show("whole", part="Groups", group="../99"))


def test_a_pack_without_features_says_the_command_that_adds_them(show):
    app = show("no-features")
    assert "--features --output" in text_of(app)
    assert len(component(app, "photomap.points")["ids"]) == COUNT
    app = show("no-features", page="image", image="photo-00004", tab="Similar")
    assert "xattn explain PHOTOS --features" in text_of(app)


def test_one_photo_and_blank_maps_are_said(show):
    assert "This pack has one photo; a map needs at least 3" in text_of(show("one"))
    assert "All maps by Grad-CAM are constant" in text_of(show("blank"))
    assert "There are no groups" in text_of(show("blank", part="Groups"))
    app = show("one", page="image", image="photo-00000", tab="Similar")
    assert "No photo is similar to this one: there is no other photo." in text_of(app)
    app = show("blank", page="image", image="photo-00000", tab="Similar")
    assert "its map is constant" in text_of(app)


def test_photos_without_a_true_class_and_maps_of_many_sizes_have_their_points(show):
    app = show("unlabelled", near="maps")
    assert "right" not in app.selectbox(key="colour").options
    assert len(component(app, "photomap.points")["ids"]) == 4


def test_more_like_this_by_features_and_by_maps(show):
    app = show("whole", page="image", image="photo-00004", tab="Similar")
    cells = component(app, "similar")["cells"]
    assert len(cells) == 24 and "photo-00004" not in {c["id"] for c in cells}
    assert all(int(c["id"][-2:]) % 4 == 0 for c in cells[:11])
    distances = [float(c["lines"][0].removeprefix("distance ")) for c in cells]
    assert distances == sorted(distances)
    app = show("whole", page="image", image="photo-00004", tab="Similar", near="maps")
    nearest = [int(c["id"][-2:]) for c in component(app, "similar")["cells"][:2]]
    assert all(number % 8 == 4 for number in nearest)


def test_of_many_photos_a_sample_is_shown_and_said_and_others_have_neighbours_too(
    show, monkeypatch
):
    monkeypatch.setattr(data, "MOST_PHOTOS", 20)
    real = pooled_maps.sample
    monkeypatch.setattr(data, "sample", lambda photos: real(photos, 20))
    for cached in CACHES:
        cached.clear()
    app = show("whole")
    assert f"The map shows a random sample of 20 of {COUNT} photos." in text_of(app)
    inside = component(app, "photomap.points")["ids"]
    outside = next(f"photo-{i:05}" for i in range(COUNT) if f"photo-{i:05}" not in inside)
    for near in ("features", "maps"):
        app = show("whole", page="image", image=outside, tab="Similar", near=near)
        assert {c["id"] for c in component(app, "similar")["cells"]} <= set(inside)
        assert "Compared with a random sample of 20 photos." in text_of(app)
    for cached in CACHES:
        cached.clear()


def test_a_pack_without_classes_and_measures_has_points_of_one_colour(show, root):
    about = {"protocol": {"probability": "value", "classes": "named"}, "metrics": {}}
    bare = [replace(photo(i), facts=ImageFacts(), **about) for i in range(6)]
    save_pack(root / "bare", bare, overlays=False)
    found = component(show("bare"), "photomap.points")
    assert [g["name"] for g in found["legend"]] == ["photos"] and len(found["ids"]) == 6
