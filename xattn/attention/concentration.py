"""How far attention lies in one region of its keys: a bound.

    if every score inside a region of n of N keys exceeds all others by m or more, at temperature T,
    mass outside <= e = (N - n) / (N - n + n exp(m / T))
    entropy      <= h(e) + (1 - e) ln n + e ln(N - n)            h(e) = - e ln e - (1 - e) ln(1 - e)

and ln N where m < 0. The dial of :mod:`~xattn.attention.localist` has
m = beta (c_b - the next c) - (max - min of the trained scores). arXiv 2510.17358 (abstract; the
formulas are ours).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """At most so much of a row's mass ``outside`` of the region, and so much ``entropy`` in nats."""

    outside: Tensor
    entropy: Tensor


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
