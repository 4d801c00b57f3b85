"""Features of random-feature attention (NeurIPS 2023, arXiv 2307.11353): M frozen heads with ReLU scores.

    Phi_m = 1/N sum_i relu(x~_0^T W_m x~_i) x~_i,    x~ = [x; 1]

RFA: W_m has independent entries of variance 1/4. BRFA: W_m is that plus W_0 = [I 0; 0 0], so a head begins
with the product <x_0, x_i>. A function that is linear in Phi is what a single attention layer with M random
heads computes; as M grows, the kernel of RFA becomes that of arc cosines, see :func:`arc_cosine`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

DEVIATION = 0.5  # of the entries of W


def random_weights(
    rows: int,
    heads: int,
    width: int,
    biased: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """W as (P, M, D + 1): query, head, key, for ``width`` D + 1; P is D + 1, or 1 for the last row."""
    w = DEVIATION * torch.randn(rows, heads, width, generator=generator)
    if biased:
        channels = torch.arange(width - 1)
        w[channels, :, channels] += 1
    return w


def with_one(x: Tensor) -> Tensor:
    """x~ = [x; 1] of (..., D)."""
    return F.pad(x, (0, 1), value=1.0)


def queries_of(x_0: Tensor, weights: Tensor) -> Tensor:
    """x~_0^T W_m for each head, (B, M, D + 1), of x~_0 (B, P)."""
    return (x_0 @ weights.flatten(1)).unflatten(1, weights.shape[1:])


def attention(scores: Tensor) -> Tensor:
    """relu(scores) / N of (B, M, N): the weights, which do not sum to 1."""
    return scores.relu() / scores.shape[-1]


def features(queries: Tensor, keys: Tensor) -> Tensor:
    """Phi (B, M, D + 1) of ``queries`` (B or 1, M, D + 1) and ``keys`` x~ (B, N, D + 1)."""
    return attention(queries @ keys.mT) @ keys


def arc_cosine(a: Tensor, b: Tensor) -> Tensor:
    """E relu(<W, A>) relu(<W, B>) for matrices of which ``a`` and ``b`` (..., P) are the entries, over W
    with independent normal entries of variance 1: |A| |B| (sqrt(1 - t^2) + t (pi - arccos t)) / (2 pi),
    t the cosine between them (Cho and Saul 2009).

    >>> x = torch.tensor([3.0, 4.0])
    >>> arc_cosine(x, x).item(), arc_cosine(x, -x).item()
    (12.5, 0.0)
    """
    sizes = a.norm(dim=-1) * b.norm(dim=-1)
    t = ((a * b).sum(-1) / sizes).clamp(-1, 1)
    return sizes * ((1 - t.square()).sqrt() + t * (math.pi - t.arccos())) / (2 * math.pi)
