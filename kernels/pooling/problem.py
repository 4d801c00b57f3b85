"""The arguments of softmax pooling, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """See :func:`xattn.kernels.pooling.softmax_pooling`; ``q`` and ``k`` are None if ``bias`` is the
    scores."""

    q: Tensor | None
    """(B or 1, Q, D)"""
    k: Tensor | None
    """(B, T, D)"""
    v: Tensor
    """(B, G, T, V)"""
    bias: Tensor | None
    """(B, Q, T)"""
    scale: float
    backend: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, Q and T."""
        rows = self.bias if self.q is None else self.q
        assert rows is not None
        return self.v.shape[0], rows.shape[1], self.v.shape[2]
