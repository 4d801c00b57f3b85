"""Tasks on points: answers beside definitions, tours beside all permutations, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from xattn.eval.studies.models.point_sets import (
    crosses_itself,
    delaunay,
    draw,
    greedy_tour,
    held_karp,
    hull,
    hull_coverage,
    incenter,
    padded_answers,
    polygon_area,
    tour_length,
    triangle_coverage,
    turned,
    two_opt,
)


def some(count, seed=0):
    return np.random.default_rng(seed).random((count, 2))


@pytest.mark.parametrize("count", [3, 4, 7, 20])
def test_a_hull_has_every_point_on_its_left_and_begins_at_the_leftmost(count):
    for seed in range(5):
        x = some(count, seed)
        found = hull(x)
        assert found[0] == x[:, 0].argmin() and len(set(found)) == len(found) >= 3
        for a, b in zip(found, [*found[1:], found[0]], strict=True):
            side = np.cross(np.append(x[b] - x[a], 0), np.append(x - x[a], np.zeros((count, 1)), 1))
            assert (side[:, 2] >= -1e-12).all()
        order = np.random.default_rng(seed).permutation(count)
        assert [order[i] for i in hull(x[order])] == found  # indices do not matter


def test_area_and_coverage_of_answers():
    x = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.5, 0.5]])
    assert polygon_area(x[[0, 1, 2, 3]]) == 1 and polygon_area(x[[3, 2, 1, 0]]) == -1
    assert hull_coverage(x, hull(x)) == 1
    assert hull_coverage(x, [0, 1, 2]) == 0.5 == hull_coverage(x, [2, 1, 0])
    assert hull_coverage(x, [0, 2, 1, 3]) is None and hull_coverage(x, [0, 1]) is None
    assert hull_coverage(x, [0, 1, 2, 4]) == 0.5
    assert crosses_itself(x[[0, 2, 1, 3]]) and not crosses_itself(x[[0, 1, 2, 3]])
    for seed in range(20):  # never above the hull's, whatever the answer
        y = some(6, seed)
        answer = np.random.default_rng(seed).permutation(6)[:4].tolist()
        area = hull_coverage(y, answer)
        assert area is None or 0 <= area <= 1
    # The outline that returns on its own way meets itself.
    assert crosses_itself([[0, 0], [2, 0], [2, 1], [1, 0], [0, 1]])


def test_no_point_lies_in_the_circle_of_a_delaunay_triangle():
    for seed in range(3):
        x = some(9, seed)
        found = delaunay(x)
        assert len(found) == 2 * 9 - 2 - len(hull(x))  # Euler
        centres = [incenter(x[list(t)]) for t in found]
        assert centres == sorted(centres)
        for triangle in found:
            corners = x[list(triangle)]
            assert (np.diff(corners[:, 0]) >= 0).all()
            a, b, c = corners
            rows = np.array([b - a, c - a]) * 2
            centre = np.linalg.solve(rows, [b @ b - a @ a, c @ c - a @ a])
            radius = np.linalg.norm(a - centre)
            assert (np.linalg.norm(x - centre, axis=1) >= radius - 1e-9).all()
    assert incenter(np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])) == (1.0, 1.0)
    truth = [0, 1, 2, 1, 2, 3]
    assert triangle_coverage(truth, truth) == 1 and triangle_coverage(truth, []) == 0
    assert triangle_coverage(truth, [*truth, 0, 1, 3]) == 1  # what is too much is not counted


@pytest.mark.parametrize("count", [3, 4, 5, 7])
def test_held_karp_is_the_best_of_all_permutations(count):
    x = np.random.default_rng(0).random((4, count, 2))
    found = held_karp(x)
    for one, tour in zip(x, found, strict=True):
        assert sorted(tour.tolist()) == [*range(count)]
        best = min(tour_length(one, [0, *rest]) for rest in itertools.permutations(range(1, count)))
        assert math.isclose(tour_length(one, tour), best)
        assert tour[0] == one[:, 0].argmin() and polygon_area(one[tour]) > 0
        assert turned(tour.tolist()[::-1], one) == tour.tolist()
        assert not crosses_itself(one[tour])
    np.testing.assert_array_equal(held_karp(x[1]), found[1])


def test_exact_is_at_most_two_opt_is_at_most_greedy():
    x = np.random.default_rng(1).random((20, 11, 2))
    lengths = [
        [float(tour_length(one, make(one))) for one in x]
        for make in (held_karp, two_opt, greedy_tour)
    ]
    exact, improved, greedy = map(np.array, lengths)
    assert (exact <= improved + 1e-12).all() and (improved <= greedy + 1e-12).all()
    assert exact.sum() < improved.sum() < greedy.sum()
    assert sorted(held_karp(some(12)).tolist()) == [*range(12)]


def test_samples_are_a_function_of_task_points_and_seed():
    for task in ("hull", "delaunay", "tsp"):
        a, b, c = (draw(task, 5, 3, seed) for seed in (0, 0, (0, 1)))
        np.testing.assert_array_equal(a.points, b.points)
        np.testing.assert_array_equal(a.answers, b.answers)
        assert not np.array_equal(a.points, c.points)
        assert a.points.shape == (3, 5, 2) and (a.answers < 5).all()
    flat = [corner for t in delaunay(c.points[0]) for corner in t]
    found = draw("delaunay", 5, 3, (0, 1)).answers[0]
    assert found[found >= 0].tolist() == flat
    assert padded_answers([[1], [2, 3]]).tolist() == [[1, -1], [2, 3]]


def test_points_on_a_line_have_no_hull():
    line = np.stack([np.arange(5.0), np.arange(5.0)], 1)
    for answer in (hull, delaunay):
        with pytest.raises(ValueError, match="points: all 5 lie on a line"):
            answer(line)
