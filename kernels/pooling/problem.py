"""The arguments of softmax pooling, as one record."""

from __future__ import annotations

from typing import NamedTuple

import torch
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

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem for queries, keys and values of another dtype."""
        q, k = (None if x is None else x.to(dtype) for x in (self.q, self.k))
        return self._replace(q=q, k=k, v=self.v.to(dtype))
