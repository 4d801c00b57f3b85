"""The page of mistakes: its matrix, a cell's photos, and a mistake on the image page."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import CLASSES, described, explanation, picture, small_pack
from viewer_pages import data

from xattn.app import state
from xattn.packs.writer import save_pack


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Forty photos of ten classes, a quarter of them wrong; two photos without a true class; and a mistake
    whose true class is explained, too."""
    root = tmp_path_factory.mktemp("root")
    small_pack(root / "labelled", 40, ("gradcam", "saliency", "random"))
    blank = [explanation(i, source=picture(i)) for i in range(2)]
    blank = [replace(e, facts=replace(e.facts, label=None, label_name=None)) for e in blank]
    save_pack(root / "unknown", blank, overlays=False)
    both = [explanation(0, m, target=t, source=picture(0)) for m in ("a", "b") for t in (0, 1)]
    save_pack(root / "both", both, overlays=False, metrics=described())
    return root


@pytest.fixture
def show(root, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))

    def show(name, page="mistakes", **query):
        pack = next(info for info in state.library().packs() if info.name == name)
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update({"pack": pack.id, "shown": page, **query})
        app.run()
        assert not app.exception, [e.value for e in app.exception]
        return app

    return show


def script():
    import streamlit as st

    from xattn.app import main

    main._run(st.query_params["shown"])


def matrix(app):
    found = data(app, "mistakes.matrix")
    return {c["id"]: c for row in found["rows"] for c in row["cells"] if c}, found


def test_the_matrix_counts_every_photo_once_and_wrong_cells_are_marked(show):
    cells, found = matrix(show("labelled"))
    assert sum(int(c["text"]) for c in cells.values()) == 40
    assert len(found["columns"]) == len(found["rows"]) == len(CLASSES)
    for name, cell in cells.items():
        true, predicted = name.split(".")
        assert cell["kind"] == ("right" if true == predicted else "wrong")
    assert sum(int(c["text"]) for c in cells.values() if c["kind"] == "wrong") == 10


def test_the_headline_is_the_accuracy_with_its_interval(show):
    text = show("labelled").markdown[0].value
    assert text.startswith(
        "**75.0%** of 40 photos are classified correctly (95 % interval 59.8% to 85.8%)"
    )


def test_without_a_choice_the_commonest_mistake_is_shown(show):
    cells, _ = matrix(show("labelled"))
    [chosen] = [c for c in cells.values() if c["selected"]]
    most = max(int(c["text"]) for c in cells.values() if c["kind"] == "wrong")
    assert chosen["kind"] == "wrong" and int(chosen["text"]) == most


def test_a_cell_has_its_mean_map_and_its_photos_which_lead_to_their_pages(show):
    app = show("labelled", cell="1.0")  # true class 1 predicted as 0
    mean, *photos = data(app, "mistakes.cells")["cells"]
    assert mean["title"] == "Mean map" and mean["src"].startswith("data:image/jpeg;base64,")
    assert [photo["id"] for photo in photos] == ["photo-00000", "photo-00020"]
    assert all(re.search(r"/image\?.*image=photo-000", photo["href"]) for photo in photos)
    assert "great white shark predicted as tench" in app.subheader[0].value


def test_a_cell_that_the_pack_lacks_is_said(show):
    app = show("labelled", cell="1.9")
    assert "no such cell" in app.warning[0].value and data(app, "mistakes.cells")["cells"]


def test_a_class_has_a_row(show):
    table = show("labelled").dataframe[0].value
    assert len(table) == len(CLASSES) and table["photos"].sum() == 40
    assert {"AD@50", "insertion", "ROAD"} <= set(table.columns)


def test_sanity_rows_are_not_among_the_methods(show):
    assert show("labelled").selectbox(key="method").options == ["Grad-CAM", "Saliency"]


def test_without_true_classes_the_command_that_adds_them_is_shown(show):
    app = show("unknown")
    assert "--labels folders" in app.code[0].value
    assert not [e for e in app.get("bidi_component") if "mistakes" in e.proto.id]


def test_a_wrong_photo_has_its_verdict_as_headline_and_both_maps(show):
    app = show("both", "image", image="photo-00000")
    assert re.match(r"tench \d\d\\\.\d%, true\\: great white shark \d", app.subheader[0].value)
    cells = data(app, "maps")["cells"]
    titles = [c["title"].partition(":")[0] for c in cells]
    assert titles == ["Photo", "Predicted", "a", "b", "True", "a", "b"]


def test_a_right_photo_has_one_row_of_maps(show):
    app = show("labelled", "image", image="photo-00001")
    assert not app.subheader
    assert any("the prediction is right" in caption.value for caption in app.caption)
    cells = data(app, "maps")["cells"]
    assert len(cells) == 4 and cells[1]["title"].startswith("Predicted, true: ")
