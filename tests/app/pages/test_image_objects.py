"""Annotated objects on the image page: outlines, their switch, figures beside the maps, bad files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("streamlit")

from streamlit.testing.v1 import AppTest
from synthetic_packs import CLASSES, VIEW, explanation, picture, small_pack

from xattn.app import state
from xattn.app.pages.image.objects import mask_outlines
from xattn.eval.annotations import annotations_of_classes
from xattn.eval.functional import saliency
from xattn.eval.metrics.localization import energy_pointing_values
from xattn.packs.writer import save_pack

HEIGHT, WIDTH = VIEW.photo_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two photos with a mask each, of tench (0) and a hen (2), one with a damaged mask, one without any."""
    folder = tmp_path_factory.mktemp("objects")
    small_pack(folder / "root" / "pack", 4, ("gradcam", "saliency"))
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[20:60, 40:80] = 5
    ids[70:80, 90:100] = 6
    masks = folder / "data" / "masks"
    masks.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(ids).save(masks / f"photo-{i:05}.png")
    (masks / "photo-00002.png").write_bytes(b"no picture")
    (folder / "data" / "classes.yaml").write_text(
        f"classes: {{5: '{CLASSES[0]}', 6: {CLASSES[2]}}}\n"
    )
    return folder


@pytest.fixture
def show(folder, monkeypatch):
    def show(annotations="data", **query):
        path = None if annotations is None else folder / annotations
        own = state.Settings(root=folder / "root", annotations=path)
        monkeypatch.setattr(state, "_settings", own)
        app = AppTest.from_function(script, default_timeout=600)
        app.query_params.update(query)
        app.run()
        assert not app.exception, [e.value for e in app.exception]
        return app

    return show


def script():
    from xattn.app import main

    main._run("image")


def maps(app):
    [element] = [e for e in app.get("bidi_component") if e.proto.id.endswith("-maps")]
    return json.loads(element.proto.json)


def pictures(found):
    """The cells that show a map, without the photo and the headings of classes."""
    return [cell for cell in found["cells"] if "lines" in cell]


def corners(outline):
    points = np.array(outline["points"]) * [WIDTH, HEIGHT]
    return [*points.min(0), *points.max(0)]


def test_outlines_lie_on_the_objects_and_say_which_is_of_the_class(show):
    app = show(image="photo-00000")
    own, other = maps(app)["linked"]["outlines"]
    assert corners(own) == pytest.approx([40, 20, 80, 60], abs=0.5) and own["own"]
    assert corners(other) == pytest.approx([90, 70, 100, 80], abs=0.5) and not other["own"]
    said = " ".join(c.value for c in app.caption).replace("\\", "")
    assert "annotated: tench, Tinca tinca, hen; thick: objects of the explained class" in said


def test_the_switch_hides_the_outlines_and_keeps_the_figures(show):
    app = show(image="photo-00000")
    before = maps(app)
    app.toggle(key="objects").set_value(False).run()
    after = maps(app)
    assert after["linked"]["outlines"] == []
    assert [c["lines"] for c in pictures(after)] == [c["lines"] for c in pictures(before)] != []


def test_each_map_says_how_much_of_it_lies_on_the_object(show, folder):
    app = show(image="photo-00000")
    names = {i: name for i, name in enumerate(CLASSES)}
    mask = (
        annotations_of_classes(folder / "data", names, "made up")
        .of("photo-00000.jpg", VIEW)
        .mask(0)
    )
    pack = state.library().open(state.library().packs()[0].id)
    for cell in pictures(maps(app)):
        raw = torch.from_numpy(np.array(pack.explanation(cell["id"]).map))[None, None]
        grey, _ = saliency(raw, VIEW.input_size)
        energy = float(energy_pointing_values(grey, mask[None]))
        assert any(
            line.startswith(f"{energy:.0%} on the object, maximum ") for line in cell["lines"]
        )


def test_a_class_without_an_object_has_outlines_and_no_figures(show):
    found = maps(show(image="photo-00001"))  # of a great white shark
    assert len(found["linked"]["outlines"]) == 2
    assert not any("object" in line for cell in pictures(found) for line in cell["lines"])


@pytest.mark.parametrize("annotations, image", [("data", "photo-00003"), (None, "photo-00000")])
def test_nothing_is_shown_where_there_is_no_annotation(show, annotations, image):
    app = show(annotations, image=image)
    assert maps(app)["linked"]["outlines"] == []
    assert not app.toggle and not app.warning


def test_a_damaged_mask_is_a_sentence_without_the_servers_folders(show, folder):
    app = show(image="photo-00002")
    [warning] = app.warning
    text = warning.value.replace("\\", "")
    assert "annotations: mask data/masks/photo-00002.png cannot be read as PNG" in text
    assert str(folder) not in text
    assert len(pictures(maps(app))) == 2


@pytest.fixture
def show_boxes(tmp_path, monkeypatch):
    """A photo of a cat with a file of boxes."""
    found = explanation(0, target=0, target_name="cat", source=picture(0))
    save_pack(tmp_path / "root" / "pack", [found], overlays=False)

    def show_boxes(content):
        (tmp_path / "boxes.json").write_text(content)
        own = state.Settings(root=tmp_path / "root", annotations=tmp_path / "boxes.json")
        monkeypatch.setattr(state, "_settings", own)
        app = AppTest.from_function(script, default_timeout=600).run()
        assert not app.exception, [e.value for e in app.exception]
        return app

    return show_boxes


def test_a_box_of_a_class_by_its_name_is_outlined_and_read_again_when_it_changes(show_boxes):
    for box in ([10, 20, 50, 70], [0, 0, WIDTH, HEIGHT - 1]):
        app = show_boxes(json.dumps({"photo-00000.jpg": [{"class": "cat", "box": box}]}))
        [outline] = maps(app)["linked"]["outlines"]
        assert corners(outline) == pytest.approx(box, abs=0.5) and outline["own"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("[", "boxes.json is not JSON"),
        ("[]", "boxes.json is not {file name: [box, ...]}"),
        (
            '{"photo-00000.jpg": [{"class": "cat", "box": [0, 0, 9]}]}',
            'give {"class": name or number',
        ),
        ('{"photo-00000.jpg": [{"class": "cart", "box": [0, 0, 9, 9]}]}', "did you mean cat, car"),
        (
            '{"photo-00000.jpg": [{"class": "cat", "box": [0, 0, 9, 9999]}]}',
            "extends beyond the photo",
        ),
    ],
)
def test_a_bad_file_of_boxes_is_a_sentence(show_boxes, content, words):
    app = show_boxes(content)
    [warning] = app.warning
    text = warning.value.replace("\\", "")
    assert text.startswith("annotations: ") and words in text
    assert len(pictures(maps(app))) == 1


def test_annotations_of_other_classes_are_a_sentence(show, folder):
    (folder / "boxes.json").write_text("{}")
    [warning] = show("boxes.json").warning
    assert "no class of made up is a category of boxes.json" in warning.value.replace("\\", "")


def test_rings_of_a_hole_and_of_a_single_pixel():
    pixels = np.ones((10, 20), bool)
    pixels[3:6, 5:9] = False
    outer, hole = sorted(mask_outlines(pixels), key=lambda ring: np.ptp(ring[:, 0]), reverse=True)
    assert np.allclose([*outer.min(0), *outer.max(0)], [0, 0, 1, 1], atol=0.03)
    assert np.allclose([*hole.min(0), *hole.max(0)], [0.25, 0.3, 0.45, 0.6], atol=0.03)
    single = np.zeros((10, 20), bool)
    single[4, 7] = True
    assert len(mask_outlines(single)) == 1
