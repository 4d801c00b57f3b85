"""Softmax attention over unions of key segments, as an operator on values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import may_read_values, spread_heads, to_heads
from xattn.attention.operators.base import CachedProductOperator, products
from xattn.attention.operators.lowering import attend, attend_output
from xattn.attention.order import Order, take_rows
from xattn.attention.selection import Segment, visible
from xattn.kernels.softmax.reference import widen


class Ordered(NamedTuple):
    """The tokens after a prefix, in a different order."""

    order: Order
    prefix: int


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries ``q`` (B, H, M, D) and the keys that they see.

    Attributes: ``segments``, key segments without values; ``columns``, the tokens to which the keys of each
    segment belong: a LongTensor (B, H or Hk, S), a range of tokens, or :class:`Ordered` tokens.
    """

    q: Tensor
    segments: tuple[Segment, ...]
    columns: tuple[Tensor | range | Ordered, ...]


class SegmentsOperator(CachedProductOperator):
    """Attention whose rows are divided into pieces, such as prefix tokens and patches in tile order.

    Args:
        pieces: the pieces, a sequence of :class:`Piece`. Every token is a query of exactly one piece, and
            the pieces contain the tokens in order.
        order: the order of the tokens in the last piece; None if it is the given order.
        keys: S, the number of tokens that can be seen.
        scale, backend: see :func:`attend`.
        every_row: whether every row is known to see a key. The backend "auto" may then use PyTorch's own
            attention for a single dense segment with a bias.
        causal: whether the pieces are known to hide later keys.

    Example:
        >>> import torch
        >>> from xattn.attention.operators.segments import Piece
        >>> from xattn.attention import Segment, SegmentsOperator
        >>> q, k = torch.rand(2, 1, 2, 6, 8)
        >>> halves = (Segment(k[:, :, :3]), Segment(k[:, :, 3:]))  # one softmax over both
        >>> A = SegmentsOperator([Piece(q, halves, (range(3), range(3, 6)))], None, keys=6)
        >>> A.row_sums().allclose(torch.ones(1, 2, 6))
        True
    """

    stochastic = True
    hides = True

    def __init__(
        self,
        pieces: Sequence[Piece],
        order: Order | None,
        keys: int,
        scale: float | None = None,
        backend: str = "auto",
        every_row: bool = False,
        causal: bool = False,
    ) -> None:
        self.causal = causal
        self.pieces = tuple(pieces)
        q = self.pieces[0].q
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.backend = backend
        self._order, self._every_row = order, every_row
        last = self.pieces[-1].q.shape[2] if order is None else len(order.inverse)
        queries = sum(p.q.shape[2] for p in self.pieces[:-1]) + last
        self.shape = (q.shape[0], q.shape[1], queries, keys)

    @property
    def pairs(self) -> float:
        """The number of pairs that are read. In a block that is read, hidden pairs count as well."""
        total = 0.0
        for piece in self.pieces:
            for segment in piece.segments:
                if segment.blocks is None:
                    total += piece.q.shape[2] * segment.k.shape[2]
                    continue
                index = segment.blocks.index
                size = segment.blocks.q_block * (
                    segment.blocks.k_block + (0 if segment.marks is None else 0.5)
                )
                total += float((index >= 0).sum()) / (index.shape[0] * index.shape[1]) * size
        return total

    def answer(self, v: Tensor) -> Tensor:
        """Compute A V and store it for later calls; return the log-sum-exp."""
        y, lse = self.attend(v)
        self.hold(v, y)
        return lse

    def matvec(self, x: Tensor) -> Tensor:
        known = self.held(x)
        return self._matvec(x) if known is None else known

    def matvec_of(self, parts: Mapping[range, Tensor]) -> Tensor:
        """Compute the same as :meth:`matvec` for an X given in parts, one for each range in ``columns``."""
        return self._matvec(parts)

    def _matvec(self, x: Tensor | Mapping[range, Tensor]) -> Tensor:
        parts = [
            attend_output(
                piece.q,
                self._segments(piece, x),
                scale=self.scale,
                backend=self.backend,
                every_row=self._every_row,
            )
            for piece in self.pieces
        ]
        return self._in_order(parts)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (A X, log-sum-exp) in token order."""
        parts = [
            attend(piece.q, self._segments(piece, x), scale=self.scale, backend=self.backend)
            for piece in self.pieces
        ]
        return self._in_order([o for o, _ in parts]), self._in_order([lse for _, lse in parts])

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        if self._order is not None:
            parts = [*parts[:-1], self._order.undo(parts[-1], 2)]
        return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 2)

    def _segments(self, piece: Piece, x: Tensor | Mapping[range, Tensor]) -> list[Segment]:
        some = x if isinstance(x, Tensor) else next(iter(x.values()))
        heads = max(
            some.shape[1], *(s.k.shape[1] for s in piece.segments)
        )  # H, or Hk if all have Hk
        x = spread_heads(x, heads) if isinstance(x, Tensor) else x
        found = []
        for s, columns in zip(piece.segments, piece.columns, strict=True):
            if isinstance(x, Tensor):
                v = _take(x, columns)
            else:
                v = spread_heads(x[columns], heads)  # type: ignore[index]
            found.append(replace(_with_heads(s, heads), v=v))
        return found

    def rows(self, index: Tensor) -> Tensor:
        batch, heads, _, keys = self.shape
        out = widen(self.pieces[0].q.new_zeros(batch, heads, len(index), keys))
        for piece, tokens in self._tokens():
            if len(self.pieces) == 1:
                return self._rows(piece, index)
            own = index - tokens.start
            inside = (own >= 0) & (own < len(tokens))
            if may_read_values(index):
                at = inside.nonzero()[:, 0]
                if len(at):
                    out[:, :, at] = self._rows(piece, own[at])
            else:
                rows = self._rows(piece, own.clamp(0, len(tokens) - 1))
                out = torch.where(inside[:, None], rows, out)
        return out

    def tile(self, rows: slice, columns: slice) -> Tensor:
        wanted, parts = range(self.shape[2])[rows], []
        if wanted.step != 1 or not wanted:
            return super().tile(rows, columns)
        for piece, tokens in self._tokens():
            start, stop = max(wanted.start, tokens.start), min(wanted.stop, tokens.stop)
            if start < stop:
                own = torch.arange(start - tokens.start, stop - tokens.start, device=self.device)
                parts.append(self._rows(piece, own))
        return torch.cat(parts, 2)[..., columns]

    def _tokens(self) -> Iterator[tuple[Piece, range]]:
        """Yield each piece with the range of tokens that it contains."""
        start = 0
        for piece in self.pieces:
            end = self.shape[2] if piece is self.pieces[-1] else start + piece.q.shape[2]
            yield piece, range(start, end)
            start = end

    def _rows(self, piece: Piece, tokens: Tensor) -> Tensor:
        """Compute the rows of A, (B, H, R, S), for some tokens of one piece."""
        order = self._order if piece is self.pieces[-1] else None
        places = tokens if order is None else order.inverse[tokens]
        batch, heads, _, keys = self.shape
        q = piece.q[:, :, places]
        scores = []
        for s in piece.segments:
            part = products(q, spread_heads(s.k, heads), self.scale)
            if s.bias is not None:
                part = part + to_heads(s.bias[:, :, None, :], heads)
            part = part.masked_fill(~to_heads(visible(s, places), heads), -torch.inf)
            part = part if s.marks is None else _opened(part, s, q, self.scale)
            part = part + s.shift if s.shift else part
            if s.offset is not None:
                part = part + to_heads(s.offset, heads)[:, :, places, None]
            scores.append(part)
        weights = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0)
        columns = torch.cat([_spread(c, batch, heads, q.device) for c in piece.columns], -1)
        target = columns.clamp(min=0)[:, :, None].expand_as(weights)
        weights = weights.masked_fill((columns < 0)[:, :, None], 0.0)
        return weights.new_zeros(batch, heads, len(places), keys).scatter_add_(-1, target, weights)

    def _anchor(self) -> Tensor:
        return self.pieces[0].q


def _opened(scores: Tensor, s: Segment, q: Tensor, scale: float) -> Tensor:
    """Return scores (B, H, R, S) whose softmax over all keys equals a softmax over landmarks times a
    softmax within each block."""
    assert s.blocks is not None and s.marks is not None
    gates = products(q, spread_heads(s.marks, q.shape[1]), scale)
    gates = gates if s.weight is None else gates + s.weight.to(gates.dtype).log()
    block = s.blocks.k_block
    cells = F.pad(scores, (0, -scores.shape[-1] % block), value=-torch.inf).unflatten(
        -1, (-1, block)
    )
    lse = cells.logsumexp(-1)
    opened = cells + (gates - lse.masked_fill(lse.isneginf(), 0.0))[..., None]
    return opened.flatten(-2)[..., : scores.shape[-1]]


def _take(x: Tensor, columns: Tensor | range | Ordered) -> Tensor:
    """Return the rows of ``x`` (B, H, S, m) for the columns of a piece, with zeros in padding."""
    if isinstance(columns, range):
        return x[:, :, columns.start : columns.stop]
    if isinstance(columns, Ordered):
        return columns.order.apply(x[:, :, columns.prefix :])
    return take_rows(x, spread_heads(columns, x.shape[1]))


def _with_heads(s: Segment, heads: int) -> Segment:
    """Return the segment with ``heads`` key heads, and with lists and biases that match them."""
    if s.k.shape[1] == heads:
        return s
    blocks, bias, offset = s.blocks, s.bias, s.offset
    if blocks is not None:
        blocks = replace(blocks, index=to_heads(blocks.index, heads))
    bias = None if bias is None else to_heads(bias, heads)
    offset = None if offset is None else to_heads(offset, heads)
    marks = None if s.marks is None else spread_heads(s.marks, heads)
    k = spread_heads(s.k, heads)
    return replace(s, k=k, blocks=blocks, bias=bias, offset=offset, marks=marks)


def _spread(
    columns: Tensor | range | Ordered, batch: int, heads: int, device: torch.device
) -> Tensor:
    """Return the token numbers (B, H, K), with -1 for padding."""
    if isinstance(columns, Tensor):
        return spread_heads(columns, heads)
    if isinstance(columns, range):
        line = torch.arange(columns.start, columns.stop, device=device)
    else:
        index = columns.order.index
        line = torch.where(index < 0, -1, index + columns.prefix)
    return line.expand(batch, heads, -1)
