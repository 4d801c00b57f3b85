"""How maps are drawn: scales, thresholds, contrasts, and pictures that are kept."""

import io

import numpy as np
import pytest

pytest.importorskip("streamlit")

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from synthetic_packs import CLASSES, VIEW, explanation, picture, small_pack
from viewer_pages import only

from xattn.app.library import Library
from xattn.app.pictures import rendering
from xattn.app.pictures.rendering import Look
from xattn.packs.contained_files import PackError
from xattn.packs.writer import save_pack
from xattn.photos.view import View
from xattn.pictures.overlay import DIVERGING, STYLES, overlay


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Two methods, one of them signed, two classes a photo."""
    folder = tmp_path_factory.mktemp("root")
    found = [
        explanation(i, method, target=(i + c) % len(CLASSES), signed=signed, source=picture(i))
        for i in range(2)
        for method, signed in (("gradcam", False), ("lrp", True))
        for c in range(2)
    ]
    save_pack(folder / "pack", found, overlays=False)
    return only(folder)


def ids(pack, **wanted):
    rows = pack.entries
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return list(rows.index)


# ---------------------------------------------------------------------- pictures of a pack


def test_an_overlay_is_the_map_over_its_photo(pack):
    entry_id = ids(pack, method="gradcam")[0]
    e, photo = pack.explanation(entry_id), pack.photo("photo-00000")
    wanted = overlay(photo, VIEW.to_photo(e.normalized(), (96, 128)))
    assert rendering.overlay_image(pack, entry_id, Look()).tobytes() == wanted.tobytes()


def test_the_shared_scale_spans_all_maps_of_the_photo_or_what_it_is_told(pack):
    entry_id = ids(pack, image_id="photo-00000", method="gradcam")[0]
    own = pack.entries[pack.entries["image_id"] == "photo-00000"]
    [legend] = rendering.legends(pack, [entry_id], Look(scale="shared"))
    largest = max(own["max"].max(), -own["min"].min())
    assert legend.low == f"{-largest:.3g}", "another method's map is negative"
    [told] = rendering.legends(pack, [entry_id], Look(scale="shared", limits=(0.0, 2.0)))
    assert (told.low, told.high, told.cmap) == ("0", "2", "inferno")


def test_each_meaning_of_the_colours_has_one_legend(pack):
    everything = rendering.legends(pack, ids(pack), Look())
    assert {legend.cmap for legend in everything} == {"inferno", DIVERGING}
    assert len(everything) == 2


def test_a_contrast_picture_says_which_class_is_which(pack):
    first, second = ids(pack, image_id="photo-00000", method="gradcam")
    for scale, kind in (("map", "min-maxed maps"), ("shared", "scores")):
        [legend] = rendering.legends(pack, [first], Look(scale=scale, minus=second))
        assert kind in legend.text and "orange where tench" in legend.text
    same = rendering.overlay_image(pack, first, Look(minus=first, opacity=1))
    box = np.asarray(same)[48, 64]
    assert box.max() < 40, "nothing differs, and nothing is dark"


def test_contrast_with_another_photo_or_an_unknown_map_is_refused(pack):
    first = ids(pack, image_id="photo-00000", method="gradcam")[0]
    other = ids(pack, image_id="photo-00001", method="gradcam")[0]
    with pytest.raises(ValueError, match="not on the grid"):
        rendering.overlay_bytes(pack, first, Look(minus=other))
    with pytest.raises(PackError, match="no such map"):
        rendering.overlay_bytes(pack, first, Look(minus="none"))


def test_pictures_are_jpegs_of_at_most_the_asked_side(pack):
    entry_id = ids(pack)[0]
    for data in (
        rendering.photo_bytes(pack, "photo-00000", 64),
        rendering.overlay_bytes(pack, entry_id, Look(side=64)),
    ):
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG" and max(image.size) == 64


def test_a_picture_is_drawn_once(pack, monkeypatch):
    entry_id, calls = ids(pack)[0], []
    draw = rendering.overlay_image
    monkeypatch.setattr(rendering, "overlay_image", lambda *args: calls.append(args) or draw(*args))
    first = rendering.overlay_bytes(pack, entry_id, Look(opacity=0.31))
    assert rendering.overlay_bytes(pack, entry_id, Look(opacity=0.31)) == first and len(calls) == 1
    assert rendering.overlay_bytes(pack, entry_id, Look(opacity=0.32)) != first and len(calls) == 2


# ---------------------------------------------------------------------- styles and the crop


def test_the_crop_is_what_the_model_saw(pack):
    entry_id = ids(pack, method="gradcam")[0]
    whole = rendering.overlay_image(pack, entry_id, Look())
    crop = rendering.overlay_image(pack, entry_id, Look(crop=True))
    left, top, right, bottom = rendering.seen_box(VIEW, whole)
    assert (right - left, bottom - top) == crop.size
    assert crop.size[0] == crop.size[1], "the model's input is square"
    inner = np.asarray(whole)[top + 2 : bottom - 2, left + 2 : right - 2]
    assert np.array_equal(inner, np.asarray(crop)[2:-2, 2:-2]), "whole has a frame around it"


def test_a_photo_without_its_map_has_the_same_crop(pack):
    entry_id = ids(pack, image_id="photo-00000", method="gradcam")[0]
    drawn = rendering.overlay_bytes(pack, entry_id, Look(crop=True, side=64))
    photo = rendering.photo_bytes(pack, "photo-00000", 64, entry_id)
    assert Image.open(io.BytesIO(photo)).size == Image.open(io.BytesIO(drawn)).size == (64, 64)
    with pytest.raises(PackError, match="to another photo"):
        rendering.photo_bytes(pack, "photo-00001", 64, entry_id)


@pytest.mark.parametrize(
    "photo_size, resized", [((20_000, 3), (1_493_333, 224)), ((1, 1), (256, 256))]
)
def test_a_crop_has_at_least_one_pixel(photo_size, resized):
    view = View("crop", photo_size, resized, (16, 16, 224, 224), (224, 224))
    for shown in ((1, 1), (2, 1), (512, 1)):
        left, top, right, bottom = rendering.seen_box(view, Image.new("RGB", shown[::-1]))
        assert 0 <= left < right <= shown[1] and 0 <= top < bottom <= shown[0]


def test_an_outline_does_not_depend_on_scale_or_colours(pack):
    entry_id = ids(pack, method="lrp")[0]
    one = rendering.overlay_bytes(pack, entry_id, Look(style="outline"))
    other = Look(style="outline", scale="shared", cmap="viridis", opacity=0.2)
    assert rendering.overlay_bytes(pack, entry_id, other) == one
    assert rendering.overlay_bytes(pack, entry_id, Look(style="spotlight")) != one


def test_legends_say_what_a_style_shows(pack):
    signed, own = ids(pack, method="lrp")[0], ids(pack, method="gradcam")[0]
    [line] = rendering.legends(pack, [own], Look(style="outline", crop=True))
    assert line.text == "around the smallest region that holds half of the map"
    [line] = rendering.legends(pack, [signed], Look(style="outline"))
    assert "half of the positive values; dimmed: outside" in line.text
    [light] = rendering.legends(pack, [signed], Look(style="spotlight"))
    assert (light.low, light.high, light.cmap) == ("0", "+", "gray")
    [usual] = rendering.legends(pack, [own], Look(crop=True))
    assert "dimmed" not in usual.text
    other = ids(pack, image_id="photo-00000", method="gradcam")[1]
    [difference] = rendering.legends(pack, [own], Look(style="outline", minus=other))
    assert difference.text.startswith("where tench has more than ")


# ---------------------------------------------------------------------- looks and URLs

looks = st.builds(
    Look,
    opacity=st.floats(0, 1),
    threshold=st.floats(0, 1),
    scale=st.sampled_from(rendering.SCALES),
    cmap=st.sampled_from(rendering.COLOURS),
    side=st.integers(*rendering.SIDES),
    style=st.sampled_from(STYLES),
    crop=st.booleans(),
    minus=st.none() | st.text(min_size=1, max_size=20),
    limits=st.none()
    | st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2).map(lambda v: tuple(sorted(v))),
)


@given(looks)
def test_a_look_comes_back_from_its_query(look):
    assert Look.from_query(look.query()) == look


def test_a_default_look_needs_no_parameters():
    assert Look().query() == {} and Look.from_query({}) == Look()


@pytest.mark.parametrize(
    "query",
    [
        {"opacity": "nan"},
        {"opacity": "1.01"},
        {"opacity": ""},
        {"threshold": "-0.1"},
        {"threshold": "1e999"},
        {"side": "15"},
        {"side": "2049"},
        {"side": "1e3"},
        {"side": "٤٨٠"},
        {"scale": "own"},
        {"cmap": "jet"},
        {"style": "glow"},
        {"crop": "true"},
        {"low": "0"},
        {"low": "2", "high": "1"},
        {"low": "-1e31", "high": "0"},
    ],
)
def test_a_bad_parameter_is_named(query):
    with pytest.raises(ValueError, match=rf"({'|'.join(query)}|limits): got "):
        Look.from_query(query)


def test_urls_carry_ids_and_the_version_and_no_markup(pack):
    url = rendering.overlay_url(pack, 'a&b"<i>@1.x', Look(opacity=0.5, side=64))
    assert url.startswith("/xattn/overlay?pack=") and f"v={pack.version}" in url
    assert not set('"<>') & set(url) and "opacity=0.5" in url and "side=64" in url
    assert str(pack.folder) not in url


def test_a_pack_without_pictures_says_so(tmp_path):
    small_pack(tmp_path / "pack", 1)
    save_pack(tmp_path / "bare", [explanation(0)], overlays=False)
    library = Library(tmp_path)
    bare = next(library.open(p.id) for p in library.packs() if p.name == "bare")
    with pytest.raises(PackError, match="no picture of photo-00000"):
        rendering.overlay_bytes(bare, bare.entries.index[0], Look())
