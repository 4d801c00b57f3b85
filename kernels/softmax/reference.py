"""The definition of softmax attention with log-sum-exp, in plain torch; stores N x S scores.

    s_ij = scale q_i . k_j + b_ij,   lse_i = log sum_j exp s_ij,   o_i = sum_j exp(s_ij - lse_i) v_j

A row whose scores are all -inf has o = 0 and lse = -inf. With dO and dlse given, P the weights:

    dS = P o (dO V^T - rowsum(dO o O) + dlse),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, H, N, S) in at least float32."""
    q, k = widen(q), widen(k)
    s = scale * (q @ k.transpose(-2, -1))
    return s if bias is None else s + bias.to(s.dtype)


def weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), 0 in rows without a key."""
    return torch.where(lse.isneginf()[..., None], 0.0, (s - lse[..., None]).exp())


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    s = scores(q, k, bias, scale)
    lse = s.logsumexp(-1)
    return (weights(s, lse) @ widen(v)).to(q.dtype), lse


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
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    p = weights(scores(q, k, bias, scale), lse)
    g = widen(grad)
    ds = p * (g @ widen(v).transpose(-2, -1) - delta(grad, grad_lse, o)[..., None])
    dq, dk = scale * (ds @ widen(k)), scale * (ds.transpose(-2, -1) @ widen(q))
    dv = p.transpose(-2, -1) @ g
    db = reduce_to(ds, bias) if bias_grad and bias is not None else None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), db


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
