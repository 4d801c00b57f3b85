"""How the gallery and the page of an image draw maps: the crop, the styles, and one control for both."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import small_pack

from xattn.app import state
from xattn.app.triage import selection


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    small_pack(root / "pack", 6, ("gradcam", "saliency"))
    return root


@pytest.fixture(autouse=True)
def started(root, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))


def run(page="gallery", **params):
    app = AppTest.from_file(state.SCRIPT, default_timeout=600)
    app.query_params.update(params)
    if page != "gallery":
        app.switch_page(page)
    app.run()
    assert not app.exception
    return app


def grid(app):
    """What the first grid was given."""
    (first, *_) = [e for e in app.get("bidi_component") if "cells" in e.proto.json]
    return json.loads(first.proto.json)


def query(url):
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


def test_cells_are_the_models_crop_and_the_photo_has_the_same():
    shown = grid(run())
    assert shown["aspect"] == 1 and shown["cover"]
    for cell in shown["cells"]:
        assert query(cell["src"])["crop"] == "1"
        assert query(cell["bare"])["crop"] == cell["id"]


def test_the_whole_photo_is_one_choice_away_and_in_the_url():
    app = run()
    app.button_group(key="gallery.part").set_value("whole").run()
    assert app.query_params["part"] == "whole"
    shown = grid(run(part="whole"))
    assert shown == grid(app) and not shown["cover"]
    assert "crop" not in query(shown["cells"][0]["src"]) | query(shown["cells"][0]["bare"])


@pytest.mark.parametrize("style", ["outline", "spotlight"])
def test_a_style_is_in_the_url_and_in_the_legend(style):
    app = run(show=style)
    assert {query(cell["src"])["style"] for cell in grid(app)["cells"]} == {style}
    words = {"outline": "holds half of the map", "spotlight": "brightness: relevance"}
    assert any(words[style] in html.proto.body for html in app.get("html"))


def test_photos_alone_have_no_map_no_legend_and_nothing_to_point_at():
    app = run(show="photo")
    for cell in grid(app)["cells"]:
        assert "/xattn/picture" in cell["src"] and cell["bare"] is None
    assert not any('class="legend"' in html.proto.body for html in app.get("html"))


def test_a_shared_scale_is_that_of_the_maps_on_the_page(root):
    app = run(scale="shared", colours="viridis")
    found = {(q["low"], q["high"]) for c in grid(app)["cells"] if (q := query(c["src"]))}
    pack = state.library().open(state.library().packs()[0].id)
    rows = pack.entries[pack.entries["method"] == "gradcam"]
    assert found == {(repr(float(rows["min"].min())), repr(float(rows["max"].max())))}
    assert {query(c["src"])["cmap"] for c in grid(app)["cells"]} == {"viridis"}


def test_maps_can_be_clipped(root):
    assert {query(c["src"])["scale"] for c in grid(run(scale="clip"))["cells"]} == {"clip"}
    assert "scale" not in query(grid(run())["cells"][0]["src"])


def test_what_a_style_does_not_use_cannot_be_chosen():
    app = run(show="outline")
    assert app.selectbox(key="gallery.colours").disabled
    assert not run().selectbox(key="gallery.colours").disabled


@pytest.mark.parametrize("name, value", [("show", "glow"), ("part", "half"), ("colours", "jet")])
def test_a_look_that_is_not_there_is_said(name, value):
    (said,) = run(**{name: value}).warning
    assert value in said.value


def test_metrics_and_methods_are_named_in_plain_words():
    app = run(sort="AD@50")
    assert "AD@50: average drop, top half" in app.selectbox(key="gallery.sort").options
    assert app.selectbox(key="gallery.method").options[0] == "Grad-CAM"
    pack = state.library().open(state.library().packs()[0].id)
    measures = selection.table(pack).choices.measures
    assert measures["AD@50"].about.startswith("How much confidence is lost when only the top half")
    assert measures["confidence"].about == "" and measures["confidence"].title == "Confidence"
