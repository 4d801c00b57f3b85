"""The definition of attention over lists of key blocks, in plain torch; stores N x S scores.

    J(i) = {j : block(j) in index[block(i)] and j in box(i)}
    s_ij = scale q_i . k_j + b_j,   lse_i = log sum_{j in J(i)} exp s_ij,
    o_i = sum_{j in J(i)} exp(s_ij - lse_i) v_j

Dense softmax attention whose bias is -inf outside J; each key head has H / Hk query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.softmax import reference as softmax


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    position: Tensor | None,
    dilation: list[int],
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    full = _bias(q, k, index, bias, low, high, position, dilation, q_block, k_block)
    return softmax.forward(q, k, v, full, scale, False)


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    position: Tensor | None,
    o: Tensor,
    lse: Tensor,
    dilation: list[int],
    q_block: int,
    k_block: int,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    full = _bias(q, k, index, bias, low, high, position, dilation, q_block, k_block)
    dq, dk, dv, ds = softmax.backward(
        grad, grad_lse, q, k, v, full, o, lse, scale, False, bias_grad
    )
    db = None if ds is None or bias is None else reduce_bias(ds.sum(2), bias)
    return dq, dk, dv, db


def visible(
    index: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    position: Tensor | None,
    dilation: list[int],
    n: int,
    s: int,
    q_block: int,
    k_block: int,
) -> Tensor:
    """Whether key j is in J(i): bool (B or 1, heads of the index, N, S)."""
    blocks = -(-s // k_block)
    table = index.new_zeros(*index.shape[:3], blocks + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(index < 0, blocks, index).long(), True)
    seen = table[..., :-1].repeat_interleave(q_block, 2)[:, :, :n]
    seen = seen.repeat_interleave(k_block, 3)[..., :s]
    if low is not None and high is not None and position is not None:
        seen = seen & inside(low, high, position, dilation)
    return seen


def inside(low: Tensor, high: Tensor, position: Tensor, dilation: list[int]) -> Tensor:
    """The rule of a box: (..., N, n), (..., N, n), (..., S, n) to bool (..., N, S)."""
    seen = None
    for t, d in enumerate(dilation):
        first, at = low[..., :, None, t], position[..., None, :, t]
        one = (at >= first).logical_and_(at <= high[..., :, None, t])
        if d > 1:
            one &= (at - first) % d == 0
        seen = one if seen is None else seen.logical_and_(one)
    assert seen is not None
    return seen


def reduce_bias(db: Tensor, bias: Tensor) -> Tensor:
    """(B, heads, S) summed to the shape of a bias that these heads share, in its dtype."""
    if bias.shape[1] not in (1, db.shape[1]):
        db = db.unflatten(1, (bias.shape[1], -1)).sum(2)
    return db.sum_to_size(bias.shape).to(bias.dtype)


def _bias(q, k, index, bias, low, high, position, dilation, q_block, k_block):  # type: ignore[no-untyped-def]
    """(B, H, N, S): the bias of visible keys, -inf for others."""
    n, s = q.shape[2], k.shape[2]
    seen = visible(index, low, high, position, dilation, n, s, q_block, k_block)
    seen = _heads(seen, q).expand(*q.shape[:3], s)
    values = q.new_zeros((), dtype=softmax.widen(q).dtype)
    if bias is not None:
        values = _heads(bias[:, :, None], q)
    return torch.where(seen, values, -torch.inf)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """``x`` with one entry per query head (or one for all), from one per key head or per query head."""
    return x if x.shape[1] == 1 else x.repeat_interleave(q.shape[1] // x.shape[1], 1)
