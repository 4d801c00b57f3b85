"""Pointer head: it lists a photo's cells in order of importance and stops once they suffice (arXiv
1506.03134).

    p_t = softmax over the remaining cells and the end symbol of v . tanh(W_1 e_j + W_2 d_t) + s_j

Elements e are cells of a coarse grid. The features of a cell are its ranks in cheap class maps that are
computed from the taps, its tokens in the first tap, and its position. s is linear in the ranks, plus a
number for each position. Without memory, d is the same at every step, and the order is a Plackett-Luce draw
whose scores are a map: softmax draws the first place, then the next among the remaining cells, and so on.
With memory, d is the state of an LSTM over the cells pointed to so far.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.class_reading import class_reading
from xattn.heads.fusion import row_index
from xattn.runtime.option_checks import Condition, Count

LARGEST = 2**24  # entries of the tanh computed at once


class Pointing(nn.Module):
    """Scores v . tanh(W_1 e_j + W_2 d_t) (B, T, n) of elements e (B, n, C) for queries d (B, T, C)."""

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


def remaining_elements(orders: Tensor, count: int) -> Tensor:
    """Which of ``count`` elements each step of ``orders`` (B, T) may still take, bool (B, T, count): those
    not taken by an earlier step. Entries out of range, such as -1, take no element."""
    taken = orders[..., None] == torch.arange(count, device=orders.device)
    return taken.cumsum(1) - taken.long() == 0


Layers = Annotated[int, Condition(lambda n: 0 <= n <= 8, "an int from 0 to 8")]
START = 2.0  # coefficient of the contrast's rank in the scores, before training


class Cells(NamedTuple):
    """A head's input for B photos and M classes each: ``ranks`` (B, M, N, R) of maps over the N cells, in
    [-1, 1]; ``tokens`` (B, N, C), normalised; ``grid`` (h, w) of the cells."""

    ranks: Tensor
    tokens: Tensor
    grid: tuple[int, int]

    def of(self, photos: Tensor | slice) -> Cells:
        """The input for only these ``photos``."""
        return Cells(self.ranks[photos], self.tokens[photos], self.grid)


@register_head("pointer", cases=({"width": 8}, {"width": 6, "layers": 0, "explain_with": "mask"}))
class Pointer(Head):
    """Points to cells of the taps of ``backbone``, most important first.

    ``head(taps, index)`` returns scores (B, M, h, w): without memory, those of the Plackett-Luce model
    minus the score of the end symbol; with memory, how many places before the end symbol each cell comes,
    divided by N + 1. :meth:`orders` returns the sequence itself. An untrained head orders cells by w_k . f
    minus the mean of the other classes; see :mod:`~xattn.heads.class_reading`.

    Args:
        cells: largest number of cells per side; maps and tokens are averaged over each cell.
        width, layers: size of the transformer in which the cells exchange information; at most 8 layers,
            0 for none.
        memory: whether a step depends on the cells that were pointed to before.
        explain_with: show ``"scores"``, or the ``"mask"`` sigmoid(scores - score of the end symbol): cells
            above 1/2 are more likely to come next than the end.

    Raises:
        ValueError: the backbone's classifier has no class reading of its taps.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> head = xattn.create_head("pointer", net, cells=2)
        >>> head(net(torch.rand(2, 3, 64, 64)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        backbone: Backbone,
        cells: Count = 7,
        width: Count = 32,
        layers: Layers = 1,
        memory: bool = False,
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        reading = class_reading(backbone, "head: pointer")
        options = {
            "cells": cells, "width": width, "layers": layers, "memory": memory,
            "explain_with": explain_with,
        }  # fmt: skip
        super().__init__(backbone, options)
        self.cells, self.reading = cells, reading
        ranks = 2 + reading.extras + len(backbone.taps)
        self.of_ranks = nn.Linear(ranks, width)
        self.of_tokens = nn.Linear(backbone.channels[0], width, bias=False)
        self.places = nn.Parameter(torch.zeros(1, width, cells, cells))
        layer = nn.TransformerEncoderLayer(
            width,
            4 if width % 4 == 0 else 1,
            2 * width,
            0.0,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = (
            nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else None
        )
        self.norm = nn.LayerNorm(width)
        self.end = nn.Parameter(torch.zeros(width))
        self.start = nn.Linear(width, 2 * width)
        self.decoder = nn.LSTM(width, width, batch_first=True) if memory else None
        self.pointing = Pointing(width)
        nn.init.zeros_(self.pointing.v)
        self.prior = nn.Parameter(torch.zeros(1, 1, cells, cells))  # the mean order
        self.direct = nn.Parameter(torch.zeros(ranks))
        with torch.no_grad():
            self.direct[1] = START

    def read(self, taps: Taps, class_index: Tensor | int | None = None) -> Cells:
        """The inputs that depend only on the backbone and can be cached while the head is trained."""
        index = row_index(class_index, self.num_classes, taps.logits)
        found = self.reading(taps, index, self.backbone_task)
        first = taps.maps[0]
        grid = (min(self.cells, first.shape[2]), min(self.cells, first.shape[3]))
        of_class = [found.own, found.own - found.others]
        classes = found.own.shape[1]
        shared = [m.square().mean(1, keepdim=True) for m in taps.maps]
        shared += [] if found.extra is None else [*found.extra.split(1, 1)]
        maps = of_class + [m.expand(-1, classes, -1, -1) for m in shared]
        ranks = torch.stack(
            [rank_values(F.adaptive_avg_pool2d(m, grid).flatten(2)) for m in maps], -1
        )
        tokens = F.adaptive_avg_pool2d(first, grid).flatten(2).transpose(1, 2)
        return Cells(ranks, F.layer_norm(tokens, tokens.shape[-1:]), grid)

    def encoded(self, cells: Cells) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Elements (B M, N + 1, width), end symbol last; s (B M, N + 1); the decoder's initial state."""
        ranks = cells.ranks.flatten(0, 1)
        tokens = self.of_tokens(cells.tokens).repeat_interleave(cells.ranks.shape[1], 0)
        places, prior = (
            F.interpolate(x, cells.grid, mode="bilinear", align_corners=False).flatten(2)
            for x in (self.places, self.prior)
        )
        e = self.of_ranks(ranks) + tokens + places.transpose(1, 2)
        e = self.norm(e if self.encoder is None else self.encoder(e))
        added = F.pad(ranks @ self.direct + prior[:, 0], (0, 1))
        h, c = self.start(e.mean(1)).chunk(2, -1)
        e = torch.cat([e, self.end.expand(len(e), 1, -1)], 1)
        return e, added, (h.tanh()[None], c[None])

    def scores(self, cells: Cells) -> Tensor:
        """The scores (B, M, N + 1) for the first step, end symbol last; without memory, every step has the
        same scores."""
        e, added, (h, _) = self.encoded(cells)
        return (self.pointing(e, h[0][:, None])[:, 0] + added).unflatten(0, cells.ranks.shape[:2])

    def log_likelihood(self, cells: Cells, orders: Tensor) -> Tensor:
        """Log-likelihood (B M, T) of each step of ``orders`` (B M, T) of cells, with end symbol N."""
        e, added, state = self.encoded(cells)
        queries = state[0][0][:, None].expand(-1, orders.shape[1], -1)
        if self.decoder is not None:
            read = e.gather(1, orders[:, :-1, None].expand(-1, -1, e.shape[2]))
            queries = self.decoder(torch.cat([e.mean(1, keepdim=True), read], 1), state)[0]
        scores = self.pointing(e, queries) + added[:, None]
        scores = scores.masked_fill(~remaining_elements(orders, e.shape[1]), -torch.inf)
        return scores.log_softmax(-1).gather(2, orders[..., None])[..., 0]

    @torch.no_grad()
    def orders(self, cells: Cells) -> Tensor:
        """(B, M, N + 1): the most likely choice at every step; the cells before the end symbol N are those
        that suffice."""
        shape = cells.ranks.shape[:2]
        if self.decoder is None:
            return self.scores(cells).argsort(dim=-1, descending=True, stable=True)
        e, added, state = self.encoded(cells)
        inputs, free = e.mean(1, keepdim=True), torch.ones_like(added, dtype=torch.bool)
        found = []
        for _ in range(e.shape[1]):
            query, state = self.decoder(inputs, state)
            scores = self.pointing(e, query)[:, 0] + added
            best = scores.masked_fill(~free, -torch.inf).argmax(1, keepdim=True)
            free = free.scatter(1, best, False)
            inputs = e.gather(1, best[..., None].expand(-1, -1, e.shape[2]))
            found.append(best)
        return torch.cat(found, 1).unflatten(0, shape)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        cells = self.read(taps, class_index)
        if self.decoder is None:
            scores = self.scores(cells)
            return (scores[..., :-1] - scores[..., -1:]).unflatten(-1, cells.grid)
        if self.training:
            raise ValueError(
                "memory: got true; a mask cannot train an order, which has no gradient; use the head's "
                "log_likelihood, or memory=false"
            )
        place = self.orders(cells).argsort(-1).to(taps.logits.dtype)
        return ((place[..., -1:] - place[..., :-1]) / place.shape[-1]).unflatten(-1, cells.grid)


def rank_values(values: Tensor) -> Tensor:
    """Ranks of (..., N) from -1 to 1; equal values share their rank.

    >>> rank_values(torch.tensor([5.0, 7.0, 7.0])).tolist()
    [-1.0, 0.5, 0.5]
    """
    a, b = values[..., :, None], values[..., None, :]
    above = (a > b).to(values.dtype).sum(-1) - (a < b).to(values.dtype).sum(-1)
    return above / max(1, values.shape[-1] - 1)
