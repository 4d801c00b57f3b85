"""Conjugate gradients for a tile of queries, whose attention weights are computed once for all steps.

    t = x f^T - x . m,   C x = (p o t) f - rowsum(p o t) m

so a step is two matrix products and one elementwise product. Both factors are deviations from the mean,
so that no digits are lost in a row that attends to one distant key. No N x S matrix is stored.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from xattn.kernels.covariance_solve.reference import Problem, warn_of_residual
from xattn.kernels.covariance_solve.rows import Tile, append_ones, flatten_heads, weight_rows
from xattn.kernels.softmax.reference import widen


def forward(p: Problem) -> tuple[Tensor]:
    q, k, features, lse, mean, right, ridge = flatten_heads(*p[:7])
    x, residual = torch.empty_like(right), torch.empty_like(lse)
    features = features.contiguous()
    ones = append_ones(features)
    for tile, buffer in weight_rows(q, k, lse, p.scale, p.causal):
        system = _System(tile, buffer, features, ones, mean, ridge)
        at = tile.heads, tile.rows
        x[at], residual[at] = system.solve(right[at], p.iterations, p.tolerance)
    warn_of_residual(residual, p.tolerance)
    return (x.view(p.right.shape),)


def backward(
    p: Problem, outputs: tuple[Tensor], grads: tuple[Tensor], wanted: Collection[str]
) -> dict[str, Tensor]:
    q, k, features, lse, mean, right, ridge, x, dx = flatten_heads(*p[:7], outputs[0], grads[0])
    found = {
        name: torch.zeros_like(widen(y))
        for name, y in zip(p._fields[:7], (q, k, features, lse, mean, right, ridge), strict=True)
    }
    q, k, residual = widen(q), widen(k), torch.empty_like(lse)
    features = features.contiguous()
    ones = append_ones(features)
    for tile, buffer in weight_rows(q, k, lse, p.scale, p.causal):
        system = _System(tile, buffer, features, ones, mean, ridge)
        i, j = (tile.heads, tile.rows), (tile.heads, tile.keys)
        u, residual[i] = system.solve(dx[i], p.iterations, p.tolerance)
        own = x[i]
        by_x, by_u = system.along(own).clone(), system.along(u)
        share_x = tile.weights * by_x
        found["features"][j] -= share_x.transpose(1, 2) @ u
        found["mean"][i] = share_x.sum(-1, keepdim=True) * u
        ds = share_x.mul_(by_u).neg_()
        found["q"][i] = p.scale * (ds @ k[j])
        found["k"][j] += p.scale * (ds.transpose(1, 2) @ q[i])
        found["lse"][i] = -ds.sum(-1)
        share_u = by_u.mul_(tile.weights)
        found["features"][j] -= share_u.transpose(1, 2) @ own
        found["mean"][i] += share_u.sum(-1, keepdim=True) * own
        found["right"][i], found["ridge"][i] = u, -(u * own).sum(-1)
    warn_of_residual(residual, p.tolerance)
    return {name: y.view(getattr(p, name).shape) for name, y in found.items()}


class _System:
    """C_i + ridge_i I for the rows of a tile.

    ``features`` are (B H, S, F), and ``ones`` the same with a column of ones appended; ``buffer`` is
    scratch memory of the size of the tile's weights.
    """

    def __init__(
        self,
        tile: Tile,
        buffer: Tensor,
        features: Tensor,
        ones: Tensor,
        mean: Tensor,
        ridge: Tensor,
    ) -> None:
        self.weights, self.buffer = tile.weights, buffer
        self.features = features[tile.heads, tile.keys]
        self.ones = ones[tile.heads, tile.keys].transpose(1, 2)
        self.mean = mean[tile.heads, tile.rows]
        self.ridge = ridge[tile.heads, tile.rows, None]

    def along(self, x: Tensor) -> Tensor:
        """Compute t_ij = x_i . (f_j - m_i) in the buffer."""
        left = torch.cat([x, -_dot(x, self.mean)], -1)
        return torch.bmm(left, self.ones, out=self.buffer)

    def times(self, x: Tensor) -> Tensor:
        t = self.along(x).mul_(self.weights)
        product = torch.bmm(t, self.features).addcmul_(self.ridge, x)
        return product.addcmul_(t.sum(-1, keepdim=True), self.mean, value=-1)

    def solve(self, right: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
        """Return the solutions x (heads, rows, F) and their relative residuals (heads, rows)."""
        x, r, d = torch.zeros_like(right), right.clone(), right.clone()
        size = rest = _dot(right, right)
        line = tolerance**2 * size
        for _ in range(iterations):
            live = rest > line
            if not live.any():
                break
            product = self.times(d)
            curvature = _dot(d, product)
            step = torch.where(live & (curvature > 0), rest / curvature, 0.0)
            x.addcmul_(step, d)
            r.addcmul_(step, product, value=-1)
            before, after = rest, _dot(r, r)
            # Without curvature there is nothing to fit, so x stays.
            rest = torch.where(live, torch.where(curvature > 0, after, 0.0), rest)
            d = torch.addcmul(r, torch.where(live, rest / before, 0.0), d)
        left = right - self.times(x)
        solvable = (x != 0).any(-1, keepdim=True)
        residual = torch.where(solvable, (_dot(left, left) / size).sqrt(), 0.0)
        return x, residual[..., 0]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)
