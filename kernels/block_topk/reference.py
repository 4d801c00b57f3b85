"""The definition of block scores and of the choice of blocks, in plain torch; stores N x C scores.

    t_ic = scale q_i . k_c                      or its softmax over the candidates c that i may see
    r_mc = sum, mean or max of t_ic over the queries i of block m and the heads of the group
    r'_mj = max, sum or mean of r_mc over c in [j stride - padding, j stride - padding + kernel)

and the s best j of each m: the forced ones first, then by descending score, ties to the lowest j.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax.reference import widen


def topk(
    q: Tensor,
    k: Tensor,
    forced: Tensor | None,
    within: Tensor | None,
    visible: Tensor | None,
    s: int,
    q_block: int,
    reduce: str,
    softmax: bool,
    spread: list[int],
    pooling: str,
    children: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    values = scores(q, k, visible, q_block, reduce, softmax, spread, pooling, scale)
    if within is not None:
        parent = parents(values.shape[2], within).to(values.device)
        allowed = is_child(within[:, :, parent], children, values.shape[3])
        values = values.masked_fill(~allowed, -torch.inf)
    values = force(values, forced)
    values, index = values.sort(dim=-1, descending=True, stable=True)
    index = torch.where(values.isneginf(), -1, index)
    missing = max(0, s - values.shape[3])
    return (
        F.pad(index[..., :s], (0, missing), value=-1).int(),
        F.pad(values[..., :s], (0, missing), value=-torch.inf),
    )


def scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor | None,
    q_block: int,
    reduce: str,
    softmax: bool,
    spread: list[int],
    pooling: str,
    scale: float,
) -> Tensor:
    """r' (B, Hk, ceil(N / q_block), C or M with ``spread``); -inf where nothing is seen.

    Differentiable, unlike the choice.
    """
    n, c = q.shape[2], k.shape[2]
    rows = -(-n // q_block)
    t = scale * (widen(q).unflatten(1, (k.shape[1], -1)) @ widen(k)[:, :, None].transpose(-2, -1))
    hidden = None if visible is None else torch.arange(c, device=k.device) >= visible[:, None]
    if softmax:
        if hidden is not None:  # a query that sees nothing is overwritten below
            each = (hidden & ~hidden.all(1, keepdim=True)).repeat_interleave(q_block, 0)[:n]
            t = t.masked_fill(each, -torch.inf)
        t = t.softmax(-1)
    fill = -torch.inf if reduce == "max" else 0.0
    t = F.pad(t, (0, 0, 0, rows * q_block - n), value=fill).unflatten(3, (rows, q_block))
    r = t.amax((2, 4)) if reduce == "max" else t.sum((2, 4))
    if reduce == "mean":
        count = (n - torch.arange(rows, device=q.device) * q_block).clamp(max=q_block)
        r = r / (count * (q.shape[1] // k.shape[1]))[:, None]
    if hidden is not None:
        r = r.masked_fill(hidden, -torch.inf)
    return pool(r, spread, pooling)


def pool(r: Tensor, spread: list[int], pooling: str) -> Tensor:
    """Pooled scores (..., M) of the candidates (..., C) that are visible; -inf where none is."""
    kernel, stride, padding = spread
    if (kernel, stride, padding) == (1, 1, 0):
        return r
    r = F.pad(r, (padding, padding), value=-torch.inf).unfold(-1, kernel, stride)
    if pooling == "max":
        return r.amax(-1)
    seen = ~r.isneginf()
    count = seen.sum(-1)
    total = torch.where(seen, r, 0.0).sum(-1)
    total = total / count.clamp(min=1) if pooling == "mean" else total
    return total.masked_fill(count == 0, -torch.inf)


def parents(rows: int, within: Tensor) -> Tensor:
    """The parent of each of ``rows`` query blocks."""
    ratio = -(-rows // within.shape[2])
    return torch.arange(rows, device="cpu") // ratio


def is_child(within: Tensor, children: int, candidates: int) -> Tensor:
    """(..., rows, sp) to bool (..., rows, candidates): whether a candidate's parent is listed."""
    blocks = -(-candidates // children)
    table = within.new_zeros(*within.shape[:3], blocks + 1, dtype=torch.bool)
    table.scatter_(-1, torch.where(within < 0, blocks, within).long(), True)
    return table[..., :-1].repeat_interleave(children, -1)[..., :candidates]


def force(values: Tensor, forced: Tensor | None) -> Tensor:
    """``values`` with +inf for the forced candidates."""
    if forced is None:
        return values
    where = torch.where(forced < 0, values.shape[-1], forced).long()
    values = F.pad(values, (0, 1))
    return values.scatter(-1, where.expand(*values.shape[:3], -1), torch.inf)[..., :-1]
