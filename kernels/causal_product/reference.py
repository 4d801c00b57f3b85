"""The definition of causal low-rank products, in plain torch; stores N x N.

Y = tril(L R^T) X,   or with triu in place of tril if the sum runs over later tokens
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.softmax.reference import widen


def forward(left: Tensor, right: Tensor, x: Tensor, reverse: bool) -> Tensor:
    """Y (H, N, m) of left and right (H, N, f) and x (H, N, m)."""
    a = widen(left) @ widen(right).transpose(-2, -1)
    return ((a.triu() if reverse else a.tril()) @ widen(x)).to(x.dtype)
