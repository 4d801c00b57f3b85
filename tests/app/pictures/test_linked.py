"""Values of maps for the pointer: rounded cells, and where they lie on the picture."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_packs import explanation

from xattn.app.pictures.rendering import MOST_CELLS, map_box, map_cells
from xattn.photos.view import View, make_view


def values(sent):
    steps = np.frombuffer(base64.b64decode(sent["cells"]), "<u2").reshape(sent["rows"], -1)
    return sent["low"] + steps / 65535 * (sent["high"] - sent["low"])


@pytest.mark.parametrize("signed", [False, True])
def test_a_maps_cells_are_sent_rounded(signed):
    own = explanation(3, side=14, signed=signed)
    sent = map_cells(own, crop=False)
    assert np.abs(values(sent) - own.map).max() <= float(np.ptp(own.map)) / 65535
    assert (sent["of"], sent["most"]) == ([14, 14], float(own.map.max()))


def test_a_constant_map_is_its_value():
    sent = map_cells(explanation(map=np.full((3, 5), 0.25, np.float32)), crop=False)
    assert values(sent).shape == (3, 5) and (values(sent) == 0.25).all()


def test_a_large_map_is_averaged():
    own = explanation(map=np.arange(80 * 120, dtype=np.float32).reshape(80, 120))
    sent = map_cells(own, crop=False)
    assert (sent["rows"], sent["columns"], sent["of"]) == (MOST_CELLS, MOST_CELLS, [80, 120])
    assert values(sent)[0, 0] == pytest.approx(own.map[:2, :3].mean(), abs=0.1)
    assert sent["most"] == 80 * 120 - 1  # of the map itself


@given(st.integers(20, 400), st.integers(20, 400), st.floats(0.3, 1.0))
def test_a_map_lies_on_the_part_of_the_photo_that_the_model_saw(height, width, crop_pct):
    from types import SimpleNamespace

    model = SimpleNamespace(input_size=(32, 48), crop_pct=crop_pct, crop_mode="center")
    view = make_view((height, width), model)
    top, left, bottom, right = map_box(view, crop=False)
    shares = np.clip([top, left, bottom, right], 0, 1) * [height, width, height, width]
    assert np.allclose(shares, view.photo_box)


def test_padding_lies_outside_of_the_picture():
    view = View("crop", (100, 50), (32, 16), (0, -8, 32, 32), (32, 32))
    assert map_box(view, crop=False) == [0, -0.5, 1, 1.5]
    assert map_box(view, crop=True) == [0, -0.5, 1, 1.5]
    inner = View("crop", (100, 100), (40, 40), (4, 10, 20, 20), (20, 20))
    assert map_box(inner, crop=False) == [0.1, 0.25, 0.6, 0.75]
    assert np.allclose(map_box(inner, crop=True), [0, 0, 1, 1])
