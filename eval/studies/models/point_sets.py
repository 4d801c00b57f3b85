"""Tasks on points in the unit square whose answers are sequences of them: hulls, triangles, tours.

The true hulls and Delaunay triangles are those of ``scipy.spatial``; tours are exact by Held and
Karp (1962). A network that treats its points as a set cannot see their indices, so answers begin at
the leftmost point and run counter-clockwise; triangles are sorted by their incenters, their corners
from left to right.

Pointer networks answer with sequences of elements of their input, of any length (arXiv 1506.03134).

    e = encoder(points),    d_t = LSTM(e of the point of step t - 1)
    p_t = softmax over j of v . tanh(W_1 e_j + W_2 d_t)

    net = PointerNet()
    loss = net.loss(points, answers)            # (B, n, 2) and (B, T), all steps in one pass
    net.answers(points, beam=4)                 # (B, T), -1 after the end

The encoder is a transformer without positions, which treats points as a set (1511.06391), or the
paper's LSTM, which reads them by index. Visited points have probability 0, and an end symbol, a
learned vector alongside the points, ends a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from xattn.attention.base import check_whole
from xattn.heads.pointer import Pointing, remaining_elements

State = tuple[Tensor, Tensor]


class PointerNet(nn.Module):
    """A network on points (B, n, 2) that answers with sequences of these points.

    Args:
        width: of all vectors; ``layers`` and ``heads``: of the transformer.
        encoder: "set" or "lstm".
        memory: whether d_t comes from an LSTM over the previous answers; without, it is the same at
            every step, and the network is a Plackett-Luce model.
        revisit: whether a point may be pointed to again, as for triangles.
        end: whether there is an end symbol; without one, answers are permutations.
    """

    def __init__(
        self,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
        encoder: Literal["set", "lstm"] = "set",
        memory: bool = True,
        revisit: bool = False,
        end: bool = True,
    ) -> None:
        super().__init__()
        self.memory, self.revisit, self.has_end = memory, revisit, end
        self.encoder: Any
        if encoder == "set":
            self.embed = nn.Linear(2, width)
            layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.encoder = nn.TransformerEncoder(
                layer,
                check_whole("layers", layers),
                nn.LayerNorm(width),
                enable_nested_tensor=False,
            )
            self.start = nn.Linear(width, 2 * width)
        else:
            self.encoder = nn.LSTM(2, width, batch_first=True)
        self.first = nn.Parameter(torch.randn(width) * 0.1)  # the decoder's first input
        self.end = nn.Parameter(torch.randn(width) * 0.1) if end else None
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.pointing = Pointing(width)

    def encoded(self, points: Tensor) -> tuple[Tensor, State]:
        """Encode points (B, n, 2) as (B, n, C), followed by the end symbol, if any; also returns
        the decoder's first state."""
        if isinstance(self.encoder, nn.LSTM):
            e, state = self.encoder(points)
        else:
            e = self.encoder(self.embed(points))
            h, c = self.start(e.mean(1)).chunk(2, -1)
            state = (h.tanh()[None], c[None])
        if self.end is not None:
            e = torch.cat([e, self.end.expand(len(e), 1, -1)], 1)
        return e, state

    def forward(self, points: Tensor, answers: Tensor) -> Tensor:
        """Log probabilities (B, T + 1, n + 1) of each step, given the previous ones of ``answers``
        (B, T).

        The end symbol is the last element; without one, they are (B, T, n).
        """
        e, state = self.encoded(points)
        read = answers[:, :-1] if self.end is None else answers
        read = torch.where(
            read < 0, points.shape[1], read
        )  # the end symbol; the loss ignores these steps
        pointed = e.gather(1, read[..., None].expand(-1, -1, e.shape[2]))
        inputs = torch.cat([self.first.expand(len(e), 1, -1), pointed], 1)
        if self.memory:
            queries = self.decoder(inputs, state)[0]
        else:
            queries = state[0][0][:, None].expand_as(inputs)
        scores = self.pointing(e, queries)
        return self._allowed(scores, self.steps(answers)).log_softmax(-1)

    def steps(self, answers: Tensor) -> Tensor:
        """Targets of :meth:`forward`: ``answers`` (B, T), then the end symbol as -2, then -1."""
        if self.end is None:
            return answers
        padded = F.pad(answers, (0, 1), value=-1)
        ends = (padded < 0).cumsum(1) == 1
        return torch.where(ends, -2, padded)

    def loss(self, points: Tensor, answers: Tensor) -> Tensor:
        """Negative log likelihood of ``answers`` (B, T), averaged over their steps."""
        log_p = self(points, answers)
        return F.nll_loss(log_p.flatten(0, 1), self._targets(points, answers).flatten())

    def log_likelihood(self, points: Tensor, answers: Tensor) -> Tensor:
        """The log likelihood (B,) of ``answers`` (B, T), including the end symbol."""
        target = self._targets(points, answers)
        found = self(points, answers).gather(2, target.clamp_min(0)[..., None])[..., 0]
        return torch.where(target < 0, 0, found).sum(1)

    def _targets(self, points: Tensor, answers: Tensor) -> Tensor:
        steps = self.steps(answers)
        return torch.where(steps == -2, points.shape[1], torch.where(steps == -1, -100, steps))

    def _allowed(self, scores: Tensor, steps: Tensor) -> Tensor:
        if self.revisit:
            return scores
        return scores.masked_fill(~remaining_elements(steps, scores.shape[2]), -torch.inf)

    @torch.no_grad()
    def answers(self, points: Tensor, beam: int = 1, longest: int | None = None) -> Tensor:
        """The likeliest answers (B, T) that a search with ``beam`` sequences finds, -1 after their ends; a
        beam of 1 takes the likeliest point at each step.

        Args:
            longest: most steps; by default n, or, with ``revisit``, 3 (2 n - 5), the corners of the
                most triangles possible.
        """
        check_whole("beam", beam)
        e, state = self.encoded(points)
        count, b, keys = points.shape[1], len(points), e.shape[1]
        most = longest or (max(1, 3 * (2 * count - 5)) if self.revisit else count)
        e = e.repeat_interleave(beam, 0)
        state = (state[0].repeat_interleave(beam, 1), state[1].repeat_interleave(beam, 1))
        inputs = self.first.expand(b * beam, 1, -1)
        found = points.new_full((b, beam, 0), -1, dtype=torch.long)
        free = torch.ones(b, beam, keys, dtype=torch.bool, device=points.device)
        done = torch.zeros(b, beam, dtype=torch.bool, device=points.device)
        total = points.new_full((b, beam), -torch.inf)
        total[:, 0] = 0
        for _ in range(most):
            query = state[0][0][:, None]
            if self.memory:
                query, state = self.decoder(inputs, state)
            scores = self.pointing(e, query).view(b, beam, keys)
            log_p = scores.masked_fill(~free, -torch.inf).log_softmax(-1)
            stay = torch.full_like(log_p, -torch.inf)
            stay[..., -1] = 0  # a sequence that has ended stays as it is
            log_p = torch.where(done[..., None], stay, log_p)
            total, best = (total[..., None] + log_p).flatten(1).topk(beam, 1)
            parent, point = best // keys, best % keys
            found, free = (_of(x, parent) for x in (found, free))
            done = done.gather(1, parent)
            if self.end is not None:
                done = done | (point == count)
            found = torch.cat([found, point.masked_fill(done, -1)[..., None]], 2)
            if not self.revisit:
                ended = torch.arange(keys, device=points.device) == count
                free = free & ((point[..., None] != torch.arange(keys, device=e.device)) | ended)
            flat = (parent + beam * torch.arange(b, device=e.device)[:, None]).flatten()
            state = (state[0][:, flat], state[1][:, flat])
            inputs = e[torch.arange(b * beam, device=e.device), point.flatten()][:, None]
            if bool(done.all()):
                break
        return found[:, 0]  # the beam is sorted


def _of(x: Tensor, parent: Tensor) -> Tensor:
    """Rows (B, b, ...) of ``x`` by ``parent`` (B, b)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))


Points = NDArray[np.float64]
Indices = NDArray[np.int64]


class Samples(NamedTuple):
    """``points`` (B, n, 2), and ``answers`` (B, T), indices of points; shorter ones end with -1."""

    points: Points
    answers: Indices


def draw(task: str, points: int, count: int, seed: int | Sequence[int] = 0) -> Samples:
    """Draw points uniformly in the unit square, with answers; a pure function of the arguments."""
    drawn = np.random.default_rng(seed).random((count, points, 2))
    if task == "tsp":
        return Samples(drawn, held_karp(drawn))
    answer = hull if task == "hull" else flat_triangles
    return Samples(drawn, padded_answers([answer(one) for one in drawn]))


def flat_triangles(points: ArrayLike) -> list[int]:
    """The triangles of :func:`delaunay` as one sequence of corners."""
    return [corner for triangle in delaunay(points) for corner in triangle]


def padded_answers(answers: Sequence[Sequence[int]]) -> Indices:
    """Sequences of different lengths as rows (B, T), -1 after their ends."""
    made = np.full((len(answers), max(map(len, answers))), -1, dtype=np.int64)
    for row, answer in zip(made, answers, strict=True):
        row[: len(answer)] = answer
    return made


# ---------------------------------------------------------------------- hull


def hull(points: ArrayLike) -> list[int]:
    """The corners of the convex hull of points (n, 2), counter-clockwise from the leftmost point.

    >>> hull([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.6, 0.4]])
    [0, 2, 1]
    """
    x = checked_points(points)
    from scipy.spatial import ConvexHull

    return from_leftmost(_qhull(ConvexHull, x).vertices.tolist(), x)


def from_leftmost(order: Sequence[int], points: Points) -> list[int]:
    """A closed path rotated to begin at its leftmost point, the lowest of several."""
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
    """Area of the polygon ``answer`` relative to the hull's, at most 1; None for a failed answer,
    which crosses itself or has fewer than 3 corners."""
    x = checked_points(points)
    if len(answer) < 3 or crosses_itself(x[list(answer)]):
        return None
    return min(1.0, abs(polygon_area(x[list(answer)])) / polygon_area(x[hull(x)]))


# ---------------------------------------------------------------------- Delaunay


def delaunay(points: ArrayLike) -> list[tuple[int, int, int]]:
    """Delaunay triangles of points (n, 2), sorted by incenters, with corners from left to right."""
    x = checked_points(points)
    from scipy.spatial import Delaunay

    found = [sorted(t, key=lambda i: tuple(x[i])) for t in _qhull(Delaunay, x).simplices.tolist()]
    found.sort(key=lambda t: incenter(x[t]))
    return [(a, b, c) for a, b, c in found]


def incenter(corners: Points) -> tuple[float, float]:
    """Centre of the inscribed circle of a triangle (3, 2)."""
    sides = np.linalg.norm(np.roll(corners, -1, 0) - np.roll(corners, -2, 0), axis=1)
    x, y = (sides[:, None] * corners).sum(0) / sides.sum()
    return float(x), float(y)


def triangle_coverage(truth: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the triangles in ``truth`` that are also in ``answer``; both are sequences of
    corners.

    >>> triangle_coverage([0, 1, 2, 1, 2, 3], [2, 1, 0, 0, 1, 3])
    0.5
    """
    own, given = ({frozenset(a[i : i + 3]) for i in range(0, len(a), 3)} for a in (truth, answer))
    return len(own & given) / len(own)


# ---------------------------------------------------------------------- tours


def held_karp(points: ArrayLike) -> Indices:
    """Shortest tours (B, n) of points (B, n, 2), counter-clockwise from the leftmost point.

    For a single set (n, 2), the result is a single tour (n,). In O(n^2 2^n), for all sets at once,
    it finds the shortest path through each subset of the other points, for each end point.
    """
    x = np.asarray(points, dtype=np.float64)
    if x.ndim == 2:
        return held_karp(x[None])[0]  # type: ignore[no-any-return]
    n = x.shape[1]
    parts = np.array_split(x, max(1, len(x) * n * 2**n // 2**24))
    tours = np.concatenate([_shortest(part) for part in parts])
    return np.array([turned(tour.tolist(), one) for tour, one in zip(tours, x, strict=True)])


def _shortest(x: Points) -> Indices:
    """Tours (B, n) that begin at point 0."""
    apart = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    b, n = apart.shape[:2]
    others = n - 1
    # best[:, s, j]: shortest path from point 0 through the subset s of the others that ends at j.
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
    """The tour in counter-clockwise order from its leftmost point."""
    ahead = tour if polygon_area(points[list(tour)]) >= 0 else list(reversed(tour))
    return from_leftmost(ahead, points)


def tour_length(points: ArrayLike, tour: ArrayLike) -> Any:
    """Length of tours (..., n) through points (..., n, 2), back to their start."""
    x = np.asarray(points, dtype=np.float64)
    path = np.take_along_axis(x, np.asarray(tour)[..., None], -2)
    return np.linalg.norm(path - np.roll(path, -1, -2), axis=-1).sum(-1)


def greedy_tour(points: ArrayLike) -> list[int]:
    """A tour from the leftmost of points (n, 2), always to the nearest point that is left."""
    x = checked_points(points)
    tour = [min(range(len(x)), key=lambda i: tuple(x[i]))]
    left = set(range(len(x))) - set(tour)
    while left:
        here = x[tour[-1]]
        tour.append(min(left, key=lambda i: (float(np.linalg.norm(x[i] - here)), i)))
        left.remove(tour[-1])
    return tour


def two_opt(points: ArrayLike, tour: Sequence[int] | None = None) -> list[int]:
    """Improve ``tour``, by default the greedy one, by reversing runs while that shortens it."""
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
    """Points (n, 2) in float64."""
    x = np.asarray(points, dtype=np.float64)
    return x


def _qhull(make: Any, x: Points) -> Any:
    from scipy.spatial import QhullError

    try:
        return make(x)
    except QhullError:
        raise ValueError(
            f"points: all {len(x)} lie on a line, so there is no hull; give others"
        ) from None
