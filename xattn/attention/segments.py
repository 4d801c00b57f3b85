"""Softmax attention over a union of key segments, of which most sparse mechanisms are made.

    o_i = sum_j p_ij v_j,   p_i = softmax over the union of the segments' visible keys

Each segment is attended alone; log-sum-exps L_s merge the parts exactly, L = logsumexp_s L_s and
o = sum_s exp(L_s - L) o_s, and because they are differentiable so is the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.operator import Operator, products
from xattn.attention.order import Order
from xattn.kernels.block_sparse import block_sparse_attention
from xattn.kernels.block_sparse.block_lists import check_index
from xattn.kernels.block_sparse.box import Box as Rule
from xattn.kernels.block_topk import block_topk
from xattn.kernels.softmax import softmax_attention
from xattn.kernels.softmax.reference import widen

DENSE = 2048  # the most keys for which a mechanism may keep a mask


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which key blocks each query block reads.

    Attributes: ``index``, int32 (B or 1, H or 1, ceil(N / q_block), s), each row without duplicates,
    -1 = nothing; ``q_block``, ``k_block``, tokens in a block.
    """

    index: Tensor
    q_block: int
    k_block: int

    def to(self, device: torch.device | str) -> Blocks:
        return replace(self, index=self.index.to(device))


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys of one kind: ``k`` (B, H, S, D), ``v`` (B, H, S, Dv), and which of them are visible.

    Attributes: ``blocks``, the key blocks that each query block reads (all if None); ``rule``, which
    keys of these blocks a query sees; ``bias``, (B or 1, H or 1, S), added to a key's scores.
    """

    k: Tensor
    v: Tensor | None = None
    blocks: Blocks | None = None
    rule: Rule | None = None
    bias: Tensor | None = None


def attend(
    q: Tensor, segments: Sequence[Segment], *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` (B, H, N, D) over the union of the segments' keys.

    Returns:
        o (B, H, N, Dv) and the log-sum-exp (B, H, N); a row that sees no key has 0 and -inf.

    Raises:
        ValueError: no segment, or shapes, dtypes and indices that do not match.
    """
    if not segments:
        raise ValueError("segments: got none; give at least one Segment(k, v)")
    parts = [_attend(q, s, scale, backend) for s in segments]
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part[1] for part in parts])
    # Where no segment has a key, exp(-inf - -inf) would be NaN, also in the backward pass.
    empty = lse.isneginf().all(0)
    lse = lse.masked_fill(empty, 0.0)
    total = lse.logsumexp(0)
    share = (lse - total).exp()[..., None].to(q.dtype)
    o = sum(w * part[0] for w, part in zip(share, parts, strict=True))
    return o, total.masked_fill(empty, -torch.inf)  # type: ignore[return-value]


def _attend(q: Tensor, s: Segment, scale: float | None, backend: str) -> tuple[Tensor, Tensor]:
    if s.v is None:
        raise ValueError("segments: got one without values; give Segment(k, v)")
    if s.blocks is None and s.rule is None:
        bias = None if s.bias is None else s.bias[:, :, None, :]
        return softmax_attention(q, s.k, s.v, bias, scale=scale, backend=backend)
    blocks = s.blocks or visible_blocks(s.rule, 64, 64)  # type: ignore[arg-type]
    if backend == "auto" and s.rule is None and _reads_all(s.k, blocks):
        bias = None if s.bias is None else s.bias[:, :, None, :]
        return softmax_attention(q, s.k, s.v, bias, scale=scale)
    return block_sparse_attention(
        q,
        s.k,
        s.v,
        blocks.index.to(q.device),
        q_block=blocks.q_block,
        k_block=blocks.k_block,
        bias=s.bias,
        box=None if s.rule is None else s.rule.to(q.device),
        scale=scale,
        backend=backend,
    )


def dense_is_faster(q: Tensor, k: Tensor, blocks: Blocks) -> bool:
    """Whether dense attention with a stored mask is faster on a CPU than gathering the listed keys.

    The mask takes N x N entries, so above 2048 keys the answer is always no.
    """
    read, keys = blocks.index.shape[-1] * blocks.k_block, k.shape[2]
    return q.device.type == "cpu" and (keys < 512 or (keys <= DENSE and 3 * read > keys))


def _reads_all(k: Tensor, blocks: Blocks) -> bool:
    """Whether every list holds every block; False on a GPU, where looking would stall the stream."""
    count = -(-k.shape[2] // blocks.k_block)
    if k.device.type != "cpu" or blocks.index.shape[-1] != count:
        return False
    check_index(blocks.index, count)
    return bool((blocks.index >= 0).all())


def visible_blocks(rule: Rule, q_block: int, k_block: int) -> Blocks:
    """The key blocks with a key that some query of a query block may see, by bounding boxes.

    With a dilation, single keys (``k_block=1``) are also left out if all queries of the block have one
    residue and the key has another.
    """
    low, high = _per_block(rule.low, q_block, 0), _per_block(rule.high, q_block, 1)
    real = (low <= high).all(-1)  # (blocks, q_block): padding queries have empty boxes
    far = torch.iinfo(torch.int32).max
    first = low.masked_fill(~real[..., None], far).amin(1)
    last = high.masked_fill(~real[..., None], -far).amax(1)
    position = rule.position
    start, end = position, position
    if k_block > 1:
        padded = -(-len(position) // k_block) * k_block - len(position)
        groups = F.pad(position, (0, 0, 0, padded), value=-1).unflatten(0, (-1, k_block))
        key = (groups >= 0) & (groups < 2**30)  # neither added here nor padding before
        start = groups.masked_fill(~key, far).amin(1)
        end = groups.masked_fill(~key, -far).amax(1)
    seen = torch.ones(len(first), len(start), dtype=torch.bool, device=position.device)
    for t, d in enumerate(rule.dilation):
        seen &= (start[None, :, t] <= last[:, None, t]) & (end[None, :, t] >= first[:, None, t])
        if k_block == 1 and d > 1:
            residue = low[..., t] % d
            own = first[:, t] % d
            same = ((residue == own[:, None]) | ~real).all(1)
            seen &= ~same[:, None] | (position[None, :, t] % d == own[:, None])
    most = max(1, int(seen.sum(1).max()))
    # A stable sort puts the visible blocks first and keeps them in order.
    index = (~seen).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    index = index.masked_fill(~seen.gather(1, index), -1)
    return Blocks(index.int()[None, None], q_block, k_block)


def _per_block(x: Tensor, block: int, fill: int) -> Tensor:
    """(N, n) -> (ceil(N / block), block, n); rows that are added are empty boxes (1 > 0)."""
    missing = -(-len(x) // block) * block - len(x)
    return F.pad(x, (0, 0, 0, missing), value=1 - fill).unflatten(0, (-1, block))


def pool(x: Tensor, block: int, stride: int | None = None) -> Tensor:
    """Mean over runs of ``block`` tokens every ``stride`` (``block`` by default) tokens.

    (B, H, N, D) -> (B, H, C, D), C = (N - block) // stride + 1; tokens left over at the end are
    ignored. For a grid, put the tokens in a tile order first.

    Raises:
        ValueError: a block longer than N, or lengths that are not positive.
    """
    stride = block if stride is None else stride
    if not 1 <= block <= x.shape[-2] or stride < 1:
        raise ValueError(
            f"block, stride: got {block}, {stride} for {x.shape[-2]} tokens; give a block of 1 to "
            f"{x.shape[-2]} and a stride of at least 1"
        )
    return x.unfold(-2, block, stride).mean(-1)


def select(
    q: Tensor, k_pooled: Tensor, s: int, *, q_block: int, k_block: int, **options: object
) -> tuple[Blocks, Tensor]:
    """The ``s`` best key blocks of every query block by their pooled keys, without gradient.

    Args:
        q: (B, H, N, D); ``k_pooled``: (B, H, C, D), one key per block of ``k_block``.
        options: ``reduce``, ``softmax``, ``spread``, ``forced``, ``within`` and the others of
            :func:`xattn.kernels.block_topk.block_topk`.

    Returns:
        the blocks, and their scores (B, H, ceil(N / q_block), s).
    """
    index, scores = block_topk(q, k_pooled, s, q_block=q_block, **options)  # type: ignore[arg-type]
    return Blocks(index, q_block, k_block), scores


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries ``q`` (B, H, M, D) and what they see.

    Attributes: ``segments``, without values; ``columns``, for each segment the token that each of
    its keys is: LongTensor (S,) or (B, H, S), -1 = padding.
    """

    q: Tensor
    segments: tuple[Segment, ...]
    columns: tuple[Tensor, ...]


class SegmentsOperator(Operator):
    """Attention whose rows come in :class:`Piece` s: prefix tokens, patches in tile order, ...

    Args:
        pieces: every token is a query of exactly one.
        places: LongTensor (N,), where each token stands in the concatenated queries of the pieces;
            None if the pieces hold the tokens in order.
        keys: S, the number of tokens that can be seen.
        scale, backend: as in :func:`attend`.
        every_row: whether every row is known to see a key, so that under "auto" PyTorch's own
            attention may answer for a single dense segment.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        places: Tensor | None,
        keys: int,
        scale: float | None = None,
        backend: str = "auto",
        every_row: bool = False,
    ) -> None:
        self.pieces = tuple(pieces)
        q = self.pieces[0].q
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.backend = backend
        self._places, self._every_row = places, every_row
        self._alone = self._only_segment() if every_row and backend == "auto" else None
        queries = sum(p.q.shape[2] for p in self.pieces) if places is None else len(places)
        self.shape = (q.shape[0], q.shape[1], queries, keys)

    def matvec(self, x: Tensor) -> Tensor:
        s = self._alone
        if s is None:
            return self.attend(x)[0]
        (piece,) = self.pieces
        bias = None if s.bias is None else s.bias[:, :, None, :]
        v = _take(x, piece.columns[0])
        return F.scaled_dot_product_attention(piece.q, s.k, v, attn_mask=bias, scale=self.scale)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A X, log-sum-exp) in the order of the tokens."""
        parts = [self._attend(piece, x) for piece in self.pieces]
        o, lse = (
            parts[0] if len(parts) == 1 else (torch.cat(p, 2) for p in zip(*parts, strict=True))
        )
        if self._places is None:
            return o, lse
        return o.index_select(2, self._places), lse.index_select(2, self._places)

    def _only_segment(self) -> Segment | None:
        """The segment, if there is just one, dense and without a learned bias."""
        segments = [s for piece in self.pieces for s in piece.segments]
        s = segments[0]
        sparse = len(segments) > 1 or s.blocks is not None or s.rule is not None
        learned = s.bias is not None and torch.is_grad_enabled() and s.bias.requires_grad
        return None if sparse or learned or self._places is not None else s

    def _attend(self, piece: Piece, x: Tensor) -> tuple[Tensor, Tensor]:
        segments = [
            replace(s, v=_take(x, columns))
            for s, columns in zip(piece.segments, piece.columns, strict=True)
        ]
        return attend(piece.q, segments, scale=self.scale, backend=self.backend)

    def rows(self, index: Tensor) -> Tensor:
        batch, heads, _, keys = self.shape
        places, offset = index if self._places is None else self._places[index], 0
        out = widen(self.pieces[0].q.new_zeros(batch, heads, len(index), keys))
        for piece in self.pieces:
            inside = (places >= offset) & (places < offset + piece.q.shape[2])
            at = inside.nonzero()[:, 0]
            if len(at):
                out[:, :, at] = self._rows(piece, places[at] - offset)
            offset += piece.q.shape[2]
        return out

    def _rows(self, piece: Piece, places: Tensor) -> Tensor:
        """Rows of A of one piece, (B, H, R, S)."""
        batch, heads, _, keys = self.shape
        q = piece.q[:, :, places]
        scores = []
        for s in piece.segments:
            part = products(q, s.k, self.scale)
            if s.bias is not None:
                part = part + s.bias[:, :, None, :]
            scores.append(part.masked_fill(~visible(s, places), -torch.inf))
        weights = torch.cat(scores, -1).softmax(-1).nan_to_num(0.0)
        columns = torch.cat(
            [_spread(c, s.k) for c, s in zip(piece.columns, piece.segments, strict=True)], -1
        )
        target = columns.clamp(min=0)[:, :, None].expand_as(weights)
        weights = weights.masked_fill((columns < 0)[:, :, None], 0.0)
        return weights.new_zeros(batch, heads, len(places), keys).scatter_add_(-1, target, weights)

    def _wide(self) -> SegmentsOperator:
        def plain(x: Tensor) -> Tensor:
            x = widen(x) if x.is_floating_point() else x
            return x.clone() if x.is_inference() else x

        def wide(s: Segment) -> Segment:
            blocks = s.blocks and replace(s.blocks, index=plain(s.blocks.index))
            bias = None if s.bias is None else plain(s.bias)
            return replace(s, k=plain(s.k), blocks=blocks, bias=bias)

        pieces = [
            Piece(plain(p.q), tuple(map(wide, p.segments)), tuple(map(plain, p.columns)))
            for p in self.pieces
        ]
        places = None if self._places is None else plain(self._places)
        return SegmentsOperator(
            pieces, places, self.shape[3], self.scale, self.backend, self._every_row
        )

    def _anchor(self) -> Tensor:
        return self.pieces[0].q


def grid_operator(
    q: Tensor,
    k: Tensor,
    prefix: int,
    order: Order,
    blocks: Blocks,
    rule: Rule | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> SegmentsOperator:
    """Grid tokens attend by block lists, in another order; prefix tokens see and are seen by all.

    Args:
        q, k: (B, H, N, D), the ``prefix`` tokens first.
        order: of the grid tokens; ``blocks``, ``rule`` and ``bias`` (B or 1, H or 1, M) refer to
            its places.
    """
    device, tokens = q.device, torch.arange(q.shape[2], device=q.device)
    order = order.to(device)
    places = torch.where(order.padding, -1, order.index + prefix)
    if order.is_padded and rule is None:
        hidden = torch.zeros(len(places), dtype=q.dtype, device=device)
        hidden = hidden.masked_fill(order.padding, -torch.inf)[None, None]
        bias = hidden if bias is None else bias + hidden
    segments = [Segment(order.apply(k[:, :, prefix:]), None, blocks, rule, bias)]
    columns = [places]
    pieces = []
    if prefix:
        segments.append(Segment(k[:, :, :prefix]))
        columns.append(tokens[:prefix])
        pieces.append(Piece(q[:, :, :prefix], (Segment(k),), (tokens,)))
    pieces.append(Piece(order.apply(q[:, :, prefix:]), tuple(segments), tuple(columns)))
    where = torch.cat([tokens[:prefix], order.inverse + prefix])
    return SegmentsOperator(pieces, where, len(tokens), backend=backend)


def visible(segment: Segment, queries: Tensor) -> Tensor:
    """Which keys of a segment some queries (R,) see: bool, broadcastable to (B, H, R, S)."""
    keys = segment.k.shape[2]
    seen = torch.ones(1, 1, len(queries), keys, dtype=torch.bool, device=queries.device)
    if segment.blocks is not None:
        k_block = segment.blocks.k_block
        index = segment.blocks.index.to(queries.device)
        lists = index[:, :, queries // segment.blocks.q_block].long()
        count = -(-keys // k_block)
        blocks = lists.new_zeros(*lists.shape[:3], count + 1).scatter_(
            -1, torch.where(lists < 0, count, lists), 1
        )
        seen = blocks[..., :count].bool().repeat_interleave(k_block, -1)[..., :keys]
    if segment.rule is not None:
        low, high, position, dilation = segment.rule.to(queries.device)
        low, high = low[queries][:, None], high[queries][:, None]
        step = torch.tensor(dilation, device=queries.device)
        inside = (low <= position) & (position <= high) & ((position - low) % step == 0)
        seen = seen & inside.all(-1)
    return seen


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """Rows of ``x`` (B, H, S, m) for token numbers (K,) or (B, H, K); zeros for -1."""
    at = columns.clamp(min=0)
    if at.ndim == 1:
        out = x.index_select(2, at)
    else:
        out = x.gather(2, at[..., None].expand(*at.shape, x.shape[-1]))
    return out.masked_fill((columns < 0)[..., None], 0.0)


def _spread(columns: Tensor, k: Tensor) -> Tensor:
    return columns.expand(*k.shape[:2], -1) if columns.ndim == 1 else columns
