"""Causal flows chunk by chunk in plain differentiable torch, or by causal products with few launches.

In the chunked form, products are computed once and used for the flows of both directions; sums over all
earlier chunks are carried along.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.causal_product import causal_product
from xattn.kernels.flows.reference import EPS

CHUNK = 32  # tokens


def causal_flows(q: Tensor, k: Tensor, added: float) -> tuple[Tensor, Tensor, Tensor]:
    """I, I' and O' (B, H, N) for features (B, H, N, D)."""
    sums = _PrefixSums(q, k, added)
    ones = torch.ones_like(q[..., 0])
    count = ones.cumsum(-1)
    incoming, outgoing = sums.into_queries(ones), sums.out_of_keys(ones)
    refined = sums.into_queries(count / outgoing) / count
    conserved = sums.out_of_keys(count / incoming) / count
    return incoming, refined, conserved


def causal_flows_by_products(q: Tensor, k: Tensor, added: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`causal_flows`, computed by Triton kernels. The two directions are the halves of
    one batch."""
    left, right = torch.stack([q, k]) + EPS, torch.stack([k, q])
    own = left.sum(-1) * EPS + added

    def into(weight: Tensor) -> Tensor:
        return causal_product(left, right, weight[..., None], backend="triton")[..., 0] + own

    count = torch.arange(1, q.shape[2] + 1, device=q.device, dtype=q.dtype)
    flow = into(torch.ones_like(own))
    refined, conserved = into((count / flow).flip(0)) / count
    return flow[0], refined, conserved


class _PrefixSums:
    """Flows of weighted sums over the tokens so far, for Q and K of N tokens."""

    def __init__(self, q: Tensor, k: Tensor, added: float) -> None:
        self.tokens = q.shape[2]
        self.q, self.k = _chunks(q, -2), _chunks(k, -2)  # (B, H, n, CHUNK, D)
        products = self.q @ self.k.transpose(-2, -1)
        self.lower, self.upper = products.tril(), products.triu()
        self.q_sum, self.k_sum = q.sum(-1), k.sum(-1)
        self.added = q.shape[-1] * EPS**2 + added

    def into_queries(self, weight: Tensor) -> Tensor:
        """(Q_i + e) . (sum_(j <= i) w_j K_j + e), (B, H, N), for w (B, H, N)."""
        w = _chunks(weight, -1)
        inside = (self.lower @ w[..., None])[..., 0]
        y = inside + (self.q @ _before(w, self.k).transpose(-2, -1))[..., 0]
        return self._whole(y, self.q_sum, weight * self.k_sum)

    def out_of_keys(self, weight: Tensor) -> Tensor:
        """(K_i + e) . (sum_(j <= i) w_j Q_j + e), (B, H, N), for w (B, H, N)."""
        w = _chunks(weight, -1)
        inside = (w[..., None, :] @ self.upper)[..., 0, :]
        y = inside + (self.k @ _before(w, self.q).transpose(-2, -1))[..., 0]
        return self._whole(y, self.k_sum, weight * self.q_sum)

    def _whole(self, y: Tensor, own: Tensor, others: Tensor) -> Tensor:
        y = y.flatten(-2)[..., : self.tokens]
        return y + EPS * (own + others.cumsum(-1)) + self.added


def _chunks(x: Tensor, dim: int) -> Tensor:
    """x with its tokens, dimension ``dim``, split into (n, CHUNK) and padded with zeros."""
    missing = -x.shape[dim] % CHUNK
    if missing:
        x = F.pad(x, (0, 0) * (-1 - dim) + (0, missing))
    return x.unflatten(dim, (-1, CHUNK))


def _before(weight: Tensor, x: Tensor) -> Tensor:
    """sum_j w_j x_j over all earlier chunks: (B, H, n, 1, D)."""
    sums = (weight[..., None, :] @ x).cumsum(2)
    return F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :, :-1]
