"""Softmax attention in which each block of queries reads a list of key blocks.

    s_ij = scale q_i . k_j + b_j,   lse_i = log sum_{j in J(i)} exp s_ij,
    o_i = sum_{j in J(i)} exp(s_ij - lse_i) v_j

J(i) contains the keys in the blocks that are listed for the block of query i, except keys outside the
query's box (:mod:`xattn.kernels.block_sparse.box`: causal, window, n-dimensional neighbourhood). Both
outputs are differentiable, so segments of keys can be merged exactly, see :mod:`xattn.kernels.softmax`.
Source: block lists as in Native Sparse Attention (arXiv 2502.11089).
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.block_sparse.block_lists import check_index
from xattn.kernels.block_sparse.box import Box
from xattn.kernels.block_sparse.reference import Problem
from xattn.kernels.checks import (
    check_attention,
    check_floating,
    check_int32,
    check_positive,
    score_scale,
)
from xattn.kernels.op import calls_op, register
from xattn.kernels.softmax.reference import empty_outputs

_op = register(
    "block_sparse",
    Problem,
    outputs=("o", "lse"),
    empty=empty_outputs,
    gradients=("q", "k", "v", "bias"),
    check=lambda p: check_index(p.lists, p.key_blocks),
)


@calls_op(_op, tuple[Tensor, Tensor])
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    q_block: int,
    k_block: int,
    bias: Tensor | None = None,
    box: Box | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Problem:
    """Compute the attention of each query block to the key blocks in its list, with log-sum-exp.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        index: (B or 1, 1 or Hk or H, ceil(N / q_block), s) int32: numbers of key blocks, each at
            most once per row; -1 is an empty entry.
        q_block, k_block: tokens per block; the last block may be shorter.
        bias: (B or 1, 1 or Hk or H, S), added to the scores of a key; -inf hides it. Differentiable.
        box: which of the keys in these blocks a query sees; by default it sees all of them.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64). A
        row that sees no key has o = 0 and lse = -inf, and passes no gradient on.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or an index is out of range or occurs twice in
            a row (on a GPU this is checked only with ``XATTN_CHECK=1``, because reading stalls the stream).
    """
    check_attention(q, k, v)
    check_positive(q_block=q_block, k_block=k_block)
    check_lists(q, k, index, q_block, bias)
    if box is not None:
        _check_box(box, q, k)
    low, high, position, dilation, rank, limit = box or (None, None, None, (), None, None)
    return Problem(
        q, k, v, index, bias, low, high, position, rank, limit, list(dilation), q_block, k_block,
        score_scale(scale, q), choose(backend, q.device, q.dtype, width_limit(q, v)),
    )  # fmt: skip


def check_lists(q: Tensor, k: Tensor, index: Tensor, q_block: int, bias: Tensor | None) -> None:
    """Raise a ``ValueError`` if lists or a bias do not fit the queries and keys."""
    (batch, heads, n, _), (_, key_heads, s, _) = q.shape, k.shape
    rows, some_heads = -(-n // q_block), (1, key_heads, heads)
    fits = index.ndim == 4 and index.shape[0] in (1, batch) and index.shape[1] in some_heads
    if not fits or index.shape[2] != rows or index.shape[3] < 1:
        raise ValueError(
            f"index: got shape {tuple(index.shape)}; give (1 or {batch}, one of {some_heads}, "
            f"{rows}, s) for {n} queries in blocks of {q_block}"
        )
    check_int32("index", index, q)
    if bias is not None:
        fits = bias.ndim == 3 and bias.shape[0] in (1, batch) and bias.shape[1] in some_heads
        if not fits or bias.shape[2] != s:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}; give (1 or {batch}, one of {some_heads}, {s})"
            )
        check_floating("bias", bias, q)


def _check_box(box: Box, q: Tensor, k: Tensor) -> None:
    dimensions, (n, s) = len(box.dilation), (q.shape[2], k.shape[2])
    if not 1 <= dimensions <= 3 or min(box.dilation) < 1:
        raise ValueError(f"box.dilation: got {box.dilation}; give 1 to 3 numbers of at least 1")
    for name, x, rows in (
        ("low", box.low, n),
        ("high", box.high, n),
        ("position", box.position, s),
    ):
        if x.shape != (rows, dimensions):
            raise ValueError(f"box.{name}: got shape {tuple(x.shape)}; give ({rows}, {dimensions})")
        check_int32(f"box.{name}", x, q)
    for name, ranks, tokens in (("rank", box.rank, s), ("limit", box.limit, n)):
        shape = (*q.shape[:2], tokens)
        if ranks is not None and ranks.shape != shape:
            raise ValueError(f"box.{name}: got shape {tuple(ranks.shape)}; give {shape}")
        if ranks is not None:
            check_int32(f"box.{name}", ranks, q)
    if (box.rank is None) != (box.limit is None):
        raise ValueError("box.rank, box.limit: got one of them; give both or none")
