"""Several methods: the images on which they differ most come first."""

from __future__ import annotations

import numpy as np
import pytest

from xattn.eval.report.differences import rank_by_maps, rank_by_metric


def test_images_come_by_falling_distance_and_ties_keep_their_order():
    found = rank_by_metric([[1.0, 5.0, 2.0, 0.0], [2.0, 5.0, 1.0, 9.0]])
    assert [image.position for image in found] == [3, 0, 2, 1]
    assert found[0] == (3, 9.0)
    third = [1.5, 7.0, 4.0, 3.0]
    found = rank_by_metric([[1.0, 5.0, 2.0, 0.0], [2.0, 5.0, 1.0, 9.0], third])
    assert [tuple(image) for image in found] == [(3, 9.0), (2, 3.0), (1, 2.0), (0, 1.0)]


def test_images_that_lack_a_value_are_left_out():
    assert [i.position for i in rank_by_metric([[1.0, np.nan, np.inf], [2.0, 1.0, 1.0]])] == [0]


@pytest.mark.parametrize("values", [[1.0], [[[1.0]]]])
def test_values_of_no_methods_are_refused(values):
    with pytest.raises(ValueError, match="shape"):
        rank_by_metric(values)


def test_opposite_maps_come_first_and_equal_ones_last():
    rng = np.random.default_rng(0)
    one = rng.random((7, 7)).astype(np.float32)
    other = rng.random((7, 7)).astype(np.float32)
    found = rank_by_maps([(one, one), (one, -one), (one, other), (one, np.ones_like(one))])
    assert [image.position for image in found] == [1, 2, 0]
    assert found[0].distance == pytest.approx(2) and found[-1].distance == pytest.approx(0)
