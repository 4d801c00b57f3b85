"""The definition of softmax attention with log-sum-exp, in plain torch; stores N x S scores.

    s_ij = scale q_i . k_j + b_ij,   lse_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - lse_i) v_j

Causal attention has s_ij = -inf for j > i. A row whose scores are all -inf has o = 0 and lse = -inf.
H / Hk query heads read one key head. With dO and dlse given, P the weights:

    dS = P o (dO V^T - rowsum(dO o O) + dlse),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """(B, H, N, S) in at least float32, for as many key heads as query heads."""
    q, k = widen(q), widen(k)
    s = scale * (q @ k.transpose(-2, -1))
    s = s if bias is None else s + bias.to(s.dtype)
    return hide_later(s) if causal else s


def hide_later(s: Tensor, first: int = 0) -> Tensor:
    """Scores (..., rows, S) with -inf where the key follows the query; row 0 is query ``first``."""
    seen = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(first)
    return s.masked_fill(~seen, -torch.inf)


def weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 in rows without a key."""
    return torch.where(lse.isneginf()[..., None], 0.0, (s - lse[..., None]).exp())


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    s = scores(q, per_query_head(k, q), bias, scale, causal)
    lse = s.logsumexp(-1)
    return (weights(s, lse) @ widen(per_query_head(v, q))).to(q.dtype), lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    kw, vw, g = widen(per_query_head(k, q)), widen(per_query_head(v, q)), widen(grad)
    p = weights(scores(q, kw, bias, scale, causal), lse)
    ds = p * (g @ vw.transpose(-2, -1) - delta(grad, grad_lse, o)[..., None])
    dq, dk = scale * (ds @ kw), scale * (ds.transpose(-2, -1) @ widen(q))
    dv = p.transpose(-2, -1) @ g
    db = reduce_to(ds, bias) if bias_grad and bias is not None else None
    return dq.to(q.dtype), per_key_head(dk, k), per_key_head(dv, v), db


def per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values (B, Hk, S, width) as (B, H, S, width): query head h reads key head h // (H // Hk)."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def per_key_head(x: Tensor, k: Tensor) -> Tensor:
    """The gradient (B, H, S, width) of keys or values that groups of query heads share, in their dtype."""
    x = x if x.shape[1] == k.shape[1] else x.unflatten(1, (k.shape[1], -1)).sum(2)
    return x.to(k.dtype)


def delta(grad: Tensor, grad_lse: Tensor | None, o: Tensor) -> Tensor:
    """rowsum(dO o O) - dlse, (B, H, N): one number per row carries the whole gradient into lse."""
    d = (widen(grad) * widen(o)).sum(-1)
    return d if grad_lse is None else d - grad_lse


def reduce_to(ds: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that was broadcast to (B, H, N, S)."""
    return ds.sum_to_size(bias.shape).to(bias.dtype)


def widen(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
