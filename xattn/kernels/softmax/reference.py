"""The definition of softmax attention with log-sum-exp, in plain torch; stores N x S scores.

    s_ij = scale q_i . k_j + b_ij,   lse_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - lse_i) v_j

Causal attention has s_ij = -inf for j > i. A row whose scores are all -inf has o = 0 and lse = -inf.
H / Hk query heads read one key head. With dO and dlse given, P the weights:

    dS = P o (dO V^T - rowsum(dO o O) + dlse),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The arguments of softmax attention. See :func:`xattn.kernels.softmax.softmax_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    bias: Tensor | None
    """(B or 1, H or 1, N or 1, S)"""
    scale: float
    causal: bool
    backend: str


def empty_outputs(p: Any) -> tuple[Tensor, Tensor]:
    """Return new tensors for o and lse, without values, for a problem with ``q`` and ``v``."""
    shape = p.q.shape[:3]
    return p.q.new_empty(*shape, p.v.shape[3]), p.q.new_empty(shape, dtype=wide(p.q.dtype))


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Scores (B, H, N, S) in at least float32; ``k`` must have one head for each query head."""
    q, k = widen(q), widen(k)
    s = scale * (q @ k.transpose(-2, -1))
    s = s if bias is None else s + bias.to(s.dtype)
    return hide_later(s) if causal else s


def hide_later(s: Tensor, first: int = 0) -> Tensor:
    """Scores (..., rows, S) with -inf if the key comes after the query; row 0 is query ``first``."""
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(first)
    return s.masked_fill(~seen, -torch.inf)


def weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 in rows without a key."""
    return torch.where(lse.isneginf()[..., None], 0.0, (s - lse[..., None]).exp())


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    s = scores(p.q, per_query_head(p.k, p.q), p.bias, p.scale, p.causal)
    lse = s.logsumexp(-1)
    return (weights(s, lse) @ widen(per_query_head(p.v, p.q))).to(p.q.dtype), lse


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    k, v, g = widen(per_query_head(p.k, p.q)), widen(per_query_head(p.v, p.q)), widen(grad)
    a = weights(scores(p.q, k, p.bias, p.scale, p.causal), lse)
    ds = a * (g @ v.transpose(-2, -1) - delta(grad, grad_lse, o)[..., None])
    found = {
        "q": (p.scale * (ds @ k)).to(p.q.dtype),
        "k": per_key_head(p.scale * (ds.transpose(-2, -1) @ widen(p.q)), p.k),
        "v": per_key_head(a.transpose(-2, -1) @ g, p.v),
    }
    if "bias" in wanted and p.bias is not None:
        found["bias"] = reduce_to(ds, p.bias)
    return found


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values (B, Hk, S, width) to (B, H, S, width), so that each query head has its own."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """The gradient (B, H, S, width) of keys or values that query heads share, summed over these heads,
    in the dtype of the keys."""
    x = x if x.shape[1] == k.shape[1] else x.unflatten(1, (k.shape[1], -1)).sum(2)
    return x.to(k.dtype)


def delta(grad: Tensor, grad_lse: Tensor | None, o: Tensor) -> Tensor:
    """rowsum(dO o O) - dlse, (B, H, N): one number per row, which includes the complete gradient with
    respect to lse."""
    d = (widen(grad) * widen(o)).sum(-1)
    return d if grad_lse is None else d - grad_lse


def reduce_to(ds: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that was broadcast to (B, H, N, S)."""
    return ds.sum_to_size(bias.shape).to(bias.dtype)


def widen(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are left unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def row_by_row(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous rows, as kernels read it; the rows need not follow each other in
    memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums: float64 for float64, float32 for all other dtypes."""
    return torch.float64 if dtype == torch.float64 else torch.float32
