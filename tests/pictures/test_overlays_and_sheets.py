"""Pictures of maps: colours, overlays and contact sheets."""

import re

import numpy as np
import pytest
from PIL import Image
from small_explanations import SIZE, make, photo

from xattn.backbone import Preprocessing
from xattn.packs.explanation import Explanation
from xattn.photos.view import make_view
from xattn.pictures.contact_sheet import (
    Cell,
    Row,
    contact_sheet_html,
    contact_sheet_image,
    sheet_rows,
)
from xattn.pictures.overlay import colorize, colour_bar, overlay


def test_colours_run_from_the_first_to_the_last_of_the_map():
    colours = colorize(np.array([[0, 1, np.nan, 2, -1]]), "viridis")
    assert colours.dtype == np.uint8 and colours.shape == (1, 5, 3)
    assert colours[0, 0].tolist() == colours[0, 4].tolist() == [68, 1, 84]
    assert colours[0, 1].tolist() == colours[0, 3].tolist() == [253, 231, 37]
    assert colours[0, 2].tolist() == [0, 0, 0]
    lightness = colorize(np.linspace(0, 1, 256)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1).all()
    assert colour_bar(64, 4).size == (64, 4)
    with pytest.raises(ValueError, match=r"cmap: no colour map 'infernal'; did you mean inferno"):
        colorize(np.zeros((1, 1)), "infernal")


def test_an_overlay_mixes_colours_over_a_photo_with_less_colour_of_its_own():
    photo, opacity = np.array([200.0, 40, 90]), 0.4
    image = Image.new("RGB", (9, 7), tuple(int(c) for c in photo))
    grey = photo @ [0.299, 0.587, 0.114]
    faded = opacity * grey + (1 - opacity) * photo
    colour = colorize(np.array([[0.7]]))[0, 0]
    out = np.asarray(overlay(image, np.full((7, 9), 0.7), opacity)).astype(float)
    assert np.abs(out - (opacity * colour + (1 - opacity) * faded)).max() <= 0.51


def test_an_overlay_colours_inside_and_dims_outside():
    image = Image.new("RGB", SIZE[::-1], (200, 120, 40))
    values = make().on_photo()
    out = np.asarray(overlay(image, values)).astype(int)
    outside = np.isnan(values)
    assert (out[outside] == out[outside][0]).all() and np.ptp(out[outside][0]) == 0
    assert out[outside].max() < 60
    assert np.array_equal(np.asarray(overlay(image, np.ones(SIZE), 0)), np.asarray(image))
    full = np.asarray(overlay(image, np.linspace(0, 1, 90)[None].repeat(60, 0), 1))
    assert np.array_equal(full, colorize(np.linspace(0, 1, 90)[None].repeat(60, 0)))
    with pytest.raises(ValueError, match=r"values: got shape \(3, 3\) for a photo of 60 x 90"):
        overlay(image, np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"opacity: got 2"):
        overlay(image, values, 2)


def test_rows_group_the_explanations_of_a_photo():
    rows = sheet_rows([make(), make("dog"), make(target=4)])
    assert [len(r.cells) for r in rows] == [3, 2]
    assert [c.title for c in rows[0].cells] == ["Photo", "tabby", "tabby"]
    assert rows[0].cells[1].alt == "head map of tabby (25.0%) on cat.png"


def test_the_html_sheet_is_self_contained_escaped_and_accessible():
    evil = Explanation(
        np.eye(3),
        0,
        "<script>alert(1)</script>",
        0.9,
        "head",
        make_view(SIZE, Preprocessing()),
        "x",
        file_name='"><b>.png',
        source=photo(),
    )
    page = contact_sheet_html(
        [make(), evil], "A & B", "sub", [["method", "AD"], ["<head>", 1.5]], "Figures", ["note"]
    )
    assert "<script" not in page and "&lt;script&gt;" in page and "A &amp; B" in page
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 4 and all(re.search(r'alt="[^"]+"', i) for i in images)
    for part in (
        "color-scheme:light dark",
        "width=device-width",
        "25.0%",
        "&lt;head&gt;",
        "note",
    ):
        assert part in page
    with pytest.raises(ValueError, match=r"rows: got none"):
        contact_sheet_html([])


def test_the_image_sheet_takes_rows_of_any_length_and_shape():
    rows = [
        Row("strip", [Cell(photo(size=(2, 400)), "a title that is far too long for its picture")]),
        Row("two", [Cell(photo(), "one", value=0.5), Cell(photo(size=(1, 1)), "two", "detail")]),
    ]
    light, dark = contact_sheet_image(rows, "title", side=100), contact_sheet_image(rows, dark=True)
    assert light.width < 260 and light.getpixel((0, 0)) == (255, 255, 255)
    assert dark.getpixel((0, 0)) != (255, 255, 255)
