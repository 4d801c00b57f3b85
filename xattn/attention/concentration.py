"""How far attention lies in one region of its keys: a penalty, its proximal step, and a bound.

    loss = sum over heads and regions of w_b |A_b|_F             A_b: the columns of region b
    step: A_b <- A_b max(0, 1 - t w_b / |A_b|_F)                 argmin of |Z - A|_F^2 / 2 + t loss(Z)

    if every score inside a region of n of N keys exceeds all others by m or more, at temperature T,
    mass outside <= e = (N - n) / (N - n + n exp(m / T))
    entropy      <= h(e) + (1 - e) ln n + e ln(N - n)            h(e) = - e ln e - (1 - e) ln(1 - e)

and ln N where m < 0. The dial of :mod:`~xattn.attention.localist` has
m = beta (c_b - the next c) - (max - min of the trained scores). Nothing here is trained; the loss is for
training of your own. arXiv 2510.17358 (abstract; the formulas are ours).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.attention.operator import Operator
from xattn.attention.regions import check_regions


class Bound(NamedTuple):
    """At most so much of a row's mass ``outside`` of the region, and so much ``entropy`` in nats."""

    outside: Tensor
    entropy: Tensor


def group_lasso(
    attention: Tensor | Operator, regions: Tensor, weights: Tensor | None = None
) -> Tensor:
    """sum_b w_b |A_b|_F of each matrix, (...): of A (..., N, S), or (B, H) of an operator, whose rows are
    read in blocks.

    Args:
        regions: LongTensor (S,), the region of each column, 0 to R - 1. Give the columns of prefix tokens a
            region of their own, with weight 0 to leave them out.
        weights: w (R,); 1 each by default.

    Raises:
        ValueError: regions that do not fit the columns, or weights that do not fit the regions.
    """
    columns = attention.shape[-1]
    count = _checked(regions, columns, weights)
    if isinstance(attention, Operator):
        every = torch.arange(attention.shape[2], device=attention.device)
        parts = every.split(attention.row_chunks()[0].stop)
        squares = sum(_squares(attention.rows(rows), regions, count) for rows in parts)
    else:
        squares = _squares(attention, regions, count)
    assert isinstance(squares, Tensor)
    zero = squares == 0  # a root has no gradient there
    norms = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
    return (norms if weights is None else norms * weights.to(norms)).sum(-1)


def group_lasso_step(
    attention: Tensor, regions: Tensor, step: float, weights: Tensor | None = None
) -> Tensor:
    """The proximal step of :func:`group_lasso` for matrices (..., N, S): each region's columns shrink
    together, and are 0 where their norm is ``step`` w_b or less.

    Raises:
        ValueError: as in :func:`group_lasso`, or a negative step.
    """
    if not 0 <= step < float("inf"):
        raise ValueError(f"step: got {step}; give a number of at least 0")
    count = _checked(regions, attention.shape[-1], weights)
    norms = _squares(attention, regions, count).sqrt()
    line = step * torch.ones_like(norms) if weights is None else step * weights.to(norms)
    left = torch.where(norms > line, 1 - line / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    return attention * left[..., regions.to(left.device)][..., None, :]


def concentration_bound(
    inside: int, keys: int, margin: Tensor | float, temperature: float = 1.0
) -> Bound:
    """The bounds of the module's heading for rows with margins m, in the shape of ``margin``.

    Args:
        inside: n, keys of the region; ``keys``: N, all of them.

    Raises:
        ValueError: an empty region, one of all keys, or a temperature that is not positive.
    """
    if not 0 < inside < keys:
        raise ValueError(f"inside: got {inside} of {keys} keys; give 1 to {keys - 1}")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; give a positive number")
    outside = keys - inside
    m = margin if isinstance(margin, Tensor) else torch.tensor(float(margin), device="cpu")
    m = m.double() / temperature
    e = outside / (outside + inside * m.exp())
    most = e.clamp_max(outside / keys)  # where the entropy is largest, ln N
    own = -torch.special.xlogy(most, most) - torch.special.xlogy(1 - most, 1 - most)
    return Bound(e, own + (1 - most) * math.log(inside) + most * math.log(outside))


def _squares(a: Tensor, regions: Tensor, count: int) -> Tensor:
    """|A_b|_F^2, (..., R)."""
    columns = a.square().sum(-2)
    return columns.new_zeros(*columns.shape[:-1], count).index_add(
        -1, regions.to(columns.device), columns
    )


def _checked(regions: Tensor, columns: int, weights: Tensor | None) -> int:
    """The number of regions."""
    if regions.shape != (columns,):
        raise ValueError(
            f"regions: got shape {tuple(regions.shape)}; give a number for each of {columns} columns"
        )
    check_regions(regions)
    count = int(regions.max()) + 1
    if weights is not None and (weights.shape != (count,) or not bool((weights >= 0).all())):
        raise ValueError(
            f"weights: got {weights.tolist()}; give {count} numbers of at least 0, one for each region"
        )
    return count
