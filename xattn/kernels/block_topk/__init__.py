"""Finds the best key blocks for every query block without storing a score matrix.

    index_m = the s candidates c of the highest r_mc,   r_mc = reduce_{i in block m, heads} scale q_i . k_c

Candidates are pooled keys. Native Sparse Attention (arXiv 2502.11089) scores by softmax and sums over the
heads of a group, InfLLM v2 (arXiv 2509.24663) pools the scores of overlapping windows, and Log-linear
Sparse Attention (arXiv 2512.16615) searches level by level among the children of selected blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.block_sparse.block_lists import check_index, check_numbers
from xattn.kernels.block_topk.reference import Problem
from xattn.kernels.checks import (
    check_attention,
    check_floating,
    check_int32,
    check_positive,
    score_scale,
)
from xattn.kernels.op import register
from xattn.kernels.softmax.reference import wide

REDUCTIONS = ("sum", "mean", "max")


def block_topk(
    q: Tensor,
    k: Tensor,
    s: int,
    *,
    q_block: int = 1,
    reduce: str = "sum",
    softmax: bool = False,
    spread: tuple[int, int, int, str]
    | tuple[Tensor, str]
    | tuple[Tensor, Tensor, str]
    | None = None,
    forced: Tensor | None = None,
    within: Tensor | None = None,
    children: int | None = None,
    visible: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the indices and scores of the ``s`` best candidates for every query block, without gradients.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, C, D), the candidates. The H // Hk query heads of a key head
            select together. Mq = ceil(N / q_block).
        s: length of the lists; if there are fewer candidates, the other entries are -1.
        reduce: "sum", "mean" or "max" over the queries of a block and the heads of a group.
        softmax: whether to apply a softmax over each query's visible candidates before the reduction.
        spread: (kernel, stride, padding, "max" | "sum" | "mean") pools the reduced scores of the C
            candidates into scores of M = (C + 2 padding - kernel) // stride + 1 blocks, which are then
            the candidates. Padding and hidden candidates are ignored. Alternatively (table, "max" | "sum" |
            "mean"), where the table (M, f) int32 has the candidates that each block pools (-1 is ignored),
            or (table, weights, "sum"), where weights (M, f) multiply their scores.
        forced: (B or 1, 1 or Hk, Mq, f) int32, candidates that are always selected, first and with score
            +inf; -1 is ignored.
        within: (B or 1, 1 or Hk, Mp, sp) int32, the selection of a coarser level; -1 is ignored. Query
            block m belongs to row m // ceil(Mq / Mp) and selects only candidates c whose parent
            c // children is in that row.
        children: number of candidates per parent; needed with ``within``.
        visible: (Mq,) int32, the number of candidates, counted from the first, that each query block sees.
        lse: (B, H, N), used with ``softmax``: normalises each query's scores in place of their own
            log-sum-exp; -inf is treated as 0, and weights are capped at exp(80).
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        index (B, Hk, Mq, s) int32 and scores (B, Hk, Mq, s) in float32 (float64 for float64), in
        descending order of score, with ties by the lowest index; -1 and -inf if there are fewer.

    Raises:
        ValueError: shapes, dtypes, devices or options do not match, or a number is out of range (on a GPU
            checked only with ``XATTN_CHECK=1``).
    """
    table: Tensor | None = None
    weight: Tensor | None = None
    window, pooling = [1, 1, 0], "max"
    if spread is not None and len(spread) == 2:
        table, pooling = spread
    elif spread is not None and len(spread) == 3:
        table, weight, pooling = spread
    elif spread is not None:
        *window, pooling = spread
    check_attention(q, k)
    check_positive(s=s, q_block=q_block)
    p = Problem(
        q.detach(), k.detach(), forced, within, visible, table, weight, lse, s, q_block, reduce, softmax,
        window, pooling, children or 1,
        score_scale(scale, q), backend,
    )  # fmt: skip
    _check_reductions(p)
    _check_lists(p)
    if (within is None) != (children is None) or (children is not None and children < 1):
        raise ValueError(
            f"children: got {children}; give the number of candidates of a parent with within, and "
            f"only then"
        )
    limit = width_limit(q)
    if min(s, p.candidates) > SLOTS:
        limit = f"got s = {s}; give at most {SLOTS}"
    return _op(p._replace(backend=choose(backend, q.device, q.dtype, limit)))


SLOTS = 256  # largest list that a program of the kernels holds


def _check_reductions(p: Problem) -> None:
    for name, value in (("reduce", p.reduce), ("spread", p.pooling)):
        if value not in REDUCTIONS:
            raise ValueError(f"{name}: got {value!r}; choose one of {', '.join(REDUCTIONS)}")
    (kernel, stride, padding), c = p.spread, p.k.shape[2]
    fits = kernel >= 1 and stride >= 1 and 0 <= padding < kernel
    if not fits or c + 2 * padding < kernel:
        raise ValueError(
            f"spread: got kernel {kernel}, stride {stride}, padding {padding} for {c} "
            f"candidates; give a kernel of 1 to C + 2 padding, a stride of at least 1 and a padding "
            f"below the kernel"
        )


def _check_lists(p: Problem) -> None:
    batch, heads, rows = p.k.shape[0], p.k.shape[1], p.query_blocks
    for name, x, length in (("forced", p.forced, rows), ("within", p.within, None)):
        if x is None:
            continue
        fits = x.ndim == 4 and x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
        if not fits or 0 in x.shape or x.shape[2] != (length or x.shape[2]):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}; give (1 or {batch}, 1 or {heads}, "
                f"{length or 'parents'}, entries)"
            )
    if p.table is not None and (p.table.ndim != 2 or 0 in p.table.shape):
        raise ValueError(f"spread: got a table of shape {tuple(p.table.shape)}; give (M, f)")
    if p.weight is not None:
        if p.table is None or p.weight.shape != p.table.shape or p.pooling != "sum":
            raise ValueError(
                f"spread: got weights of shape {tuple(p.weight.shape)} and {p.pooling!r}; give those of "
                f"the table and 'sum'"
            )
        check_floating("spread", p.weight, p.q)
    if p.lse is not None:
        if not p.softmax or p.lse.shape != p.q.shape[:3]:
            raise ValueError(
                f"lse: got shape {tuple(p.lse.shape)} with softmax={p.softmax}; give "
                f"{tuple(p.q.shape[:3])}, one for each query, and softmax=True"
            )
        check_floating("lse", p.lse, p.q)
    if p.visible is not None and p.visible.shape != (rows,):
        raise ValueError(f"visible: got shape {tuple(p.visible.shape)}; give ({rows},)")
    whole = {"forced": p.forced, "within": p.within, "visible": p.visible, "spread": p.table}
    for name, x in whole.items():
        if x is not None:
            check_int32(name, x, p.q)


def _check_numbers(p: Problem) -> None:
    if p.table is not None:
        check_numbers(p.table, p.k.shape[2], "spread")
    if p.within is not None:
        check_index(p.within, -(-p.candidates // p.children), "within")
    if p.forced is not None:
        check_numbers(p.forced, p.candidates, "forced")


def _empty(p: Problem) -> tuple[Tensor, Tensor]:
    shape = (*p.k.shape[:2], p.query_blocks, p.s)
    return p.q.new_empty(shape, dtype=torch.int32), p.q.new_empty(shape, dtype=wide(p.q.dtype))


_op = register(
    "block_topk", Problem, outputs=("index", "scores"), empty=_empty, check=_check_numbers
)
