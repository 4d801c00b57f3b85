"""Triton kernels of attention of some of the queries: those of dense attention, with lists of queries.

The lists have the shape of ``keep`` and are made on the GPU, so no launch waits for their lengths; a
program whose tile lies behind the end of its head's list only reads that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import product

import torch
from torch import Tensor

from xattn.kernels.aot import DTYPES, WIDTHS, Case, make_case
from xattn.kernels.ragged_queries.reference import Problem
from xattn.kernels.softmax import triton as dense


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    return dense.forward(p.dense, lists(p.keep))


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    return dense.backward(p.dense, outputs, grads, wanted, lists(p.keep))


def lists(keep: Tensor) -> dense.Lists:
    """The queries that each head keeps, of ``keep`` (B, H, N)."""
    n = keep.shape[2]
    ends = keep.cumsum(-1)
    place = torch.where(keep, ends - 1, n)  # the last place is for all that are left out
    number = torch.arange(n, dtype=torch.int32, device=keep.device).expand(keep.shape)
    queries = number.new_empty(*keep.shape[:2], n + 1).scatter_(2, place, number)
    return dense.Lists(queries, ends.int())


def compile_cases() -> Iterator[Case]:
    """Every kernel at N = S = 4096 with 12 heads, half of the queries kept: plain and causal."""
    n, heads = 4096, 12
    kernels = {
        "forward": dense.forward_kernel,
        "dq": dense.dq_kernel,
        "dkv": dense.dkv_kernel,
    }
    products, queries = {"forward": 2, "dq": 3, "dkv": 4}, {"forward": 2, "dq": 3, "dkv": 2}
    keys = {"forward": 2, "dq": 2, "dkv": 4}
    for name, dtype, d, causal in product(kernels, DTYPES, WIDTHS, (False, True)):
        if dtype == "fp16" and not causal:
            continue
        size = 4 if dtype == "fp32" else 2
        flags = {} if name == "forward" else {"WRITE": False}
        options = dense.options(name, d, d, dtype != "fp32", False, causal, listed=True)
        yield make_case(
            kernels[name],
            dtype,
            {**options, **flags},
            f"ragged_queries {name} {dtype} D={d}{' causal' if causal else ''}",
            operations=products[name] * heads * n * n * d * (0.5 if causal else 1.0),
            bytes=heads * n * (queries[name] / 2 + keys[name]) * d * size,
            wide=("lse_ptr", "delta_ptr", "ds_ptr", "db_ptr"),
            integers=("queries_ptr", "ends_ptr"),
        )
