"""Triton kernels of attention for some of the queries: the kernels of dense attention, with lists of
queries.

The lists have the shape of ``keep`` and are made on the GPU, so no launch waits for their lengths. A
program whose tile lies beyond the end of its head's list only reads the length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from xattn.kernels.aot import Case
from xattn.kernels.ragged_queries.reference import Problem
from xattn.kernels.softmax import triton as dense


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    return dense.forward(p.dense, query_lists(p.keep))


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    return dense.backward(p.dense, outputs, grads, wanted, query_lists(p.keep))


def query_lists(keep: Tensor) -> dense.Lists:
    """The lists of queries that each head keeps, from ``keep`` (B, H, N)."""
    n = keep.shape[2]
    ends = keep.cumsum(-1)
    place = torch.where(keep, ends - 1, n)  # the last place is for all that are left out
    number = torch.arange(n, dtype=torch.int32, device=keep.device).expand(keep.shape)
    queries = number.new_empty(*keep.shape[:2], n + 1).scatter_(2, place, number)
    return dense.Lists(queries, ends.int())


def compile_cases() -> Iterator[Case]:
    return dense.compile_cases(listed=True)
