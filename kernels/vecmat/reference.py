"""The definition of row vectors times attention, in plain torch; stores N x S weights.

    P_ij = exp(scale q_i . k_j + b_ij - lse_i),   out = r W,   W = P   or   W = max(P o (G V^T), 0)

G is the gradient of a class score with respect to the attention's output, so G V^T is that with respect
to P, and W the relevance of Chefer, Gur, Wolf (ICCV 2021, arXiv 2103.15679). With dout given:

    dW = r^T dout,   dS = W o dW,   dr = dout W^T,   d(G V^T) = dW o P where G V^T > 0

and from dS on as in softmax attention: dQ = scale dS K, dK = scale dS^T Q, dlse = -rowsum(dS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from xattn.kernels.softmax.reference import per_key_head, per_query_head, scores, weights, widen


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """r W (B, H, R, S) for r (B, H, R, N); W is the relevance with v and g, P without."""
    w = weights(scores(q, per_query_head(k, q), bias, scale, causal), lse)
    if v is not None and g is not None:
        w = w * (widen(g) @ widen(per_query_head(v, q)).transpose(-2, -1)).relu()
    return r @ w


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    r: Tensor,
    v: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, lse, r, v, g and bias; None for those that are None."""
    kw = widen(per_query_head(k, q))
    p = w = weights(scores(q, kw, bias, scale, causal), lse)
    dw = r.transpose(-2, -1) @ grad
    dv = dg = None
    if v is not None and g is not None:
        vw = widen(per_query_head(v, q))
        product = widen(g) @ vw.transpose(-2, -1)
        w = p * product.relu()
        dproduct = torch.where(product > 0, dw * p, 0.0)
        dv, dg = per_key_head(dproduct.mT @ widen(g), v), (dproduct @ vw).to(g.dtype)
    ds = w * dw
    dq, dk = scale * (ds @ kw), scale * (ds.transpose(-2, -1) @ widen(q))
    dr = grad @ w.transpose(-2, -1)
    db = ds.sum_to_size(bias.shape).to(bias.dtype) if bias_grad and bias is not None else None
    return dq.to(q.dtype), per_key_head(dk, k), -ds.sum(-1), dr, dv, dg, db
