"""Sparse attention of grid tokens: patterns that state which tokens see which, in addition to prefix
tokens.

    operator = pattern_operator(inputs, Pattern(blocks, order, rule), backend=backend)

Prefix tokens see all tokens and are seen by all tokens. In causal attention, each token sees only tokens up
to itself.

Masked attention is computed in bands of queries. Each band reads only the keys between its first and last
visible key. If queries see neighbourhoods on a grid in raster order, most entries of a stored mask are
hidden. A band of a few grid rows then sees one run of keys, so it needs neither the rest of the mask nor a
copy of its keys.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import Inputs, spread_heads, to_heads
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.lowering import bands_are_faster, mask_is_faster
from xattn.attention.operators.segments import Ordered, Piece, SegmentsOperator
from xattn.attention.order import Order, take_rows
from xattn.attention.plans import Constants, constant_name, load_or_make, real_tensors
from xattn.attention.selection import Blocks, Rule, Segment, causal_blocks, visible

QUERIES = 64  # smallest number of queries in a band
COUNT = 16  # largest number of bands
WORTH = 0.85  # bands are used if they cost at most this share of dense attention


class Band(NamedTuple):
    """A range of queries, a range of keys, and the term added to their scores."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    bias: Tensor
    """(1, 1, rows, prefix + keys), prefix tokens first."""


def bands_of(mask: Tensor, prefix: int) -> tuple[Band, ...]:
    """Divide the queries after the prefix into bands for a mask (1, 1, N, N). If bands would save too
    little, the result is empty."""
    n = mask.shape[3]
    count = min(COUNT, (n - prefix) // QUERIES)
    if count < 2:
        return ()
    step = -(-(n - prefix) // count)
    seen = ~mask[0, 0].isneginf()
    made, work = [], prefix * n
    for start in range(prefix, n, step):
        rows = start, min(start + step, n)
        visible = seen[rows[0] : rows[1], prefix:].any(0).nonzero()[:, 0] + prefix
        if not len(visible):
            return ()
        keys = int(visible[0]), int(visible[-1]) + 1
        work += (rows[1] - rows[0]) * (prefix + keys[1] - keys[0])
        part = mask[:, :, rows[0] : rows[1]]
        bias = torch.cat([part[..., :prefix], part[..., keys[0] : keys[1]]], -1)
        made.append(Band(rows, keys, bias))
    return tuple(made) if work <= WORTH * n * n else ()


class BandedOperator(SoftmaxOperator):
    """Softmax attention with a mask whose bands are known. Only A X is computed by bands."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float | None,
        mask: Tensor,
        bands: tuple[Band, ...],
        prefix: int,
    ) -> None:
        super().__init__(q, k, scale, mask, every_row=True)
        self.bands, self.prefix = bands, prefix

    @property
    def pairs(self) -> float:
        p = self.prefix
        return p * self.shape[3] + sum(
            (rows[1] - rows[0]) * (p + keys[1] - keys[0]) for rows, keys, _ in self.bands
        )

    def matvec(self, x: Tensor) -> Tensor:
        p, scale = self.prefix, self.scale
        q, k, x = self.q, spread_heads(self.k, self.shape[1]), spread_heads(x, self.shape[1])
        parts = []
        if p:
            first = self.bias[:, :, :p]  # type: ignore[index]
            parts.append(F.scaled_dot_product_attention(q[:, :, :p], k, x, first, scale=scale))
        for (start, end), keys, bias in self.bands:
            near_k, near_x = _near(k, keys, p), _near(x, keys, p)
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:end], near_k, near_x, bias, scale=scale
                )
            )
        return torch.cat(parts, 2)

    def matvec_and_keep(self, x: Tensor) -> Tensor:
        return self.matvec(x)  # the same result as without recording


def _near(x: Tensor, keys: tuple[int, int], prefix: int) -> Tensor:
    """Return a band's keys or values, with those of the prefix tokens first."""
    some = x[:, :, keys[0] : keys[1]]
    return torch.cat([x[:, :, :prefix], some], 2) if prefix else some


@dataclass(frozen=True, eq=False)
class Pattern:
    """Lists of the blocks that queries read, where the tokens after the prefix are arranged on M places.

    Example:
        >>> import torch
        >>> from xattn.attention import Blocks, Inputs, Pattern, pattern_operator
        >>> q, k, v = torch.rand(3, 1, 2, 8, 8)
        >>> index = torch.tensor([0, 1], dtype=torch.int32).view(1, 1, 2, 1)
        >>> blocks = Blocks(index, q_block=4, k_block=4)
        >>> A = pattern_operator(Inputs(q, k, v), Pattern(blocks))
        >>> A.rows(torch.tensor([0]))[0, 0, 0, 4:]
        tensor([0., 0., 0., 0.])
    """

    blocks: Blocks
    order: Order | None = None
    """An order of the grid tokens, to which all other fields refer; None keeps the given order."""
    rule: Rule | None = None
    """Which keys of the listed blocks a query sees."""
    bias: Tensor | None = None
    """(B or 1, H or 1, M), added to a key's scores."""
    share: Tensor | None = None
    """(B, H or Hk, query blocks, s), added to the scores of each listed block."""
    fixed: bool = False
    """Whether the pattern is the same for all images and heads, so that its masks are worth storing."""

    def kept_mask(self, *layout: Any) -> tuple[Tensor, tuple[Band, ...]]:
        """Return the mask of a fixed pattern and its bands, which are built only once.

        The arguments are those of :func:`_mask`.
        """
        if torch.compiler.is_dynamo_compiling():
            found: tuple[Tensor, tuple[Band, ...]] = getattr(Constants, self._name_of_mask(*layout))
            return found
        return self._kept_mask(*layout)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _name_of_mask(self, *layout: Any) -> str:
        return constant_name(self._kept_mask(*layout))

    def _kept_mask(self, *layout: Any) -> tuple[Tensor, tuple[Band, ...]]:
        def make() -> tuple[Tensor, tuple[Band, ...]]:
            with real_tensors():
                mask = _mask(self, *layout)
                return mask, bands_of(mask, layout[1])

        return load_or_make((self, *layout), make)


def pattern_operator(
    inputs: Inputs,
    pattern: Pattern,
    *,
    backend: str = "auto",
    every_row: bool = True,
    ordered: tuple[Tensor, Tensor] | None = None,
) -> Operator:
    """Return the operator of softmax attention over the keys that ``pattern`` lists.

    Args:
        ordered: queries and keys after the prefix in the pattern's order, if they are available.
        every_row: whether every query is known to see a key; if there is a prefix, every query does.

    Example:
        >>> import torch
        >>> from xattn.attention import Blocks, Inputs, Pattern, pattern_operator
        >>> q, k, v = torch.rand(3, 1, 2, 8, 8)
        >>> index = torch.tensor([0, 1], dtype=torch.int32).view(1, 1, 2, 1)
        >>> blocks = Blocks(index, q_block=4, k_block=4)
        >>> pattern_operator(Inputs(q, k, v), Pattern(blocks)).matvec(v).shape
        torch.Size([1, 2, 8, 8])
    """
    q, k, prefix = inputs.q, inputs.k, inputs.prefix
    n = q.shape[2]
    by_lists = pattern.share is not None
    layout = operator.index(n - prefix), operator.index(prefix), inputs.causal, q.dtype
    if pattern.fixed and every_row and not by_lists and bands_are_faster(q, k.shape[2], backend):
        mask, bands = pattern.kept_mask(*layout)
        if bands:
            return _facts(BandedOperator(q, k, inputs.scale, mask, bands, prefix), inputs)
    if not by_lists and mask_is_faster(q, k.shape[2], pattern.blocks, backend, pattern.fixed):
        mask = pattern.kept_mask(*layout)[0] if pattern.fixed else _mask(pattern, *layout)
        mask = to_heads(mask, q.shape[1])
        return _facts(SoftmaxOperator(q, k, inputs.scale, mask, every_row=every_row), inputs)
    order, bias = pattern.order, pattern.bias
    grid_q, grid_k = q[:, :, prefix:], k[:, :, prefix:]
    places: range | Ordered = range(prefix, n)
    if order is not None:
        grid_q, grid_k = ordered or (order.apply(grid_q), order.apply(grid_k))
        places = Ordered(order, prefix)
        if order.is_padded and pattern.rule is None:
            hidden = torch.zeros(len(order.index), dtype=q.dtype, device=q.device)
            hidden = hidden.masked_fill(order.padding, -torch.inf)[None, None]
            bias = hidden if bias is None else bias + hidden
    segments = _listed(pattern, Segment(grid_k, None, pattern.blocks, pattern.rule, bias), grid_q)
    columns = [places] * len(segments)
    pieces = []
    if prefix:
        segments.append(Segment(k[:, :, :prefix]))
        columns.append(range(prefix))
        pieces.append(prefix_piece(inputs))
    pieces.append(Piece(grid_q, tuple(segments), tuple(columns)))
    return _facts(SegmentsOperator(pieces, order, n, inputs.scale, backend), inputs)


def prefix_piece(inputs: Inputs) -> Piece:
    """Return the piece whose queries are the prefix tokens. These see all tokens; in causal attention, each
    of them sees only the prefix tokens up to itself."""
    q, k, prefix = inputs.q, inputs.k, inputs.prefix
    seen, columns = Segment(k), range(k.shape[2])
    if inputs.causal:
        blocks, rule = causal_blocks(prefix, device=k.device)
        seen, columns = Segment(k[:, :, :prefix], None, blocks, rule), range(prefix)
    return Piece(q[:, :, :prefix], (seen,), (columns,))


def chosen_keys_operator(
    inputs: Inputs, keep: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> SegmentsOperator:
    """Return the operator of softmax attention in which all queries of a head see the same list of keys.

    Prefix tokens are always seen as well.

    Args:
        keep: LongTensor (B, H, w), the token numbers of the keys, none of which is in the prefix.
        bias: (B, H, S), added to a key's scores.
    """
    k, prefix = inputs.k, inputs.prefix
    columns = keep
    if prefix:
        always = torch.arange(prefix, device=k.device).expand(*keep.shape[:2], -1)
        columns = torch.cat([always, keep], -1)
    kept = take_rows(k, columns)
    segment = Segment(kept, bias=None if bias is None else bias.gather(2, columns))
    piece = Piece(inputs.q, (segment,), (columns,))
    return SegmentsOperator([piece], None, k.shape[2], inputs.scale, backend, every_row=True)


def _listed(pattern: Pattern, every: Segment, q: Tensor) -> list[Segment]:
    """Return the listed blocks as one segment or, if every listed block has its own share, as one segment
    for each position in the lists."""
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


def _mask(pattern: Pattern, tokens: int, prefix: int, causal: bool, dtype: torch.dtype) -> Tensor:
    """Build the mask (B or 1, H or Hk or 1, N, N). It is -inf where a key is hidden; elsewhere it is the
    key's bias, or 0 if there is none."""
    order, lists, bias = pattern.order, pattern.blocks.index, pattern.bias
    count = tokens if order is None else len(order.index)
    segment = Segment(lists.new_empty(1, 1, count, 0), None, pattern.blocks, pattern.rule)
    every = torch.arange(count, device=lists.device)
    seen = visible(segment, every).expand(*lists.shape[:2], -1, -1)
    if order is not None:
        seen = order.undo(order.undo(seen, 2), 3)
        bias = None if bias is None else order.undo(bias, 2)
    added = lists.new_zeros((), dtype=dtype) if bias is None else bias[:, :, None]
    mask = F.pad(added.masked_fill(~seen, -torch.inf), (prefix, 0, prefix, 0))
    if causal and prefix:
        every = torch.arange(mask.shape[3], device=mask.device)
        mask[..., :prefix, :] = 0.0
        mask[..., :prefix, :].masked_fill_(every > every[:prefix, None], -torch.inf)
    return mask
