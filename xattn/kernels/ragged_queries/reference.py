"""The definition of attention for some of the queries: dense attention with only some of its rows.

A row with lse = -inf has no weights, so the gradients are those of :mod:`xattn.kernels.softmax.reference`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.softmax import reference
from xattn.kernels.softmax.reference import Problem as DenseProblem


class Problem(NamedTuple):
    """The arguments of attention for some of the queries.

    See :func:`xattn.kernels.ragged_queries.ragged_attention`.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    keep: Tensor
    """(B, H, N), bool"""
    scale: float
    causal: bool
    backend: str

    @property
    def dense(self) -> DenseProblem:
        """The same problem with all queries."""
        return DenseProblem(self.q, self.k, self.v, None, self.scale, self.causal, self.backend)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    o, lse = reference.forward(p.dense)
    return o.masked_fill(~p.keep[..., None], 0.0), lse.masked_fill(~p.keep, -torch.inf)


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    return reference.backward(p.dense, outputs, grads, wanted)
