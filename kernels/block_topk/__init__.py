"""The best key blocks of every query block, without a stored score matrix.

    index_m = the s candidates c of the highest r_mc,   r_mc = reduce_{i in block m, heads} scale q_i . k_c

Candidates are pooled keys. Native Sparse Attention (arXiv 2502.11089) scores by softmax and sums over
the heads of a group, InfLLM v2 (arXiv 2509.24663) pools the scores of overlapping windows, Log-linear
Sparse Attention (arXiv 2512.16615) searches level by level among the children of chosen blocks.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.block_sparse.block_lists import check_index
from xattn.kernels.block_topk import cpu, reference

__all__ = ["block_topk"]

REDUCTIONS = ("sum", "mean", "max")


def block_topk(
    q: Tensor,
    k: Tensor,
    s: int,
    *,
    q_block: int = 1,
    reduce: str = "sum",
    softmax: bool = False,
    spread: tuple[int, int, int, str] | None = None,
    forced: Tensor | None = None,
    within: Tensor | None = None,
    children: int | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Numbers and scores of the ``s`` best candidates of every query block; no gradient.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, C, D), the candidates. The H // Hk query heads of a key head
            choose together. Mq = ceil(N / q_block).
        s: length of the lists; if there are fewer candidates, the rest is -1.
        reduce: "sum", "mean" or "max" over the queries of a block and the heads of a group.
        softmax: of each query over the candidates that it may see, before the reduction.
        spread: (kernel, stride, padding, "max" | "sum" | "mean") pools the reduced scores of the C
            candidates into those of M = (C + 2 padding - kernel) // stride + 1 blocks, which are the
            candidates from then on. Padding and hidden candidates do not count.
        forced: (B or 1, 1 or Hk, Mq, f) int32, candidates that are always taken, first and with score
            +inf; -1 is ignored.
        within: (B or 1, 1 or Hk, Mp, sp) int32, the choice of a coarser level; -1 is ignored. Query
            block m belongs to row m // ceil(Mq / Mp), and takes only candidates c whose parent
            c // children is in that row.
        children: number of candidates per parent; needed with ``within``.
        visible: (Mq,) int32, how many of the C candidates, counted from the first, a query block sees.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        index (B, Hk, Mq, s) int32 and scores (B, Hk, Mq, s) in float32 (float64 for float64): by
        descending score, ties by the lowest number, -1 and -inf where there are fewer.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not match; a number out of range (on
            a GPU only with ``XATTN_CHECK=1``).
    """
    kernel, stride, padding, pooling = (1, 1, 0, "max") if spread is None else spread
    _check(q, k, s, q_block, reduce, kernel, stride, padding, pooling)
    _check_lists(q, k, q_block, forced, within, children, visible)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.xattn.block_topk(
        q.detach(), k.detach(), forced, within, visible, s, q_block, reduce, softmax,
        [kernel, stride, padding], pooling, children or 1, scale, choose(backend, q.device),
    )  # fmt: skip


def _check(
    q: Tensor,
    k: Tensor,
    s: int,
    q_block: int,
    reduce: str,
    kernel: int,
    stride: int,
    padding: int,
    pooling: str,
) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; give (B, H, tokens, width)")
        if x.dtype != q.dtype or x.device != q.device or not x.is_floating_point():
            raise ValueError(
                f"{name}: got {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; give floating "
                f"point of one kind"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; q {tuple(q.shape)} needs the same B and D, and heads "
            f"that divide its {q.shape[1]}"
        )
    if s < 1 or q_block < 1:
        raise ValueError(f"s, q_block: got {s}, {q_block}; give at least 1")
    for name, value in (("reduce", reduce), ("spread", pooling)):
        if value not in REDUCTIONS:
            raise ValueError(f"{name}: got {value!r}; choose one of {', '.join(REDUCTIONS)}")
    fits = kernel >= 1 and stride >= 1 and 0 <= padding < kernel
    if not fits or k.shape[2] + 2 * padding < kernel:
        raise ValueError(
            f"spread: got kernel {kernel}, stride {stride}, padding {padding} for {k.shape[2]} "
            f"candidates; give a kernel of 1 to C + 2 padding, a stride of at least 1 and a padding "
            f"below the kernel"
        )


def _check_lists(
    q: Tensor,
    k: Tensor,
    q_block: int,
    forced: Tensor | None,
    within: Tensor | None,
    children: int | None,
    visible: Tensor | None,
) -> None:
    batch, heads, rows = k.shape[0], k.shape[1], -(-q.shape[2] // q_block)
    for name, x, length in (("forced", forced, rows), ("within", within, None)):
        if x is None:
            continue
        fits = x.ndim == 4 and x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
        if not fits or 0 in x.shape or x.shape[2] != (length or x.shape[2]):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; give (1 or {batch}, 1 or {heads}, "
                f"{length or 'parents'}, entries)"
            )
    if visible is not None and visible.shape != (rows,):
        raise ValueError(f"visible: got shape {tuple(visible.shape)}; give ({rows},)")
    for name, x in (("forced", forced), ("within", within), ("visible", visible)):
        if x is not None and (x.dtype != torch.int32 or x.device != q.device):
            raise ValueError(f"{name}: got {x.dtype} on {x.device}; give int32 on {q.device}")
    if (within is None) != (children is None) or (children is not None and children < 1):
        raise ValueError(
            f"children: got {children}; give the number of candidates of a parent with within, and "
            f"only then"
        )


def _path(backend: str) -> Any:
    if backend == "triton":
        from xattn.kernels.block_topk import triton

        return triton
    return reference if backend == "reference" else cpu


@torch.library.custom_op(
    "xattn::block_topk",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor? forced, Tensor? within, Tensor? visible, int s, int q_block, "
        "str reduce, bool softmax, int[] spread, str pooling, int children, float scale, str backend)"
        " -> (Tensor, Tensor)"
    ),
)
def _topk(q, k, forced, within, visible, s, q_block, reduce, softmax, spread, *rest):  # type: ignore[no-untyped-def]
    pooling, children, scale, backend = rest
    candidates = (k.shape[2] + 2 * spread[2] - spread[0]) // spread[1] + 1
    if within is not None:
        check_index(within, -(-candidates // children), "within")
    if forced is not None and (forced.device.type == "cpu" or os.environ.get("XATTN_CHECK") == "1"):
        low, high = (int(x) for x in forced.aminmax())
        if low < -1 or high >= candidates:
            raise ValueError(
                f"forced: got {low if low < -1 else high}; give -1 (ignored) to {candidates - 1}"
            )
    with own_precision(q):
        index, scores = _path(backend).topk(
            q,
            k,
            forced,
            within,
            visible,
            s,
            q_block,
            reduce,
            softmax,
            spread,
            pooling,
            children,
            scale,
        )
    return index.contiguous(), scores.contiguous()


@_topk.register_fake
def _(q, k, forced, within, visible, s, q_block, *rest):  # type: ignore[no-untyped-def]
    shape = (*k.shape[:2], -(-q.shape[2] // q_block), s)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=wide)
