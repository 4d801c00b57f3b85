"""Pointing: a distribution over the elements of the input, by additive attention (arXiv 1506.03134).

    u_tj = v . tanh(W_1 e_j + W_2 d_t),    p_t = softmax over the j that are still allowed

If d_t is the same at every step, the likelihood of an order is that of Plackett and Luce with the scores
u_j: the first place is drawn by softmax, the next by softmax over what is left, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST = 2**24  # entries of the tanh at once


class Pointing(nn.Module):
    """Scores (B, T, n) of elements (B, n, C) by queries (B, T, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_elements = nn.Linear(width, width, bias=False)
        self.of_queries = nn.Linear(width, width)
        self.v = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, elements: Tensor, queries: Tensor) -> Tensor:
        keys, queries = self.of_elements(elements)[:, None], self.of_queries(queries)
        steps = max(1, LARGEST // max(1, keys.numel()))
        parts = [(keys + part[:, :, None]).tanh() @ self.v for part in queries.split(steps, 1)]
        return torch.cat(parts, 1)


def left_over(orders: Tensor, count: int) -> Tensor:
    """Which of ``count`` elements the steps of ``orders`` (B, T) may still take, bool (B, T, count): those
    of no step before. Entries beyond them, such as -1, take none."""
    taken = orders[..., None] == torch.arange(count, device=orders.device)
    return taken.cumsum(1) - taken.long() == 0


def plackett_luce(scores: Tensor, orders: Tensor) -> Tensor:
    """Log likelihood (B,) of ``orders`` (B, T) of the elements with ``scores`` (B, n); T may be below n.

    >>> plackett_luce(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2, 0]])).exp()
    tensor([0.1667])
    """
    chosen = scores.gather(1, orders)
    rest = scores.scatter(1, orders, -torch.inf).logsumexp(1, keepdim=True)
    left = torch.cat([chosen, rest], 1).flip(1).logcumsumexp(1).flip(1)
    return (chosen - left[:, :-1]).sum(1)
