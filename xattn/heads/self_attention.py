"""Self-attention of all tokens, without biases except for an optional one of the output.

softmax(X W_q,h (X W_k,h)^T / sqrt(d)) X W_v,h,   concatenated over the heads, then W_o (+ b)
"""

from __future__ import annotations

from torch import Tensor, nn


class SelfAttention(nn.Module):
    """The weights: 4 D^2 parameters, and D for the output's bias."""

    def __init__(self, width: int, heads: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=bias)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k and v, (B, H, N, D / H)."""
        q, k, v = (self.by_head(part) for part in self.qkv(x).chunk(3, -1))
        return q, k, v

    def by_head(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
