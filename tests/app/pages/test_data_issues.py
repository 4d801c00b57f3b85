"""The lists of the page Mistakes, for a pack with swapped labels, duplicates and a shortcut."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("streamlit")

from PIL import Image, ImageOps
from streamlit.testing.v1 import AppTest
from synthetic_packs import explanation, picture
from viewer_pages import checked, data

from xattn.app import state
from xattn.app.navigation import chosen
from xattn.app.pages import data_issues
from xattn.app.pages.photomap.data import photos
from xattn.packs.explanation import ImageFacts
from xattn.packs.writer import save_pack

NAMES = ("disc", "square", "bar")
SWAPPED, SHORTCUT = (4, 20, 33), range(0, 36, 3)


def texture(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((96, 72), Image.Resampling.BICUBIC)


def made(number, features=True):
    """One of 62 photos: three labels are swapped, twelve discs have their map in a corner, and the last two
    are photo 1, mirrored, and photo 2, with another label."""
    rng = np.random.default_rng(number)
    of = {60: 1, 61: 2}.get(number, number)
    true, source = of % 3, texture(of)
    label = (true + 1) % 3 if number in (*SWAPPED, 61) else true
    at = (6, 6) if number in SHORTCUT else (3, 3)
    values = 0.1 * rng.random((8, 8)).astype(np.float32)
    values[at[0] : at[0] + 2, at[1] : at[1] + 2] = 1
    row = np.eye(6)[true] * 6 + rng.normal(size=6) * 0.5
    p = np.full(3, 0.05 + 0.01 * rng.random())
    p[true] = 1 - 2 * p[0]
    order = np.argsort(-p)
    top = tuple((int(c), NAMES[c], float(p[c])) for c in order)
    facts = ImageFacts(top, label, NAMES[label], row.astype(np.float16) if features else None)
    if number == 60:
        source = ImageOps.mirror(source)
    one = explanation(number, target=true, source=source)
    return replace(one, map=values, facts=facts, target_name=NAMES[true], metrics={}, curves={})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_pack(root / "planted", [made(i) for i in range(62)], overlays=False)
    blank = [made(i, features=False) for i in range(4)]
    blank = [replace(e, facts=replace(e.facts, label=None, label_name=None)) for e in blank]
    save_pack(root / "unlabelled", blank, overlays=False)
    save_pack(root / "few", [explanation(i, source=picture(i)) for i in range(2)], overlays=False)
    return root


@pytest.fixture
def show(root, monkeypatch, tmp_path):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def show(name, table, **query):
        pack = next(info for info in state.library().packs() if info.name == name)
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update({"pack": pack.id, "table": table, **query})
        return checked(app.run())

    return show


def script():
    from xattn.app import main

    main._run("mistakes")


def ids(app, key):
    return [cell["id"] for cell in data(app, key)["cells"]]


def texts(app):
    return " ".join(m.value.replace("\\", "") for m in (*app.markdown, *app.caption))


def name(number):
    return f"photo-{number:05}"


@pytest.mark.parametrize("by", ["network", "held-out"])
def test_swapped_labels_are_listed_with_the_class_they_should_have(show, by):
    app = show("planted", "Label errors", by=by)
    assert app.selectbox(key="by").value == by
    found = data(app, "issues.labels")["cells"]
    assert {cell["id"] for cell in found} == {name(i) for i in (*SWAPPED, 61)}
    assert "4 labels of 62 are probably wrong" in texts(app)
    for cell in found:
        true = NAMES[{61: 2}.get(int(cell["id"][-2:]), int(cell["id"][-2:])) % 3]
        assert cell["lines"][0].startswith(f"suggested: {true}")


def test_a_last_layer_is_fitted_for_the_classes_that_are_labels_alone(show, root, monkeypatch):
    fitted = []

    def held_out(features, labels, classes):
        fitted.append((classes, labels.max()))
        return real(features, labels, classes)

    real = data_issues.held_out_probabilities
    monkeypatch.setattr(data_issues, "held_out_probabilities", held_out)
    # Class 1 is among the most probable classes of all photos, but no label.
    own = [one for one in map(made, range(60)) if one.facts.label != 1]
    save_pack(root / "two", own, overlays=False)
    app = show("two", "Label errors", by="held-out")
    assert fitted == [(2, 1)]
    suggested = {c["id"]: c["lines"][0] for c in data(app, "issues.labels")["cells"]}
    assert suggested[name(20)] == "suggested: bar"


def test_duplicates_are_shown_by_group_those_with_different_labels_first(show):
    app = show("planted", "Duplicates")
    assert ids(app, "issues.duplicates") == [name(i) for i in (2, 61, 1, 60)]
    assert "2 groups of 4 photos; 1 with different labels" in texts(app)
    lines = [cell["lines"][0] for cell in data(app, "issues.duplicates")["cells"]]
    assert lines == ["group 1: identical"] * 2 + ["group 2: mirrored"] * 2


def test_many_photos_are_compared_only_on_request(show, monkeypatch):
    monkeypatch.setattr(data_issues, "AT_ONCE", 10)
    app = show("planted", "Duplicates")
    assert not [e for e in app.get("bidi_component") if "issues" in e.proto.id]
    checked(app.button(key="issues.search").click().run())
    assert len(ids(app, "issues.duplicates")) == 4


def test_the_shortcut_is_the_first_group_and_is_no_chance(show):
    app = show("planted", "Shortcuts")
    first, second, *_ = data(app, "issues.shortcuts")["cells"]
    assert (
        first["title"] == "Bottom right corner" and first["badge"]["text"] == "Unlikely by chance"
    )
    assert second["badge"] is None
    assert set(ids(app, "issues.group")) == {name(i) for i in SHORTCUT}
    assert "Group 1: bottom right corner" in app.subheader[-1].value.replace("\\", "")
    other = show("planted", "Shortcuts", group="2")
    assert not set(ids(other, "issues.group")) & {name(i) for i in SHORTCUT}
    assert "no such group" in show("planted", "Shortcuts", group="99").warning[0].value


def test_the_last_layer_is_retrained_for_the_group(show):
    app = show("planted", "Shortcuts")
    app.session_state["issues.mend"] = True
    checked(app.run())
    table = app.dataframe[-1].value
    assert list(table["photos of"])[-1] == "all" and table["photos"].iloc[-1] == 62
    assert table["photos"].iloc[:-1].sum() == 62
    assert any("in the group" in text for text in table["photos of"])
    assert "Worst group:" in texts(app)


def test_a_list_becomes_files_and_chosen_photos(show):
    app = show("planted", "Label errors")
    [info] = [info for info in state.library().packs() if info.name == "planted"]
    pack = state.library().open(info.id)
    checked(app.button(key="issues.label-errors choose").click().run())
    assert app.session_state[chosen.HELD].pack == pack.id
    assert set(app.session_state[chosen.HELD].ids) == {name(i) for i in (*SWAPPED, 61)}
    listed = data_issues.PhotoList(
        "x", [4, 20], ("image_id", "label"), [(name(4), "=disc"), (name(20), None)]
    )
    lines = list(csv.reader(io.StringIO(data_issues.csv_text(listed))))
    assert lines == [["image_id", "label"], [name(4), "'=disc"], [name(20), ""]]
    own = photos(pack, "gradcam").loc[[20, 4], "image_id"].tolist()
    assert data_issues.paths(own) == f"{name(20)}\n{name(4)}\n"


def test_without_labels_there_are_duplicates_and_shortcuts_alone(show):
    app = show("unlabelled", "Duplicates")
    assert [tab.label for tab in app.tabs] == ["Duplicates", "Shortcuts"]
    assert "no duplicates" in app.info[0].value
    assert "--labels folders" in app.code[0].value
    show("unlabelled", "Shortcuts")


@pytest.mark.parametrize("table", ["Label errors", "Duplicates", "Shortcuts"])
def test_a_pack_of_two_photos_opens(show, table):
    show("few", table)
