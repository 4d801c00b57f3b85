"""How rows of a mechanism differ from those of the softmax that it stands for, head by head.

    KL   mean_i sum_j P_ij ln(P_ij / A_ij)          H   mean_i - sum_j A_ij ln A_ij, beside that of P
    rho  mean_i Spearman(A_i, P_i)

P_ij rises with the score q_i . k_j, so rho says how nearly A does, too: 1 if its weights are monotone in
the scores, as those of an exponential are and those of elu + 1 or a Taylor series need not be (Zhang et
al. 2024, arXiv 2402.04347, section 3). Rows that do not sum to 1 are divided by their sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.attention.operator import Operator
from xattn.attention.statistics import compared_rows, row_divergence, row_entropy
from xattn.correlation import spearman


@dataclass(frozen=True, eq=False)
class RowComparison:
    """Means over rows, in float64, for B images and H heads."""

    divergence: Tensor
    """KL in nats, (B, H)."""
    entropy: Tensor
    """H of the mechanism's rows in nats, (B, H)."""
    softmax_entropy: Tensor
    """H of the softmax's rows, (B, H)."""
    order: Tensor
    """rho, (B, H), in [-1, 1]; rows without an order, such as uniform ones, count as 0."""


@torch.no_grad()
def compare_rows(
    softmax: Operator, operator: Operator, queries: Tensor | None = None
) -> RowComparison:
    """Compare rows of two operators of one shape (B, H, N, S), in blocks of rows.

    Args:
        queries: LongTensor (R,) of rows in 0..N - 1; all by default.

    Raises:
        ValueError: different shapes, rows out of range, or negative entries.
    """
    queries = compared_rows(queries, softmax=softmax, operator=operator)
    sums = [torch.zeros(softmax.shape[:2], dtype=torch.float64, device="cpu") for _ in range(4)]
    for index in queries.split(softmax.row_chunks()[0].stop):
        p, a = (x.rows(index.to(x.device)).cpu().double() for x in (softmax, operator))
        order = spearman(a.flatten(0, 2), p.flatten(0, 2)).nan_to_num(0.0).view(a.shape[:3])
        found = row_divergence(p, a), row_entropy(a), row_entropy(p), order
        for total, values in zip(sums, found, strict=True):
            total += values.sum(-1)
    return RowComparison(*(total / len(queries) for total in sums))
