"""The definition of attention of some of the queries: all of it, then only the rows that are kept.

A row with lse = -inf has no weights, so the gradients are those of :mod:`xattn.kernels.softmax.reference`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from xattn.kernels.ragged_queries.problem import Problem
from xattn.kernels.softmax import reference


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
