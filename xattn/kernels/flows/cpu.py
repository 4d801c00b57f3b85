"""Flows and their gradients as products with vectors, so that only Q and K have size (N, D).

With T = sum K + e, U = sum K / O + e, T* = sum Q + e, U* = sum Q / I + e, and gradients g of I, I', O':

    dQ = g' U + dU* / I + gI T + dT*      dU* = sum_j gO'_j (K_j + e)      gI = g - Q . dU* / I^2
    dK = gO' U* + dU / O + gO T* + dT     dU  = sum_i g'_i (Q_i + e)       gO = - K . dU / O^2

dT = sum_i gI_i (Q_i + e) and dT* = sum_j gO_j (K_j + e). Both gradients are products of (N, 4) and (4, D).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from xattn.kernels.flows.reference import EPS, Problem
from xattn.kernels.softmax.reference import widen


def forward(p: Problem) -> tuple[Tensor, ...]:
    """Return I, I', O' and what the backward pass needs: O, and the pairs (T, T*) and (U, U*), each stored
    as one tensor (B, H, 2, D)."""
    q, k = widen(p.q), widen(p.k)
    totals = torch.cat([k.sum(-2, keepdim=True), q.sum(-2, keepdim=True)], -2) + EPS
    incoming, outgoing = _flows(q, k, totals, p.added)
    weights = outgoing.reciprocal()[..., None, :], incoming.reciprocal()[..., None, :]
    shares = torch.cat([weights[0] @ k, weights[1] @ q], -2) + EPS
    return incoming, *_flows(q, k, shares, p.added), outgoing, totals, shares


def backward(
    p: Problem,
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    q, k = widen(p.q), widen(p.k)
    incoming, refined, conserved, outgoing, totals, shares = outputs
    (keys, queries), (shared, taken) = totals.split(1, -2), shares.split(1, -2)
    given = [
        torch.zeros_like(y) if g is None else g
        for y, g in zip((incoming, refined, conserved), grads, strict=True)
    ]
    d_taken, d_shared = _weighted(given[2], k), _weighted(given[1], q)
    to_incoming = given[0] - _dot(q, d_taken) / incoming.square()
    to_outgoing = -_dot(k, d_shared) / outgoing.square()
    found = {}
    if "q" in wanted:
        weights = [given[1], 1 / incoming, to_incoming, torch.ones_like(incoming)]
        vectors = [shared, d_taken, keys, _weighted(to_outgoing, k)]
        found["q"] = torch.stack(weights, -1) @ torch.cat(vectors, -2)
    if "k" in wanted:
        weights = [given[2], 1 / outgoing, to_outgoing, torch.ones_like(outgoing)]
        vectors = [taken, d_shared, queries, _weighted(to_incoming, q)]
        found["k"] = torch.stack(weights, -1) @ torch.cat(vectors, -2)
    return found


def second(
    p: Problem, grads: Sequence[Tensor | None], wanted: Collection[str]
) -> dict[str, Tensor]:
    """Compute :func:`backward` only from the inputs, so that the result can be differentiated again."""
    return backward(p, forward(p), grads, wanted)


def _flows(q: Tensor, k: Tensor, totals: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """(Q + e) . T_0, (B, H, N), and (K + e) . T_1, (B, H, S), for T (B, H, 2, D), which includes e."""
    own = EPS * totals.sum(-1, keepdim=True)
    own = own + added if added else own
    (into, out), (here, there) = totals.split(1, -2), own.unbind(-2)
    return _dot(q, into) + here, _dot(k, out) + there


def _dot(x: Tensor, total: Tensor) -> Tensor:
    return (total @ x.transpose(-2, -1))[..., 0, :]


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """sum_j w_j (x_j + e): (B, H, 1, D)."""
    return weight[..., None, :] @ x + EPS * weight.sum(-1)[..., None, None]
