"""Grouped softmax attention: a landmark gates each key block, and each block's keys have their own softmax.

    s_ij = scale q_i . k_j + b_j,   w_ij = exp(s_ij) / sum_{j' in block(j)} exp(s_ij')
    t_ic = scale q_i . m_c + log n_c,   lse_i = log sum_{c in J(i)} exp t_ic,   g_ic = exp(t_ic - lse_i)
    o_i = sum_{c in J(i)} g_ic sum_{j in c} w_ij v_j

J(i) contains the key blocks that are listed for the block of query i and have a visible key; m_c is the
landmark of block c, and n_c a weight, 1 by default. This is softmax attention with the scores
s_ij + t_ic - log sum exp of the block's s, so lse allows merging with other segments. With
dp_ij = do_i . v_j, d_i = do_i . o_i and c_ic = sum_{j in c} w_ij dp_ij:

    ds_ij = g_ic w_ij (dp_ij - c_ic),   dt_ic = g_ic (c_ic - d_i + dlse_i)

Landmark attention (Mohtashami and Jaggi, arXiv 2305.16300), for any lists.
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.block_sparse import check_lists
from xattn.kernels.block_sparse.block_lists import check_index
from xattn.kernels.checks import (
    check_alike,
    check_attention,
    check_floating,
    check_positive,
    score_scale,
)
from xattn.kernels.grouped.reference import Problem
from xattn.kernels.op import calls_op, register
from xattn.kernels.softmax.reference import empty_outputs

_op = register(
    "grouped",
    Problem,
    outputs=("o", "lse"),
    empty=empty_outputs,
    gradients=("q", "k", "v", "marks", "bias"),
    check=lambda p: check_index(p.lists, p.key_blocks),
)


@calls_op(_op, tuple[Tensor, Tensor])
def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    marks: Tensor,
    index: Tensor,
    *,
    q_block: int,
    k_block: int,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Problem:
    """Compute grouped attention of each query block to the key blocks in its list, with log-sum-exp.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        marks: (B, Hk, ceil(S / k_block), D), the landmark of each key block.
        index: (B or 1, 1 or Hk or H, ceil(N / q_block), s) int32: numbers of key blocks, each at
            most once per row; -1 is an empty entry.
        q_block, k_block: tokens per block; the last block may be shorter. Triton's kernels take key
            blocks of at most 64 tokens.
        bias: (B or 1, 1 or Hk or H, S), added to the scores of a key; -inf hides it. Differentiable.
        weight: (ceil(S / k_block),), positive constants that weight the key blocks; if landmarks are
            means of keys, use the number of keys in each block. No gradient.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) of the landmarks' scores in float32
        (float64 for float64). A row that sees no key has o = 0 and lse = -inf, and passes no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match, an index is out of range or occurs twice in a
            row (on a GPU checked only with ``XATTN_CHECK=1``), or key blocks are too long for Triton.
    """
    check_attention(q, k, v)
    check_positive(q_block=q_block, k_block=k_block)
    check_lists(q, k, index, q_block, bias)
    check_alike("marks", marks, "q", q)
    shape = (*k.shape[:2], -(-k.shape[2] // k_block), k.shape[3])
    if marks.shape != shape:
        raise ValueError(
            f"marks: got shape {tuple(marks.shape)}; give {shape}, one for each key block"
        )
    if weight is not None:
        if weight.shape != shape[2:3]:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}; give ({shape[2]},), one for each key block"
            )
        check_floating("weight", weight, q)
        weight = weight.detach()
    limit = width_limit(q, v)
    if k_block > COLUMNS:
        limit = f"got key blocks of {k_block} tokens; give at most {COLUMNS}"
    chosen = choose(backend, q.device, q.dtype, limit)
    return Problem(
        q, k, v, marks, index, bias, weight, q_block, k_block, score_scale(scale, q), chosen
    )


COLUMNS = 64  # most columns of a kernel's tile, which holds a whole key block
