"""Sparse attention of grid tokens: which of them see which, beside prefix tokens.

    operator = pattern_operator(inputs, Pattern(blocks, order, rule), backend=backend)

Prefix tokens see all tokens and are seen by all; in causal attention each sees those up to itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.bands import Band, BandedOperator, bands_of
from xattn.attention.inputs import Inputs, to_heads
from xattn.attention.lowering import bands_are_faster, mask_is_faster
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.order import Order, take_rows
from xattn.attention.segments import Blocks, Rule, Segment, visible
from xattn.attention.segments_operator import Piece, SegmentsOperator
from xattn.kernels.block_sparse.box import causal


@dataclass(frozen=True, eq=False)
class Pattern:
    """Block lists over the grid tokens, all tokens behind the prefix, on M places."""

    blocks: Blocks
    order: Order | None = None
    """Of the grid tokens, to which all else refers; the given order by default."""
    rule: Rule | None = None
    """Which keys of the listed blocks a query sees."""
    bias: Tensor | None = None
    """(B or 1, H or 1, M), added to a key's scores."""
    share: Tensor | None = None
    """(B, H or Hk, query blocks, s), added to the scores of each listed block."""
    fixed: bool = False
    """Whether it is the same for all images and heads, so that its masks are worth keeping."""
    masks: dict[Any, tuple[Tensor, tuple[Band, ...]]] = field(default_factory=dict)


def pattern_operator(
    inputs: Inputs,
    pattern: Pattern,
    *,
    backend: str = "auto",
    every_row: bool = True,
    ordered: tuple[Tensor, Tensor] | None = None,
) -> Operator:
    """Softmax attention over what ``pattern`` lists.

    Args:
        ordered: queries and keys behind the prefix in the pattern's order, if they are at hand.
        every_row: whether every query is known to see a key; with a prefix each does.
    """
    q, k, prefix = inputs.q, inputs.k, inputs.prefix
    by_lists = pattern.share is not None
    if pattern.fixed and every_row and not by_lists and bands_are_faster(q, k.shape[2], backend):
        mask, bands = _kept_mask(inputs, pattern)
        if bands:
            return _facts(BandedOperator(q, k, inputs.scale, mask, bands, prefix), inputs)
    if not by_lists and mask_is_faster(q, k.shape[2], pattern.blocks, backend, pattern.fixed):
        mask = _kept_mask(inputs, pattern)[0] if pattern.fixed else _mask(inputs, pattern)
        return _facts(SoftmaxOperator(q, k, inputs.scale, mask, every_row=every_row), inputs)
    device, tokens = q.device, torch.arange(q.shape[2], device=q.device)
    order, bias = pattern.order, pattern.bias
    grid_q, grid_k, places = q[:, :, prefix:], k[:, :, prefix:], tokens[prefix:]
    where = None
    if order is not None:
        order = order.to(device)
        grid_q, grid_k = ordered or (order.apply(grid_q), order.apply(grid_k))
        places = torch.where(order.padding, -1, order.index + prefix)
        where = torch.cat([tokens[:prefix], order.inverse + prefix])
        if order.is_padded and pattern.rule is None:
            hidden = torch.zeros(len(places), dtype=q.dtype, device=device)
            hidden = hidden.masked_fill(order.padding, -torch.inf)[None, None]
            bias = hidden if bias is None else bias + hidden
    segments = _listed(pattern, Segment(grid_k, None, pattern.blocks, pattern.rule, bias), grid_q)
    columns = [places] * len(segments)
    pieces = []
    if prefix:
        first, own = Segment(k[:, :, :prefix]), tokens[:prefix]
        segments.append(first)
        columns.append(own)
        seen = Segment(k), tokens
        if inputs.causal:
            seen = Segment(first.k, rule=causal(prefix).to(device)), own
        pieces.append(Piece(q[:, :, :prefix], (seen[0],), (seen[1],)))
    padded = order is not None and order.is_padded
    pieces.append(Piece(grid_q, tuple(segments), tuple(columns), padded))
    operator = SegmentsOperator(pieces, where, len(tokens), inputs.scale, backend)
    return _facts(operator, inputs)


def chosen_keys_operator(
    inputs: Inputs, keep: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> SegmentsOperator:
    """Softmax attention of all queries to the prefix tokens and to one list of keys per head.

    Args:
        keep: LongTensor (B, H, w), numbers of tokens behind the prefix.
        bias: (B, H, S), added to a key's scores.
    """
    k, prefix = inputs.k, inputs.prefix
    columns = keep
    if prefix:
        always = torch.arange(prefix, device=k.device).expand(*keep.shape[:2], -1)
        columns = torch.cat([always, keep], -1)
    kept = take_rows(k, columns)
    segment = Segment(kept, bias=None if bias is None else bias.gather(2, columns))
    piece = Piece(inputs.q, (segment,), (columns,), padded=False)
    return SegmentsOperator([piece], None, k.shape[2], inputs.scale, backend, every_row=True)


def _listed(pattern: Pattern, every: Segment, q: Tensor) -> list[Segment]:
    """The listed blocks as one segment; where each has a share of its own, as one for each."""
    if pattern.share is None:
        return [every]
    blocks, found = pattern.blocks, []
    for i, share in enumerate(pattern.share.unbind(-1)):
        one = replace(blocks, index=blocks.index[..., i : i + 1].contiguous())
        offset = share.repeat_interleave(blocks.q_block, -1)[..., : q.shape[2]]
        found.append(replace(every, blocks=one, offset=offset))
    return found


def _facts(operator: Operator, inputs: Inputs) -> Operator:
    operator.causal, operator.hides = inputs.causal, True
    return operator


def _kept_mask(inputs: Inputs, pattern: Pattern) -> tuple[Tensor, tuple[Band, ...]]:
    """The mask of a fixed pattern and its bands, made once."""
    key = inputs.prefix, inputs.causal, inputs.q.dtype, inputs.q.device
    if key not in pattern.masks:
        mask = _mask(inputs, pattern)
        pattern.masks[key] = mask, bands_of(mask, inputs.prefix)
    return pattern.masks[key]


@torch.inference_mode(False)  # kept masks may serve training later
def _mask(inputs: Inputs, pattern: Pattern) -> Tensor:
    """(B or 1, H or 1, N, N): 0 or the key's own bias, and -inf where it is hidden."""
    q, prefix = inputs.q, inputs.prefix
    order, lists = pattern.order, pattern.blocks.index
    device, heads = lists.device, (*lists.shape[:2],)
    count = inputs.k.shape[2] - prefix if order is None else len(order.index)
    segment = Segment(
        torch.empty(1, 1, count, 0, device=device), None, pattern.blocks, pattern.rule
    )
    seen = visible(segment, torch.arange(count, device=device)).expand(*heads, -1, -1)
    bias = pattern.bias
    if order is not None:
        seen = order.undo(order.undo(seen, 2), 3)
        bias = None if bias is None else order.undo(bias, 2)
    added = torch.zeros((), dtype=q.dtype, device=device) if bias is None else bias[:, :, None]
    mask = added.masked_fill(~seen, -torch.inf)
    mask = F.pad(mask, (prefix, 0, prefix, 0)).to(q.device)
    if inputs.causal and prefix:
        every = torch.arange(mask.shape[3], device=mask.device)
        mask[..., :prefix, :] = 0.0
        mask[..., :prefix, :].masked_fill_(every > every[:prefix, None], -torch.inf)
    return to_heads(mask, q.shape[1])
