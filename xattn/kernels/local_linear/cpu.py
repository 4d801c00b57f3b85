"""Local linear attention with known slopes, by tiles of rows; no N x S matrix is stored."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from xattn.kernels.covariance_solve.rows import append_ones, flatten_heads, weight_rows
from xattn.kernels.local_linear.reference import Problem
from xattn.kernels.softmax.reference import widen


def forward(p: Problem) -> tuple[Tensor]:
    q, k, v, features, lse, mean, slope = flatten_heads(*p[:7])
    v, left, features = widen(v), _left(slope, mean), append_ones(features)
    y = v.new_empty(*q.shape[:2], v.shape[2])
    for tile, e in weight_rows(q, k, lse, p.scale, p.causal):
        i, j = (tile.heads, tile.rows), (tile.heads, tile.keys)
        torch.bmm(left[i], features[j].transpose(1, 2), out=e)
        y[i] = e.mul_(tile.weights) @ v[j]
    return (y.view(*p.q.shape[:3], -1).to(p.v.dtype),)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    q, k, v, features, lse, mean, slope, dy = flatten_heads(*p[:7], grads[0])
    q, k, v, dy = (widen(x) for x in (q, k, v, dy))
    left, ones = _left(slope, mean), append_ones(features)
    found = {
        name: torch.zeros_like(x)
        for name, x in zip(p._fields[:7], (q, k, v, features, lse, mean, slope), strict=True)
    }
    for tile, e in weight_rows(q, k, lse, p.scale, p.causal):
        i, j = (tile.heads, tile.rows), (tile.heads, tile.keys)
        torch.bmm(left[i], ones[j].transpose(1, 2), out=e)
        a = e.mul_(tile.weights)
        found["v"][j] += a.transpose(1, 2) @ dy[i]
        if wanted == {"v"}:
            continue
        g = dy[i] @ v[j].transpose(1, 2)
        ds, w = a.mul_(g), tile.weights.mul_(g)
        total = w.sum(-1, keepdim=True)
        found["slope"][i] = w @ features[j] - total * mean[i]
        found["mean"][i] = -total * slope[i]
        found["features"][j] += w.transpose(1, 2) @ slope[i]
        found["q"][i] = p.scale * (ds @ k[j])
        found["k"][j] += p.scale * (ds.transpose(1, 2) @ q[i])
        found["lse"][i] = -ds.sum(-1)
    return {name: x.view(getattr(p, name).shape) for name, x in found.items()}


def _left(slope: Tensor, mean: Tensor) -> Tensor:
    """[x, 1 - x . m], whose product with [f, 1] is 1 + x . (f - m)."""
    return torch.cat([slope, 1 - (slope * mean).sum(-1, keepdim=True)], -1)
