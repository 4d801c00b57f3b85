"""Parallel cross-attention: tokens read several streams of context, such as words and a reference photo.

    y = b + sum_s W_O^s A_s (c_s W_v^s),     A_s = softmax((x W_q^s) (c_s W_k^s)^T / sqrt(d))

Every stream c_s has its own width, length and softmax, so no stream takes attention from another. W_O^s of
every stream but the first starts at 0, so a stream can be added to a trained layer without changing its
output. The idea is from "Imagine Yourself", arXiv 2409.13346, of which we know only the abstract; the
formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from xattn.attention.base import check_whole, merge_heads, split_heads
from xattn.attention.operators.algebra import LowRankOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.positions import check_grid
from xattn.attention.record import mix


class ParallelCrossAttention(nn.Module):
    """Cross-attention of tokens (B, N, C) to streams (B or 1, S_s, C_s): ``layer(x, streams)``.

    Under :func:`xattn.attention.record`, each nonempty stream is recorded as a call, whose map ``tokens``
    comes from :func:`token_maps`.

    Args:
        dim: C, the width of the tokens and of the output.
        num_heads: H, which must divide ``dim``.
        widths: C_s of each stream; the first stream is the original one.
        shared_query: whether all streams share one W_q; otherwise each has its own.
        bias: whether the queries and the output have biases (that of the output is b). Keys and values have
            none: a bias of the keys would cancel, and a bias of the values would let a stream without
            content contribute.
        backend: the backend of the kernels, see :func:`xattn.kernels.backend.choose`.

    Example:
        >>> import torch
        >>> from xattn.attention import ParallelCrossAttention
        >>> layer = ParallelCrossAttention(32, 4, widths=[16, 24])
        >>> x, text, photo = torch.rand(2, 9, 32), torch.rand(2, 5, 16), torch.rand(2, 7, 24)
        >>> layer(x, [text, photo]).shape
        torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        widths: Sequence[int],
        *,
        shared_query: bool = False,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if check_whole("dim", dim) % check_whole("num_heads", num_heads):
            raise ValueError(f"dim, num_heads: got {dim}, {num_heads}; num_heads has to divide dim")
        if not widths:
            raise ValueError("widths: got none; give the width of each stream")
        self.dim, self.num_heads, self.backend = dim, num_heads, backend
        self.widths = tuple(check_whole("widths", width) for width in widths)
        queries = 1 if shared_query else len(self.widths)
        self.q = nn.ModuleList(nn.Linear(dim, dim, bias=bias) for _ in range(queries))
        self.k = nn.ModuleList(nn.Linear(width, dim, bias=False) for width in self.widths)
        self.v = nn.ModuleList(nn.Linear(width, dim, bias=False) for width in self.widths)
        self.proj = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in self.widths)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        for added in self.proj[1:]:
            nn.init.zeros_(added.weight)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        streams: Sequence[Tensor | None],
        masks: Sequence[Tensor | None] | None = None,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Map x (B, N, C) to (B, N, C).

        Args:
            streams: one tensor (B or 1, S_s, C_s) per stream; None, or a stream without tokens, adds
                nothing.
            masks: one bool tensor (B or 1, S_s) per stream, True for the tokens that are used, so that a
                batch can contain streams of different lengths. With None, all tokens are used.
            grid: the grid of the tokens x after the ``prefix`` tokens. It is needed only for maps, when
                attention is recorded.

        Raises:
            ValueError: if the width or batch size of a stream is wrong, a mask does not fit its stream, or
                the number of streams is wrong.
        """
        sides = None if grid is None else tuple(grid)
        operators = self.operators(x, streams, masks)
        check_grid("parallel_cross_attention", (0,), sides, prefix, x.shape[1])
        y = None if self.bias is None else self.bias.expand(x.shape)
        for s, (operator, stream) in enumerate(zip(operators, streams, strict=True)):
            if stream is None or not stream.shape[1]:
                continue
            value = split_heads(self.v[s](stream), self.num_heads).expand(len(x), -1, -1, -1)
            maps = partial(_maps, operator.detach(), sides, prefix)
            read = mix("parallel_cross_attention", operator, value, maps)
            own = self.proj[s](merge_heads(read))
            y = own if y is None else y + own
        return torch.zeros_like(x) if y is None else y

    def operators(
        self,
        x: Tensor,
        streams: Sequence[Tensor | None],
        masks: Sequence[Tensor | None] | None = None,
    ) -> list[Operator]:
        """Compute A_s of each stream, (B, H, N, S_s).

        The ``rows`` of an operator show which context a token reads, and its ``vecmat`` shows which context
        a region reads. Arguments and errors are those of :meth:`forward`.
        """
        self._check(x, streams, masks)
        masks = [None] * len(streams) if masks is None else masks
        made: list[Operator] = []
        for s, (stream, mask) in enumerate(zip(streams, masks, strict=True)):
            q = split_heads(self.q[s if len(self.q) > 1 else 0](x), self.num_heads)
            if stream is None or not stream.shape[1]:
                nothing = q.new_zeros(*q.shape[:2], 0, 0)
                made.append(LowRankOperator(q[..., :0], nothing, signed=False))
                continue
            k = split_heads(self.k[s](stream), self.num_heads).expand(len(x), -1, -1, -1)
            bias = None
            if mask is not None:
                bias = torch.zeros(mask.shape, dtype=k.dtype, device=k.device)
                bias = bias.masked_fill(~mask, -torch.inf)[:, None, None]
            made.append(SoftmaxOperator(q, k, bias=bias, backend=self.backend))
        return made

    def _check(
        self,
        x: Tensor,
        streams: Sequence[Tensor | None],
        masks: Sequence[Tensor | None] | None,
    ) -> None:
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x: got {tuple(x.shape)}; give (B, N, {self.dim})")
        for name, given in (("streams", streams), ("masks", masks)):
            if given is not None and len(given) != len(self.widths):
                raise ValueError(
                    f"{name}: got {len(given)}; give {len(self.widths)}, with None for an empty stream"
                )
        for s, stream in enumerate(streams):
            wanted = f"({len(x)} or 1, S, {self.widths[s]})"
            fits = stream is None or (stream.ndim == 3 and stream.shape[2] == self.widths[s])
            if not fits or (stream is not None and stream.shape[0] not in (1, len(x))):
                assert stream is not None
                raise ValueError(f"streams: stream {s} has {tuple(stream.shape)}; give {wanted}")
            mask = None if masks is None else masks[s]
            if mask is None:
                continue
            length = 0 if stream is None else stream.shape[1]
            shape = tuple(mask.shape)
            if mask.dtype != torch.bool or shape not in ((1, length), (len(x), length)):
                raise ValueError(
                    f"masks: the mask of stream {s} is {mask.dtype} of shape {shape}; give bool "
                    f"({len(x)} or 1, {length})"
                )


@torch.no_grad()
def token_maps(operator: Operator, grid: Sequence[int], prefix: int = 0) -> Tensor:
    """Compute a map for each token of a stream, (B, S, h, w), which shows where it is read, averaged over
    heads.

    At every position, the maps of all tokens sum to 1.

    Example:
        >>> import torch
        >>> from xattn.attention import SoftmaxOperator, token_maps
        >>> operator = SoftmaxOperator(torch.rand(1, 4, 9, 8), torch.rand(1, 4, 5, 8))
        >>> token_maps(operator, grid=(3, 3)).shape
        torch.Size([1, 5, 3, 3])
    """
    parts = [operator.tile(rows, slice(None)).mean(1) for rows in operator.row_chunks()]
    return torch.cat(parts, 1)[:, prefix:].transpose(1, 2).unflatten(2, tuple(grid))


def stream_shares(operators: Sequence[Operator]) -> Tensor:
    """Compute pi (B, H, N, number of streams), each stream's share in a softmax over the tokens of all
    streams:

        softmax over [c_1; c_2; ...] = [pi_1 A_1, pi_2 A_2, ...],    pi_s = Z_s / sum Z,   Z_s = exp lse_s

    The share of an empty stream is 0. Parallel attention itself does not use pi.

    Example:
        >>> import torch
        >>> from xattn.attention import ParallelCrossAttention, stream_shares
        >>> layer = ParallelCrossAttention(32, 4, widths=[16, 24])
        >>> text, photo = torch.rand(2, 5, 16), torch.rand(2, 7, 24)
        >>> operators = layer.operators(torch.rand(2, 9, 32), [text, photo])
        >>> stream_shares(operators).shape
        torch.Size([2, 4, 9, 2])
    """
    nothing = operators[0].row_sums() - torch.inf
    lse = [a.lse if isinstance(a, SoftmaxOperator) else nothing for a in operators]
    scores = torch.stack(lse, -1)
    return torch.where(scores.isneginf(), 0.0, scores.softmax(-1))


def _maps(operator: Operator, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
    if grid is None or len(grid) != 2:
        return {}
    return {"tokens": token_maps(operator, grid, prefix)}
