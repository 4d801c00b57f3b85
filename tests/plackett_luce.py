"""The likelihood of orders by Plackett and Luce, which a pointer without memory has."""

import torch


def plackett_luce(scores, orders):
    """Log likelihood (B,) of ``orders`` (B, T) of the elements with ``scores`` (B, n); T may be below n."""
    chosen = scores.gather(1, orders)
    rest = scores.scatter(1, orders, -torch.inf).logsumexp(1, keepdim=True)
    left = torch.cat([chosen, rest], 1).flip(1).logcumsumexp(1).flip(1)
    return (chosen - left[:, :-1]).sum(1)
