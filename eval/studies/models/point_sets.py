"""Tasks on points in the unit square whose answer is a sequence of them: hull, Delaunay triangles, tours.

Truth of hull and triangles is that of ``scipy.spatial``, tours are exact by Held and Karp (1962). A network
that treats its points as a set cannot see their indices, so answers begin at the leftmost point and run
counter-clockwise; triangles are sorted by their incenters, their corners from left to right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Indices = NDArray[np.int64]
MOST_CITIES = 12
TASKS = ("hull", "delaunay", "tsp")


class Samples(NamedTuple):
    """``points`` (B, n, 2), and ``answers`` (B, T), indices of points; -1 fills up shorter ones."""

    points: Points
    answers: Indices


def draw(task: str, points: int, count: int, seed: int | Sequence[int] = 0) -> Samples:
    """Uniform points in the unit square with their answers, a pure function of the arguments.

    Raises:
        ValueError: an unknown task, fewer than 3 points, or more than exact tours take.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}; choose one of {', '.join(TASKS)}")
    if points < 3 or count < 1:
        raise ValueError(
            f"points, count: got {points}, {count}; give at least 3 points and 1 sample"
        )
    drawn = np.random.default_rng(seed).random((count, points, 2))
    if task == "tsp":
        return Samples(drawn, held_karp(drawn))
    answer = hull if task == "hull" else flat_triangles
    return Samples(drawn, filled_up([answer(one) for one in drawn]))


def flat_triangles(points: ArrayLike) -> list[int]:
    """:func:`delaunay`, corner after corner."""
    return [corner for triangle in delaunay(points) for corner in triangle]


def filled_up(answers: Sequence[Sequence[int]]) -> Indices:
    """Sequences of several lengths as rows (B, T), -1 after their ends."""
    made = np.full((len(answers), max(map(len, answers))), -1, dtype=np.int64)
    for row, answer in zip(made, answers, strict=True):
        row[: len(answer)] = answer
    return made


# ---------------------------------------------------------------------- hull


def hull(points: ArrayLike) -> list[int]:
    """The corners of the convex hull of points (n, 2), counter-clockwise from the leftmost point.

    >>> hull([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.6, 0.4]])
    [0, 2, 1]

    Raises:
        ValueError: the hull is undefined: fewer than 3 points, equal ones, or all on a line.
    """
    x = checked_points(points)
    from scipy.spatial import ConvexHull

    return from_leftmost(_qhull(ConvexHull, x).vertices.tolist(), x)


def from_leftmost(order: Sequence[int], points: Points) -> list[int]:
    """A closed path turned until it begins at its leftmost point, of equals the lowest."""
    start = min(range(len(order)), key=lambda i: tuple(points[order[i]]))
    return [*order[start:], *order[:start]]


def polygon_area(corners: ArrayLike) -> float:
    """Area of a polygon (n, 2); positive if it runs counter-clockwise.

    >>> polygon_area([[0, 0], [2, 0], [2, 1], [0, 1]])
    2.0
    """
    x, y = np.asarray(corners, dtype=np.float64).T
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


def crosses_itself(corners: ArrayLike) -> bool:
    """Whether two sides of a polygon (n, 2) that share no corner meet.

    >>> crosses_itself([[0, 0], [1, 1], [1, 0], [0, 1]])
    True
    """
    x = np.asarray(corners, dtype=np.float64)
    n = len(x)
    ends = np.roll(x, -1, 0)
    for i in range(n):
        for j in range(i + 2, n - (i == 0)):
            if _meet(x[i], ends[i], x[j], ends[j]):
                return True
    return False


def _meet(a: Points, b: Points, c: Points, d: Points) -> bool:
    def side(p: Points, q: Points, r: Points) -> float:
        return float((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return side(a, b, c) * side(a, b, d) <= 0 and side(c, d, a) * side(c, d, b) <= 0


def hull_coverage(points: ArrayLike, answer: Sequence[int]) -> float | None:
    """Area of the polygon ``answer`` over that of the hull, at most 1; None for a failed answer, one that
    crosses itself or has fewer than 3 corners."""
    x = checked_points(points)
    if len(answer) < 3 or crosses_itself(x[list(answer)]):
        return None
    return min(1.0, abs(polygon_area(x[list(answer)])) / polygon_area(x[hull(x)]))


# ---------------------------------------------------------------------- Delaunay


def delaunay(points: ArrayLike) -> list[tuple[int, int, int]]:
    """Delaunay triangles of points (n, 2), sorted by their incenters, corners from left to right.

    Raises:
        ValueError: they are undefined, as for :func:`hull`.
    """
    x = checked_points(points)
    from scipy.spatial import Delaunay

    found = [sorted(t, key=lambda i: tuple(x[i])) for t in _qhull(Delaunay, x).simplices.tolist()]
    found.sort(key=lambda t: incenter(x[t]))
    return [(a, b, c) for a, b, c in found]


def incenter(corners: Points) -> tuple[float, float]:
    """Centre of the circle inside a triangle (3, 2)."""
    sides = np.linalg.norm(np.roll(corners, -1, 0) - np.roll(corners, -2, 0), axis=1)
    x, y = (sides[:, None] * corners).sum(0) / sides.sum()
    return float(x), float(y)


def triangle_coverage(truth: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the triangles of ``truth``, corner after corner, that ``answer`` has, too.

    >>> triangle_coverage([0, 1, 2, 1, 2, 3], [2, 1, 0, 0, 1, 3])
    0.5
    """
    own, given = ({frozenset(a[i : i + 3]) for i in range(0, len(a), 3)} for a in (truth, answer))
    return len(own & given) / len(own)


# ---------------------------------------------------------------------- tours


def held_karp(points: ArrayLike) -> Indices:
    """Shortest tours (B, n) of points (B, n, 2), counter-clockwise from the leftmost point; of a single
    set (n, 2), a single one (n,).

    O(n^2 2^n), all sets at once: the best way through each subset of the others, by where it ends.

    Raises:
        ValueError: fewer than 3 points, or more than 12.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim == 2:
        return held_karp(x[None])[0]  # type: ignore[no-any-return]
    n = x.shape[1]
    if not 3 <= n <= MOST_CITIES:
        raise ValueError(
            f"points: got {n}; exact tours take 3 to {MOST_CITIES}, use two_opt for more"
        )
    parts = np.array_split(x, max(1, len(x) * n * 2**n // 2**24))
    tours = np.concatenate([_shortest(part) for part in parts])
    return np.array([turned(tour.tolist(), one) for tour, one in zip(tours, x, strict=True)])


def _shortest(x: Points) -> Indices:
    """Tours (B, n) that begin at point 0."""
    apart = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    b, n = apart.shape[:2]
    others = n - 1
    # best[:, s, j]: shortest way from point 0 through the subset s of the others, which ends at j.
    best = np.full((b, 2**others, others), np.inf)
    before = np.zeros((b, 2**others, others), dtype=np.int8)
    for j in range(others):
        best[:, 1 << j, j] = apart[:, 0, j + 1]
    for s in range(1, 2**others):
        for j in range(others):
            rest = s & ~(1 << j)
            if s >> j & 1 and rest:
                ways = best[:, rest] + apart[:, 1:, j + 1]
                before[:, s, j] = ways.argmin(1)
                best[:, s, j] = ways.min(1)
    rows = np.arange(b)
    left = np.full(b, 2**others - 1)
    last = (best[:, -1] + apart[:, 1:, 0]).argmin(1)
    tour = np.zeros((b, n), dtype=np.int64)
    for place in range(others, 0, -1):
        tour[:, place] = last + 1
        left, last = left & ~(1 << last), before[rows, left, last].astype(np.int64)
    return tour


def turned(tour: Sequence[int], points: Points) -> list[int]:
    """A tour counter-clockwise from its leftmost point."""
    ahead = tour if polygon_area(points[list(tour)]) >= 0 else list(reversed(tour))
    return from_leftmost(ahead, points)


def tour_length(points: ArrayLike, tour: ArrayLike) -> Any:
    """Length of tours (..., n) through points (..., n, 2), back to their start."""
    x = np.asarray(points, dtype=np.float64)
    path = np.take_along_axis(x, np.asarray(tour)[..., None], -2)
    return np.linalg.norm(path - np.roll(path, -1, -2), axis=-1).sum(-1)


def greedy_tour(points: ArrayLike) -> list[int]:
    """From the leftmost of points (n, 2) always to the nearest that is left."""
    x = checked_points(points)
    tour = [min(range(len(x)), key=lambda i: tuple(x[i]))]
    left = set(range(len(x))) - set(tour)
    while left:
        here = x[tour[-1]]
        tour.append(min(left, key=lambda i: (float(np.linalg.norm(x[i] - here)), i)))
        left.remove(tour[-1])
    return tour


def two_opt(points: ArrayLike, tour: Sequence[int] | None = None) -> list[int]:
    """``tour``, by default the greedy one, with runs reversed as long as that makes it shorter."""
    x = checked_points(points)
    tour = list(greedy_tour(x) if tour is None else tour)
    length, n, better = float(tour_length(x, tour)), len(tour), True
    while better:
        better = False
        for i in range(1, n - 1):
            for j in range(i + 1, n):
                other = [*tour[:i], *reversed(tour[i : j + 1]), *tour[j + 1 :]]
                found = float(tour_length(x, other))
                if found < length - 1e-12:
                    tour, length, better = other, found, True
    return tour


# ---------------------------------------------------------------------- what is refused


def checked_points(points: ArrayLike) -> Points:
    """Points (n, 2) in float64.

    Raises:
        ValueError: another shape, fewer than 3, equal or not finite.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != 2 or len(x) < 3:
        raise ValueError(f"points: got shape {x.shape}; give (n, 2) with n at least 3")
    if not np.isfinite(x).all():
        raise ValueError("points: got NaN or infinity; give finite coordinates")
    if len(np.unique(x, axis=0)) < len(x):
        raise ValueError("points: some are equal; give each once")
    return x


def _qhull(make: Any, x: Points) -> Any:
    from scipy.spatial import QhullError

    try:
        return make(x)
    except QhullError:
        raise ValueError(
            f"points: all {len(x)} lie on a line, so there is no hull; give others"
        ) from None
