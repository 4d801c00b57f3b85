"""The definition of causal low-rank products, in plain torch; stores N x N.

Y = tril(L R^T) X,   or with triu in place of tril if the sum runs over later tokens
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.causal_product.problem import Problem
from xattn.kernels.softmax.reference import widen


def forward(p: Problem) -> tuple[Tensor]:
    """Y (H, N, m)."""
    a = widen(p.left) @ widen(p.right).transpose(-2, -1)
    return (((a.triu() if p.reverse else a.tril()) @ widen(p.x)).to(p.x.dtype),)
