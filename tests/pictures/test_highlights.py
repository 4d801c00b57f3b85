"""Outlines and spotlights: what lies inside the line holds half of the mass, on maps that are known."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from small_explanations import make

from xattn.photos.view import View
from xattn.pictures.contact_sheet import contact_sheet_html, contact_sheet_image
from xattn.pictures.overlay import (
    DARK,
    DIVERGING,
    LIGHT,
    SEQUENTIAL,
    STYLES,
    half_mass_level,
    outlines,
    overlay,
)

VIEW = View("crop", (98, 130), (56, 74), (3, 9, 49, 49), (49, 49))  # 7 x 7 cells over the middle


def on_photo(cells):
    return VIEW.to_photo(np.asarray(cells, np.float32), (98, 130))


def grey(value=120, size=(130, 98)):
    return Image.new("RGB", size, (value, value, value))


def inside(lines, shape):
    """(H, W): the pixels whose centre lies within an odd number of the lines."""
    from matplotlib.path import Path

    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    found = [Path(line).contains_points(centres).reshape(shape) for line in lines]
    return np.logical_xor.reduce(found)


def cells_of(kind):
    y, x = np.mgrid[:7, :7]
    if kind == "two peaks":
        return np.exp(-((x - 1) ** 2 + (y - 2) ** 2)) + 0.7 * np.exp(-((x - 5) ** 2 + (y - 4) ** 2))
    if kind == "a ramp":
        return x / 6
    return np.random.default_rng(0).random((7, 7))


@pytest.mark.parametrize("kind", ["two peaks", "a ramp", "noise"])
def test_half_of_the_mass_lies_within_the_outline(kind):
    values = on_photo(cells_of(kind))
    lines = outlines(values, half_mass_level(values))
    mass = np.nan_to_num(values)
    within = mass[inside(lines, mass.shape)].sum() / mass.sum()
    cell = mass.max() * (98 / 56 * 7) ** 2 / mass.sum()  # the most that a cell of the map holds
    assert abs(within - 0.5) < cell


def test_no_smaller_region_holds_half_of_the_mass():
    values = np.random.default_rng(1).random((9, 11))
    region = values >= half_mass_level(values)
    assert values[region].sum() >= values.sum() / 2
    assert values[region].sum() - values[region].min() < values.sum() / 2
    assert values[region].min() > values[~region].max()


def test_a_mask_is_outlined_whole():
    mask = np.zeros((20, 30))
    mask[5:10, 4:16] = 1
    (line,) = outlines(mask, half_mass_level(mask))
    assert np.array_equal(inside([line], mask.shape), mask == 1)


def test_only_the_positive_half_of_a_signed_map_is_outlined():
    cells = np.full((7, 7), 0.5)
    cells[1, 1], cells[5, 5] = 1.0, 0.0  # on the diverging scale: for the class, and against it
    drawn = np.asarray(overlay(grey(), on_photo(cells), cmap=DIVERGING, style="outline"))
    changed = np.argwhere((drawn == LIGHT).all(-1) & (on_photo(np.ones((7, 7))) == 1))
    assert len(changed) and (changed[:, 0] < 45).all() and (changed[:, 1] < 60).all()


@pytest.mark.parametrize("cmap, nothing", [(SEQUENTIAL, 0.0), (DIVERGING, 0.5)])
def test_a_blank_map_has_no_outline_and_no_light(cmap, nothing):
    photo, values = grey(), np.full((98, 130), nothing, np.float32)
    assert overlay(photo, values, cmap=cmap, style="outline").tobytes() == photo.tobytes()
    assert np.ptp(np.asarray(overlay(photo, values, cmap=cmap, style="spotlight"))) == 0


@pytest.mark.parametrize("value", [0, 120, 255])
def test_both_lines_of_an_outline_are_seen_on_any_photo(value):
    drawn = np.asarray(overlay(grey(value), on_photo(cells_of("two peaks")), style="outline"))
    for line in (DARK, LIGHT):
        assert ((drawn == line).all(-1)).sum() > 40


def test_an_outline_along_the_photos_border_is_inside_the_photo():
    values = np.zeros((40, 40))
    values[:, 30:] = 1
    drawn = np.asarray(overlay(grey(120, (40, 40)), values, style="outline"))[..., 0]
    assert (drawn[5:35, 36:] > 200).any(1).all()


def test_a_spotlight_keeps_the_photo_where_the_map_is_one_and_dims_it_where_it_is_low():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (4, 1))
    row = np.asarray(overlay(grey(200, (64, 4)), ramp, style="spotlight"))[0, :, 0].astype(int)
    assert row[-1] == 200 and row[0] < 60 and (np.diff(row) >= 0).all()
    whole = overlay(grey(200, (64, 4)), ramp, opacity=0.0, style="spotlight")
    assert whole.tobytes() == grey(200, (64, 4)).tobytes()
    above = np.asarray(overlay(grey(200, (64, 4)), ramp, threshold=0.5, style="spotlight"))
    assert np.ptp(above[0, :31, 0]) == 0 and np.array_equal(above[0, 33:, 0], row[33:])


@pytest.mark.parametrize("style", STYLES)
def test_outside_the_models_view_every_style_is_grey_and_dimmed(style):
    photo = Image.new("RGB", (130, 98), (200, 120, 40))
    values = on_photo(cells_of("noise"))
    outside = np.asarray(overlay(photo, values, style=style))[np.isnan(values)]
    assert np.ptp(outside, axis=1).max() == 0 and 0 < outside.max() < 60


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style: got 'glow'; give one of overlay, outline, spotl"):
        overlay(grey(), np.zeros((98, 130)), style="glow")


# ---------------------------------------------------------------------- explanations


def test_an_explanation_is_outlined_by_its_own_scale():
    cells = np.full((7, 7), -1.0, np.float32)
    cells[1, 1] = 4
    signed = replace(make(), map=cells)
    drawn = np.asarray(signed.overlay(style="outline"))
    values = signed.view.to_photo(np.maximum(cells, 0), drawn.shape[:2])
    lines = outlines(values, half_mass_level(values))
    assert inside(lines, values.shape).sum() < np.isfinite(values).sum() / 20
    assert (drawn == LIGHT).all(-1)[values > 0].any()
    assert signed.overlay(style="outline").tobytes() != signed.overlay(style="spotlight").tobytes()
    assert len(signed.figure(style="outline").axes) == 2 and len(signed.figure().axes) == 3


def test_a_contact_sheet_says_what_its_outlines_are():
    page = contact_sheet_html([make()], style="outline")
    assert "the smallest region that holds half of the map" in page and "gradient(90deg" not in page
    bright = contact_sheet_html([make()], style="spotlight")
    assert "brightness: relevance for the named class" in bright
    wide = contact_sheet_image([make()], style="outline")
    assert (np.asarray(wide) == DARK).all(-1).any()
