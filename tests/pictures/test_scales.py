"""Scales: which colour a value of a map gets, what a legend says, and where a threshold leaves the photo."""

import math

import numpy as np
import pytest
from synthetic_packs import explanation, picture

from xattn.packs.explanation import contrast
from xattn.pictures.overlay import DIVERGING, colorize, gradient, overlay
from xattn.pictures.scales import Scale, legend_of, make_scale, own_scale


def test_a_map_without_negative_values_is_min_maxed():
    e = explanation()
    scale = own_scale(e)
    assert scale.cmap == "inferno"
    assert np.array_equal(scale(e.map), e.normalized())


def test_a_signed_map_is_centred_on_zero_and_as_long_on_both_sides():
    e = explanation(signed=True)
    scale = own_scale(e)
    largest = np.abs(e.map).max()
    assert scale.cmap == DIVERGING and (scale.low, scale.high) == (-largest, largest)
    assert scale(np.zeros(1))[0] == 0.5
    assert np.allclose(scale(e.map) + scale(-e.map), 1, atol=1e-6)


def test_a_mask_is_shown_as_it_is():
    e = explanation(map=np.linspace(0.2, 0.6, 49).reshape(7, 7), is_mask=True)
    assert np.array_equal(own_scale(e)(e.map), e.map)


def spike(low=0.0):
    """A map of which one value in 200 is far larger than the others, which rise evenly from ``low`` to 1."""
    values = np.linspace(low, 1, 20 * 20)
    values[-2:] = 50.0
    return explanation(map=values.reshape(20, 20))


def test_a_spiky_map_is_clipped_at_its_percentiles():
    e = spike()
    usual, clipped = own_scale(e), own_scale(e, clip=None)
    assert (usual.low, usual.high, usual.clipped) == (0, 50, False)
    low, high = np.percentile(e.map, (1, 99))
    assert (clipped.low, clipped.high, clipped.clipped) == (low, high, True)
    assert np.median(usual(e.map)) < 0.02 and np.median(clipped(e.map)) == pytest.approx(
        0.5, abs=0.01
    )
    assert "1st to 99th percentile" in legend_of(clipped).text
    assert "min-max" in legend_of(usual).text


def test_a_map_without_spikes_is_clipped_only_if_that_is_chosen():
    e = explanation(map=np.linspace(0, 1, 49).reshape(7, 7))
    assert own_scale(e, clip=None) == own_scale(e)
    assert own_scale(e, clip=True) == Scale(*np.percentile(e.map, (1, 99)), clipped=True)


def test_a_clipped_signed_map_stays_centred_on_zero():
    scale = own_scale(spike(low=-1.0), clip=None)
    assert scale.cmap == DIVERGING and scale.low == -scale.high and 0.9 < scale.high < 1
    assert "99 % of its values" in legend_of(scale).text


def test_a_map_with_fewer_values_than_the_percentiles_see_is_not_clipped():
    values = np.zeros((20, 20))
    values[3, 4] = 1
    e = explanation(map=values)
    assert own_scale(e, clip=True) == own_scale(e)
    mask = explanation(map=values, is_mask=True)
    assert own_scale(mask, clip=True) == Scale(0, 1)


def test_a_constant_map_shows_nothing():
    e = explanation(map=np.full((7, 7), 3.0))
    assert not own_scale(e)(e.map).any()
    assert (Scale(0, 0, DIVERGING)(np.zeros(3)) == 0.5).all()


def test_a_shared_scale_keeps_the_order_of_two_maps():
    weak, strong = (explanation(map=np.full((2, 2), v)) for v in (1.0, 4.0))
    scale = make_scale([(0.0, 1.0), (2.0, 4.0)])
    assert scale(weak.map)[0, 0] == 0.25 and scale(strong.map)[0, 0] == 1
    assert make_scale([(-1.0, 4.0)]) == Scale(-4.0, 4.0, DIVERGING)


def test_limits_that_are_no_numbers_are_refused():
    for limits in ([], [(math.nan, 1.0)], [(0.0, math.inf)]):
        with pytest.raises(ValueError, match="limits: "):
            make_scale(limits)


def test_diverging_colours_are_dark_at_the_centre_and_equally_light_at_both_ends():
    skimage = pytest.importorskip("skimage.color")
    lightness = skimage.rgb2lab(colorize(np.linspace(0, 1, 256), DIVERGING)[None] / 255)[0, :, 0]
    assert np.abs(lightness - lightness[::-1]).max() < 3
    assert (np.diff(lightness[128:]) >= 0).all() and lightness[127] < 10
    low, high = colorize(np.array([0.1, 0.9]), DIVERGING).astype(int)
    assert low[2] > low[0] and high[0] > high[2], "blue below the centre, orange above"
    assert gradient(DIVERGING).count("rgb(") == 18


def test_a_contrast_is_the_difference_of_the_maps():
    one, other = explanation(target=1), explanation(image=0, method="gradcam", target=2)
    other = explanation(target=2, map=one.map[::-1] * 3)
    assert np.allclose(contrast(one, other), one.normalized() - other.normalized())
    assert np.allclose(contrast(one, other, raw=True), one.map - other.map)
    assert not contrast(one, one).any()
    for wrong in (explanation(side=5), explanation(image=1)):
        with pytest.raises(ValueError, match="other: .* not on the grid"):
            contrast(one, wrong)


def test_legends_say_whose_scale_it_is():
    own = legend_of(Scale(0, 7))
    assert (own.low, own.high) == ("0", "1") and "per map" in own.text
    shared = legend_of(Scale(-2, 2, DIVERGING), shared=True)
    assert (shared.low, shared.high) == ("-2", "2")
    assert "one scale for all" in shared.text and "against" in shared.text


# ---------------------------------------------------------------------- overlays


def test_below_the_threshold_the_photo_stays_as_it_is():
    photo, values = picture(0, (8, 2)), np.tile(np.linspace(0, 1, 8, dtype=np.float32), (2, 1))
    drawn = np.asarray(overlay(photo, values, threshold=0.5))
    original, full = np.asarray(photo), np.asarray(overlay(photo, values))
    low = values < 0.5
    assert np.array_equal(drawn[low], original[low])
    assert np.array_equal(drawn[~low], full[~low])


def test_the_threshold_of_a_diverging_scale_counts_from_its_centre():
    photo, values = picture(0, (5, 1)), np.array([[0.0, 0.3, 0.5, 0.7, 1.0]], np.float32)
    drawn = np.asarray(overlay(photo, values, cmap=DIVERGING, threshold=0.9))
    kept = (drawn == np.asarray(photo)).all(-1)[0]
    assert kept.tolist() == [False, True, True, True, False]


def test_a_threshold_out_of_range_is_refused():
    with pytest.raises(ValueError, match="threshold: got 2"):
        overlay(picture(0, (2, 2)), np.zeros((2, 2)), threshold=2)
