"""Patches centred by a mean patch, reduced to principal components, and scaled; queries likewise.

    x = V^T (u - mean u) / s,   x_0 = V^T (u_0 - mean u_0) / s_0,   with mean |x|^2 = mean |x_0|^2 = 1

The statistics are those of photos, from :meth:`TokenScale.fit`; until then x = V^T u, V the first channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIKE = 1e-10  # share of the mean square below which a variance is rounding


class TokenScale(nn.Module):
    """Maps patches (..., C) and queries (..., C) to D dimensions.

    Args:
        channels: C.
        components: D, of the principal components; None keeps the channels.
        queries: whether there are queries, which have a mean and a scale of their own.
    """

    mean: Tensor
    factor: Tensor
    basis: Tensor | None
    query_mean: Tensor
    query_factor: Tensor

    def __init__(self, channels: int, components: int | None, queries: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer(
            "basis", None if components is None else torch.eye(channels)[:, :components]
        )
        self.queries = queries
        if queries:
            self.register_buffer("query_mean", torch.zeros(channels))
            self.register_buffer("query_factor", torch.ones(()))

    def patches(self, u: Tensor) -> Tensor:
        """x of ``u`` (..., C)."""
        return self._projected(u - self.mean) * self.factor

    def query(self, u: Tensor) -> Tensor:
        """x_0 of ``u`` (..., C)."""
        return self._projected(u - self.query_mean) * self.query_factor

    def _projected(self, u: Tensor) -> Tensor:
        return u if self.basis is None else u @ self.basis

    @torch.no_grad()
    def fit(self, photos: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Take the statistics of ``photos``, batches of patches (B, N, C) and queries (B, C), in float64.

        Raises:
            ValueError: all patches are alike, or all queries.
        """
        channels = len(self.mean)
        shape = (channels,) if self.basis is None else (channels, channels)
        total, products = (self.mean.new_zeros(s, dtype=torch.float64) for s in (channels, shape))
        count, found = 0, []
        for patches, query in photos:
            flat = patches.flatten(0, 1).double()
            count += len(flat)
            total += flat.sum(0)
            products += flat.square().sum(0) if self.basis is None else flat.mT @ flat
            if query is not None:
                found.append(query.double())
        mean = total / count
        if self.basis is None:
            spread = float((products / count - mean.square()).sum())
            whole = float(products.sum()) / count
        else:
            values, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
            kept = slice(len(values) - self.basis.shape[1], None)
            spread = float(values[kept].sum())
            whole = float(products.diagonal().sum()) / count
            self.basis.copy_(vectors[:, kept].flip(1))
        self.mean.copy_(mean)
        self.factor.fill_(_factor(spread, whole, "patches"))
        if found:
            queries = torch.cat(found)
            self.query_mean.copy_(queries.mean(0))
            centred = queries - queries.mean(0)
            if self.basis is not None:
                centred = centred @ self.basis.double()
            spread = float(centred.square().sum(1).mean())
            whole = float(queries.square().sum(1).mean())
            self.query_factor.fill_(_factor(spread, whole, "queries"))


def _factor(spread: float, whole: float, what: str) -> float:
    if not spread > ALIKE * whole:
        raise ValueError(
            f"features: all {what} are alike, so nothing tells the photos apart; give photos that differ"
        )
    return spread**-0.5
