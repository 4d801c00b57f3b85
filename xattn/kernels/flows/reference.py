"""The definition of flows, in plain torch, differentiated by autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6
"""e, which is added to both factors of each flow."""


class Problem(NamedTuple):
    """The arguments of flows. See :func:`xattn.kernels.flows.flows`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, H, S, D)"""
    added: float
    backend: str


def flows(q: Tensor, k: Tensor, added: float) -> tuple[Tensor, Tensor, Tensor]:
    """I, I' (B, H, N) and O' (B, H, S)."""
    incoming = _flow(q, k.sum(-2, keepdim=True), added)
    outgoing = _flow(k, q.sum(-2, keepdim=True), added)
    refined = _flow(q, (k / outgoing[..., None]).sum(-2, keepdim=True), added)
    conserved = _flow(k, (q / incoming[..., None]).sum(-2, keepdim=True), added)
    return incoming, refined, conserved


def causal_flows(q: Tensor, k: Tensor, added: float) -> tuple[Tensor, Tensor, Tensor]:
    """I, I' and O', (B, H, N) each, with a running sum for every token."""
    count = torch.arange(1, q.shape[2] + 1, device=q.device).to(q.dtype)
    incoming = _flow(q, k.cumsum(-2), added)
    outgoing = _flow(k, q.cumsum(-2), added)
    refined = _flow(q, (k * (count / outgoing)[..., None]).cumsum(-2), added) / count
    conserved = _flow(k, (q * (count / incoming)[..., None]).cumsum(-2), added) / count
    return incoming, refined, conserved


def _flow(x: Tensor, total: Tensor, added: float) -> Tensor:
    """(x + e) . (total + e) for (B, H, N, D) and (B, H, 1 or N, D)."""
    return ((x + EPS) * (total + EPS)).sum(-1) + added
