"""The arguments of attention of some of the queries, as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from xattn.kernels.softmax.problem import Problem as DenseProblem


class Problem(NamedTuple):
    """See :func:`xattn.kernels.ragged_queries.ragged_attention`."""

    q: Tensor
    """(B, H, N, D)"""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    keep: Tensor
    """(B, H, N), bool"""
    scale: float
    causal: bool
    backend: str

    @property
    def dense(self) -> DenseProblem:
        """The same with all queries."""
        return DenseProblem(self.q, self.k, self.v, None, self.scale, self.causal, self.backend)
