"""Masked attention in bands of queries, each of which reads only the keys between its first and last.

A neighbourhood on a grid in raster order leaves most of a stored mask hidden. A band of a few rows of
the grid sees one run of keys, so it needs neither the rest of the mask nor a copy of its keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import spread_heads
from xattn.attention.operator import SoftmaxOperator

QUERIES = 64  # the fewest in a band
COUNT = 16  # the most bands
WORTH = 0.85  # the largest share of dense attention's work for which bands are used


class Band(NamedTuple):
    """Queries and keys from one token to before another, and what is added to their scores."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    bias: Tensor
    """(1, 1, rows, prefix + keys), the prefix tokens first."""


@torch.inference_mode(False)  # kept bands may serve training later
def bands_of(mask: Tensor, prefix: int) -> tuple[Band, ...]:
    """Bands of the queries behind the prefix for a mask (1, 1, N, N); none if they save too little."""
    n = mask.shape[3]
    count = min(COUNT, (n - prefix) // QUERIES)
    if count < 2:
        return ()
    step = -(-(n - prefix) // count)
    seen = ~mask[0, 0].isneginf()
    made, work = [], prefix * n
    for start in range(prefix, n, step):
        rows = start, min(start + step, n)
        visible = seen[rows[0] : rows[1], prefix:].any(0).nonzero()[:, 0] + prefix
        if not len(visible):
            return ()
        keys = int(visible[0]), int(visible[-1]) + 1
        work += (rows[1] - rows[0]) * (prefix + keys[1] - keys[0])
        part = mask[:, :, rows[0] : rows[1]]
        bias = torch.cat([part[..., :prefix], part[..., keys[0] : keys[1]]], -1)
        made.append(Band(rows, keys, bias))
    return tuple(made) if work <= WORTH * n * n else ()


class BandedOperator(SoftmaxOperator):
    """Softmax attention with a mask whose bands are known; all but A X is as without them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        mask: Tensor,
        bands: tuple[Band, ...],
        prefix: int,
    ) -> None:
        super().__init__(q, k, scale, mask, every_row=True)
        self.bands, self.prefix = bands, prefix

    @property
    def pairs(self) -> float:
        p = self.prefix
        return p * self.shape[3] + sum(
            (rows[1] - rows[0]) * (p + keys[1] - keys[0]) for rows, keys, _ in self.bands
        )

    def matvec(self, x: Tensor) -> Tensor:
        p, scale = self.prefix, self.scale
        q, k, x = self.q, spread_heads(self.k, self.shape[1]), spread_heads(x, self.shape[1])
        parts = []
        if p:
            first = self.bias[:, :, :p]  # type: ignore[index]
            parts.append(F.scaled_dot_product_attention(q[:, :, :p], k, x, first, scale=scale))
        for (start, end), keys, bias in self.bands:
            near_k, near_x = _near(k, keys, p), _near(x, keys, p)
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:end], near_k, near_x, bias, scale=scale
                )
            )
        return torch.cat(parts, 2)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return self.matvec(x)  # the same numbers as without recording


def _near(x: Tensor, keys: tuple[int, int], prefix: int) -> Tensor:
    """A band's keys or values, the prefix tokens first."""
    some = x[:, :, keys[0] : keys[1]]
    return torch.cat([x[:, :, :prefix], some], 2) if prefix else some
