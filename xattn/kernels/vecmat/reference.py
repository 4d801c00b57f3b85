"""The definition of row vectors times attention, in plain torch; stores N x S weights.

    P_ij = exp(scale q_i . k_j + b_ij - lse_i),   out = r W,   W = P   or   W = max(P o (G V^T), 0)

G (``grad``) is the gradient of a class score with respect to the attention's output. G V^T is therefore the
gradient with respect to P, and W the relevance of Chefer, Gur, Wolf (ICCV 2021, arXiv 2103.15679). With
dout:

    dW = r^T dout,   dS = W o dW,   dr = dout W^T,   d(G V^T) = dW o P where G V^T > 0

and then, as in softmax attention, dQ = scale dS K, dK = scale dS^T Q, dlse = -rowsum(dS).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import per_key_head, per_query_head, scores, weights, widen


class Problem(NamedTuple):
    """The arguments of row vectors times attention.

    See :func:`xattn.kernels.vecmat.gradient_vecmat`; ``v`` and ``grad`` are None for plain attention.
    """

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    lse: Tensor
    """(B, H, N), at least float32"""
    r: Tensor
    """(B, H, R, N), in the dtype of ``lse``"""
    v: Tensor | None
    """(B, Hk, S, Dv)"""
    grad: Tensor | None
    """(B, H, N, Dv)"""
    bias: Tensor | None
    """(B or 1, H or 1, N or 1, S)"""
    scale: float
    causal: bool
    backend: str


def forward(p: Problem) -> tuple[Tensor]:
    """r W (B, H, R, S); W is the relevance if v and grad are given, else P."""
    w = weights(scores(p.q, per_query_head(p.k, p.q), p.bias, p.scale, p.causal), p.lse)
    if p.v is not None and p.grad is not None:
        w = w * (widen(p.grad) @ widen(per_query_head(p.v, p.q)).transpose(-2, -1)).relu()
    return (p.r @ w,)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    k, dout = widen(per_query_head(p.k, p.q)), grads[0]
    a = w = weights(scores(p.q, k, p.bias, p.scale, p.causal), p.lse)
    dw = p.r.transpose(-2, -1) @ dout
    found = {}
    if p.v is not None and p.grad is not None:
        v, g = widen(per_query_head(p.v, p.q)), widen(p.grad)
        product = g @ v.transpose(-2, -1)
        w = a * product.relu()
        dproduct = torch.where(product > 0, dw * a, 0.0)
        found["v"] = per_key_head(dproduct.transpose(-2, -1) @ g, p.v)
        found["grad"] = (dproduct @ v).to(p.grad.dtype)
    ds = w * dw
    found["q"] = (p.scale * (ds @ k)).to(p.q.dtype)
    found["k"] = per_key_head(p.scale * (ds.transpose(-2, -1) @ widen(p.q)), p.k)
    found["lse"], found["r"] = -ds.sum(-1), dout @ w.transpose(-2, -1)
    if p.bias is not None and "bias" in wanted:
        found["bias"] = ds.sum_to_size(p.bias.shape).to(p.bias.dtype)
    return found
