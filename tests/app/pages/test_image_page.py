"""The image page: what a URL shows, what its widgets change, and what it says of bad input."""

import html
import json
import re
import subprocess
import sys
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest

pytest.importorskip("streamlit")

from synthetic_packs import CLASSES, described, explanation, picture, small_pack
from viewer_pages import checked, data

from xattn.app import state
from xattn.app.library import Library
from xattn.packs.contained_files import PackError
from xattn.packs.format import MAPS
from xattn.packs.writer import save_pack

AppTest = pytest.importorskip("streamlit.testing.v1").AppTest
METHODS = ("gradcam", "saliency", "lrp", "random")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pack of three photos, four methods and two classes each; one photo has no LRP."""
    folder = tmp_path_factory.mktemp("root")
    found = [
        explanation(
            i,
            method,
            target=(i + c) % len(CLASSES),
            signed=method == "lrp",
            source=picture(i),
            file_name="<b>*bold*</b> $x$.jpg" if i == 1 else f"photo-{i}.jpg",
        )
        for i in range(3)
        for method in METHODS
        for c in range(2)
        if (i, method, c) != (0, "lrp", 1)
    ]
    save_pack(folder / "rich", found, overlays=False, metrics=described())
    plain = [explanation(i, metrics={}, curves={}, source=picture(i)) for i in range(2)]
    save_pack(folder / "plain", plain, overlays=False)
    return folder


@pytest.fixture
def pack(root):
    return opened(root, "rich")


def opened(root, name):
    library = Library(root)
    return next(library.open(p.id) for p in library.packs() if p.name == name)


@pytest.fixture
def show(root, monkeypatch):
    """``show(pack, **query)`` -> the page that this URL shows, without an exception."""
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))

    def show(pack, **query):
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update({"pack": pack.id, **query})
        return checked(app.run())

    return show


def script():
    import streamlit as st

    from xattn.app import state
    from xattn.app.pages.image import page as image
    from xattn.app.state import Context

    library = state.library()
    pack = library.open(st.query_params["pack"])
    image.page(Context(library, pack, st.query_params.to_dict()))


def cells(app, key="maps"):
    """The pictures of a grid."""
    return [cell for cell in data(app, key)["cells"] if "src" in cell]


def words(app):
    """What stands between the maps: the headings of rows, and the places of missing maps."""
    return [cell["title"] for cell in data(app, "maps")["cells"] if "src" not in cell]


def texts(app):
    return "\n".join(e.value for kind in ("caption", "info", "warning") for e in getattr(app, kind))


def query(cell):
    return {k: v[0] for k, v in parse_qs(urlparse(cell["src"]).query).items()}


# ---------------------------------------------------------------------- maps


def test_without_an_image_the_first_one_is_shown_with_all_methods_but_sanity_rows(show, pack):
    app = show(pack)
    predicted, true = ["Grad-CAM", "Saliency", "LRP"], ["Grad-CAM", "Saliency"]  # it is a mistake
    assert [c["title"] for c in cells(app)] == ["Photo", *predicted, *true]
    assert query(cells(app)[0])["image"] == "photo-00000"
    assert all(c["alt"] for c in cells(app))
    assert cells(app)[1]["selected"] and not cells(app)[2]["selected"]
    first, second, missing = words(app)
    assert first.startswith("Predicted: tench") and second.startswith("True: great white shark")
    assert missing == "LRP: no map of this class"
    assert data(app, "maps")["columns"] == 4 and data(app, "maps")["rows"] == 2
    assert cells(app)[0]["span"] == 4


def test_a_damaged_map_leaves_the_other_maps_of_its_photo(show, root):
    folder = small_pack(root / "damaged", 1, ("gradcam", "saliency"))
    data = bytearray((folder / MAPS).read_bytes())
    data[-1] ^= 64  # of the last map
    (folder / MAPS).write_bytes(data)
    pack = opened(root, "damaged")
    bad = "photo-00000@0.saliency"
    with pytest.raises(PackError, match="damaged"):
        pack.explanation(bad)
    for tab in ("Classes", "Before and after", "Provenance"):
        app = show(pack, entry=bad, tab=tab)
        assert not app.error
        assert [c["title"] for c in cells(app)] == ["Photo", "Grad-CAM", "Saliency"]


def test_each_kind_of_map_has_a_legend(show, pack):
    bodies = [e.proto.body for e in show(pack).get("html")]
    legends = [body for body in bodies if 'class="legend"' in body]
    assert "min-max per map" in legends[0] and "blue against it" in legends[0]


def test_the_url_chooses_photo_methods_class_and_look(show, pack):
    app = show(
        pack,
        image="photo-00002",
        methods=["lrp", "random"],
        opacity="0.3",
        threshold="0.2",
        colours="Viridis",
        **{"class": "3"},
    )
    found = cells(app)
    assert {c["title"] for c in found[1:]} == {"LRP", "Random"}
    assert "photo-00002@3.lrp" in [query(c)["entry"] for c in found[1:]]
    assert {query(c)["opacity"] for c in found[1:]} == {"0.3"}
    assert {query(c)["cmap"] for c in found[1:]} == {"viridis"}


def test_a_map_of_the_url_brings_its_class(show, pack):
    app = show(pack, image="photo-00002", entry="photo-00002@3.saliency")
    chosen = [c["id"] for c in cells(app) if c.get("selected")]
    assert chosen == ["photo-00002@3.saliency"]


def test_a_shared_scale_spans_what_is_shown(show, pack):
    app = show(pack, methods=["gradcam", "saliency"], scale="Shared")
    own = pack.entries.loc[["photo-00000@0.gradcam", "photo-00000@0.saliency"]]
    assert len(cells(app)) == 5
    for cell in cells(app)[1:]:
        assert float(query(cell)["low"]) == own["min"].min()
        assert float(query(cell)["high"]) == own["max"].max()


def test_a_spiky_map_says_that_it_is_clipped(show, root):
    spiky = np.zeros((20, 20), np.float32)
    spiky[2:8], spiky[5, 5] = 0.1, 9.0
    found = [explanation(0, source=picture(0)), explanation(0, "lrp", source=picture(0), map=spiky)]
    save_pack(root / "spiky", found, overlays=False)
    pack = opened(root, "spiky")
    clipped = [", clipped" in "".join(c["lines"]) for c in cells(show(pack))[1:]]
    assert clipped == [False, True]
    assert not any(
        "clipped" in "".join(c["lines"]) for c in cells(show(pack, scale="Min to max"))[1:]
    )


def test_a_method_without_a_map_of_the_class_is_named(show, pack):
    app = show(pack, **{"class": "1"})
    assert [c["id"] for c in cells(app)[1:] if c.get("selected")] == ["photo-00000@1.gradcam"]
    assert words(app)[-1] == "LRP: no map of this class"
    assert "Choose another class or method" in texts(show(pack, methods="lrp", **{"class": "1"}))


def test_no_method_at_all_says_what_to_do(show, pack):
    app = show(pack)
    app.multiselect(key="methods").set_value([])
    assert "No method is chosen" in texts(checked(app.run()))


def test_another_class_is_written_into_the_url(show, pack):
    app = show(pack)
    app.selectbox(key="class of photo-00000").set_value(1)
    checked(app.run())
    assert app.query_params["class"] == "1"
    assert [c["id"] for c in cells(app) if c.get("selected")] == ["photo-00000@1.gradcam"]


# ---------------------------------------------------------------------- going on


def test_next_and_previous_follow_the_gallery(show, pack):
    app = show(pack, image="photo-00001", view="order=desc", entry="photo-00001@1.lrp")
    assert "2 of 3" in texts(app)
    app.button(key="go_Next").click()
    checked(app.run())
    assert app.query_params["image"] == "photo-00000" and "entry" not in app.query_params
    assert query(cells(app)[0])["image"] == "photo-00000"
    assert app.button(key="go_Next").disabled and not app.button(key="go_Previous").disabled


def test_the_gallerys_method_is_in_focus(show, pack):
    app = show(pack, image="photo-00001", view="method=saliency")
    assert [c["title"] for c in cells(app) if c.get("selected")] == ["Saliency"]


def test_a_photo_outside_the_gallerys_selection_says_so(show, pack):
    app = show(pack, image="photo-00001", view="q=photo-2.jpg")
    assert "not in the gallery's selection" in texts(app)
    assert app.button(key="go_Next").disabled and app.button(key="go_Previous").disabled


def test_an_image_opened_elsewhere_keeps_the_gallerys_filters(show, pack):
    app = AppTest.from_function(script, default_timeout=600)
    app.session_state["_last_view"] = (pack.id, "q=photo-2")
    app.query_params.update({"pack": pack.id, "image": "photo-00002", "entry": "from a dot"})
    assert "1 of 1" in texts(checked(app.run()))
    assert app.session_state["_last_view"] == (pack.id, "q=photo-2")
    app.query_params["view"] = "q=photo"
    assert "not in" not in texts(checked(app.run()))
    assert app.session_state["_last_view"] == (pack.id, "q=photo")


def test_the_shared_address_has_the_whole_view(show, pack):
    app = show(pack, image="photo-00001", opacity="0.3", tab="Export", view="order=desc")
    address = parse_qs(urlparse(app.code[0].value).query)
    assert address == {
        "pack": [pack.id],
        "image": ["photo-00001"],
        "opacity": ["0.3"],
        "tab": ["Export"],
        "view": ["order=desc"],
    }


# ---------------------------------------------------------------------- tabs


def test_classes_show_the_first_of_the_classifier_and_those_without_a_map(show, pack):
    app = show(pack, methods="lrp")
    found = cells(app, "classes")
    assert [c["title"] for c in found] == ["tench", "great white shark"]
    assert found[0]["selected"] and "no map" in found[1]["lines"]
    assert "image" in query(found[1]), "the photo stands in"


def test_the_contrast_says_of_what_it_is_the_difference(show, pack):
    app = show(pack)
    cell = cells(app, "contrast")[0]
    assert cell["title"] == "tench minus great white shark"
    assert query(cell)["minus"] == "photo-00000@1.gradcam" and "scale" not in query(cell)
    assert "difference of the min-maxed maps" in app.get("html")[-1].proto.body
    app = show(pack, contrast_of="Raw scores")
    assert query(cells(app, "contrast")[0])["scale"] == "shared"
    assert "difference of the scores" in app.get("html")[-1].proto.body


def test_the_slider_compares_with_the_photo_or_another_map(show, pack):
    app = show(pack, tab="Before and after")
    assert data(app, "slide")["before"]["name"] == "Photo"
    app.selectbox(key="against of photo-00000@0.gradcam").set_value("photo-00000@0.lrp")
    checked(app.run())
    assert app.query_params["against"] == "photo-00000@0.lrp"
    slider = data(app, "slide")
    assert (slider["before"]["name"], slider["after"]["name"]) == ("LRP", "Grad-CAM")
    assert slider["label"] and slider["alt"]


def test_figures_come_with_direction_formula_protocol_and_curves(show, pack):
    app = show(pack, tab="Fidelity")
    table = app.dataframe[0].value
    assert list(table.index) == ["Grad-CAM", "Saliency", "LRP"]
    assert list(table) == ["AD@50", "insertion", "ROAD"]
    written = "\n".join(e.value for e in app.text)
    assert "AD@50: average drop, top half. How much confidence is lost" in written
    assert "Lower is better." in written and "protocol ROAD-made-up" in written
    assert [json.loads(c.proto.spec)["title"] for c in app.get("vega_lite_chart")] == [
        "Deletion, most relevant pixels first",
        "Insertion, most relevant pixels first",
    ]


def test_a_pack_without_figures_says_who_writes_them(show, root):
    app = show(opened(root, "plain"), tab="Fidelity")
    assert "xattn compare" in texts(app)


def test_provenance_has_hashes_and_protocols(show, pack):
    app = show(pack, tab="Provenance")
    body = app.get("html")[-1].proto.body
    found = pack.provenance("photo-00000@0.gradcam")
    assert found["sha256"]["map"] in body and "0" * 64 in body and "ROAD-made-up" in body
    assert json.loads(app.json[0].value)["method"] == "gradcam"


def test_export_offers_the_figure_the_report_and_the_figures(show, pack):
    app = show(pack, tab="Export")
    assert [b.proto.label for b in app.get("download_button")] == [
        "Figure, PNG",
        "Figure, SVG",
        "Report, HTML",
        "Figures of this photo, CSV",
    ]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"image": "../../etc/passwd"},
        {"image": "", "entry": "<script>", "class": "-1", "minus": "none", "methods": ""},
        {"methods": ["none", "gradcam"], "opacity": "nan", "threshold": "-inf", "tab": "None"},
        {"opacity": "7", "scale": "x", "colours": "jet", "contrast_of": "?"},
        {"view": "sort=none&page=-1&low=x&q=" + "a" * 5000},
    ],
)
def test_a_bad_url_shows_a_page_or_a_message(show, pack, bad):
    app = show(pack, **bad)
    assert texts(app) or cells(app)


def test_an_unknown_image_leads_to_the_gallery(show, pack):
    app = show(pack, image="none")
    assert "no such image" in texts(app)
    assert not [e for e in app.get("bidi_component") if "maps" in e.proto.id]


def test_names_are_shown_as_text(show, pack):
    app = show(pack, image="photo-00001")
    [title] = [e.proto.body for e in app.get("html") if e.proto.body.startswith("<h1")]
    text = html.unescape(re.sub("<[^>]*>", "", title))
    assert text == "<b>*bold*</b> $x$.jpg".rpartition("/")[2]
    assert all("<b>" not in e.proto.body for e in app.get("html"))


def test_a_pack_whose_pictures_are_gone_still_shows_its_page(show, root, tmp_path):
    bare = save_pack(tmp_path / "bare", [explanation(0)], overlays=False)
    library = Library(bare)
    pack = library.open(library.packs()[0].id)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "library", lambda: library)
        assert len(cells(show(pack))) == 2


def test_a_map_of_one_value_is_named_once_on_its_page(root, show):
    found = [
        explanation(0, m, source=picture(0), **({"map": np.zeros((7, 7))} if m == "lrp" else {}))
        for m in METHODS[:3]
    ]
    save_pack(root / "blank", found, overlays=False)
    page = show(opened(root, "blank"), image="photo-00000")
    (warning,) = page.warning
    assert (
        "by LRP of tench on" in warning.value and "has the same value everywhere" in warning.value
    )


def test_the_page_is_imported_without_torch():
    """The first visit would wait for it."""
    code = "import sys, xattn.app.pages.image.page; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
