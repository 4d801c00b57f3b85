"""The definition of softplus attention with l1 norms, in plain torch; stores N x S scores.

    s_ij = scale ln(N_i) q_i . k_j,   a_ij = softplus(s_ij),   m_i = o_i (sum_j a_ij + eps) / N_i
    r_ij = max(a_ij - m_i, 0) / (max_j a_ij - m_i),   W_ij = r_ij^p / (sum_j r_ij^p + floor_i)

N_i is the number of keys that query i sees. ``eps`` (0 for none) is the floor of both norms, as published:
floor_i = eps / X_i^p, X_i = (max_j a_ij - m_i) N_i / (sum_j a_ij + eps). With p = 1 and no offset,
W_ij = a_ij / (sum_j a_ij + eps). With y_i = W_i V and dY given, E = dY V^T:

    h_ij  = p W_ij (E_ij - dy_i . y_i) / (a_ij - m_i)
    da_ij = h_ij - o_i / N_i sum_j h_ij - p dy_i . y_i (1 - sum_j W_ij) / (sum_j a_ij + eps)
    ds_ij = sigmoid(s_ij) da_ij,   dq_i = scale ln(N_i) sum_j ds_ij k_j,   dV = W^T dY

A constant factor of a row of r cancels out in W. Dividing by the row's maximum, which keeps the power from
underflowing, therefore adds no gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen


class Problem(NamedTuple):
    """The arguments of softplus attention. See :func:`xattn.kernels.softplus.softplus_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    v: Tensor
    """(B, H, S, Dv)"""
    scale: float
    power: int
    offset: float
    eps: float
    causal: bool
    backend: str


OPEN = 3  # the first causal rows, which keep all their keys: o = 0
FLAT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""A row whose largest entry is within this share of the mean counts as constant: o = 0."""


class Rows(NamedTuple):
    """Numbers for each of some rows, as tensors (B, H, rows, 1), or without the dimensions B and H."""

    tau: Tensor
    """scale ln(N_i)"""
    offset: Tensor
    """o_i, before constant rows are taken into account"""
    keys: Tensor
    """N_i"""


def empty_outputs(p: Any) -> tuple[Tensor, Tensor]:
    """New tensors without values for o and for the statistics of the rows (B, H, 4, N): m, 1 / (max a - m),
    1 / (sum of r^p + floor) and p (1 - sum of W) / (sum of a + eps)."""
    shape = p.q.shape[:3]
    return p.v.new_empty(*shape, p.v.shape[3]), p.q.new_empty(*shape[:2], 4, shape[2])


def rows_of(p: Problem, index: Tensor) -> Rows:
    """The rows of the queries ``index``, a LongTensor (R,)."""
    if p.causal:
        count = (index + 1).to(p.q.dtype)[:, None]
        offset = p.offset * (index >= OPEN).to(p.q.dtype)[:, None]
    else:
        count = p.q.new_full((len(index), 1), p.k.shape[2])
        offset = p.q.new_full((len(index), 1), p.offset)
    return Rows(p.scale * count.log(), offset, count)


def levels(p: Problem, rows: Rows, total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Compute m and 1 / (max a - m) from the sum and the maximum of each row of a."""
    mean = rows.offset * (total + p.eps) / rows.keys
    height = top - mean
    if not p.eps:
        flat = height <= FLAT[p.q.dtype] * top
        mean, height = mean.masked_fill(flat, 0.0), torch.where(flat, top, height)
    return mean, torch.where(height > 0, 1 / height, 0.0)


def norms(
    p: Problem, rows: Rows, total: Tensor, inverse: Tensor, power: Tensor
) -> tuple[Tensor, Tensor]:
    """From ``power``, the sum of r^p, compute 1 / (sum of r^p + floor) and the statistic for its
    gradient."""
    none = torch.zeros_like(power)
    if is_plain(p):
        power, damped = (total + p.eps) * inverse, none
        return torch.where(power > 0, 1 / power, 0.0), damped
    if not p.eps:
        return torch.where(power > 0, 1 / power, 0.0), none
    norm = 1 / (power + p.eps * (inverse * (total + p.eps) / rows.keys) ** p.power)
    norm = torch.where(inverse > 0, norm, 0.0)
    return norm, p.power * (1 - power * norm) / (total + p.eps)


def is_plain(p: Problem) -> bool:
    """Whether W_ij is simply a_ij / (sum_j a_ij + eps)."""
    return p.power == 1 and p.offset == 0


def weights(p: Problem, index: Tensor) -> Tensor:
    """Rows of W for a LongTensor (R,) of queries: (B, H, R, S), in float32 at least."""
    a, rows = _softplus(p, index)
    return _weights(p, rows, a)[0]


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    index = torch.arange(p.q.shape[2], device=p.q.device)
    a, rows = _softplus(p, index)
    w, statistics = _weights(p, rows, a)
    return (w @ widen(p.v).to(w.dtype)).to(p.v.dtype), torch.cat(statistics, -1).transpose(2, 3)


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    o, (mean, inverse, norm, damped) = outputs[0], outputs[1].unsqueeze(-1).unbind(2)
    index = torch.arange(p.q.shape[2], device=p.q.device)
    a, rows = _softplus(p, index)
    g, v = grads[0].to(a.dtype), p.v.to(a.dtype)
    r = ((a - mean) * inverse).clamp_min(0)
    less = (r > 0).to(r.dtype) if p.power == 1 else r ** (p.power - 1)
    inner = (g * o.to(g.dtype)).sum(-1, keepdim=True)
    h = p.power * norm * inverse * less * (g @ v.transpose(-2, -1) - inner)
    offset = torch.where(mean > 0, rows.offset, 0.0)
    da = h - offset / rows.keys * h.sum(-1, keepdim=True) - damped * inner
    ds = rows.tau * da * -torch.expm1(-a)  # 0 at hidden keys, where a is 0
    return {
        "q": ds @ p.k,
        "k": ds.transpose(-2, -1) @ p.q,
        "v": (norm * r * less).transpose(-2, -1) @ g,
    }


def _softplus(p: Problem, index: Tensor) -> tuple[Tensor, Rows]:
    """a of some queries, 0 at hidden keys."""
    rows = rows_of(p, index)
    a = F.softplus(rows.tau * (p.q[:, :, index] @ p.k.transpose(-2, -1)), threshold=40.0)
    if p.causal:
        hidden = torch.arange(p.k.shape[2], device=index.device) > index[:, None]
        a = a.masked_fill(hidden, 0.0)
    return a, rows


def _weights(p: Problem, rows: Rows, a: Tensor) -> tuple[Tensor, list[Tensor]]:
    total, top = a.sum(-1, keepdim=True), a.amax(-1, keepdim=True)
    mean, inverse = levels(p, rows, total, top)
    t = ((a - mean) * inverse).clamp_min(0) ** p.power
    norm, damped = norms(p, rows, total, inverse, t.sum(-1, keepdim=True))
    return norm * t, [mean, inverse, norm, damped]
