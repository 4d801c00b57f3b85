"""A head whose patches read words: parallel cross-attention to a learned table of words, with one map per
word.

    A_h = softmax_w((x W_q,h) (e W_k,h)^T / sqrt(d)),   y_t = sum_h W_o,h sum_w A_htw (W_v,h e_w)
    logit_w = b_w + 1/N sum_t sum_h A_htw <x_t, W_o,h W_v,h e_w>

Patches x_t, normalised by a layer norm without weights, attend to the words e_w. An additional word
without a meaning is read by patches that are unrelated to every word. A logit measures how well the
patches agree with what they read from a word. Summed over all words, these terms give 1/N sum_t <x_t,
y_t>. The words are a table; there is no text encoder. If there is a caption, only its words are used.
The layer is a :class:`~xattn.attention.ParallelCrossAttention` with one stream, arXiv 2409.13346; the
head is ours.
"""

from __future__ import annotations

import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, Unpack

from xattn.attention import ParallelCrossAttention
from xattn.backbone import Backbone, Taps
from xattn.heads.attended import AttentionTerms, Queries, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.fusion import class_rows
from xattn.heads.pullback import Step
from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import Count

SHOWN = 12  # largest number of words in an error message


class AddBias(nn.Module):
    """The classifier z + b of a head whose pooled vector already has one number per class."""

    weight: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(classes), persistent=False)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.bias


@register_head("words", cases=({"width": 6, "heads": 2}, {"width": 6}))
class WordHead(AttentiveHead):
    """A classifier whose classes are words: maps are exact, signed shares of a word's logit. With
    ``explain_with="attention"`` a map shows where the word is read, the mean of A over heads.

    By default it reads the tokens at the start of the last third of the blocks. With the final tokens,
    words are recognised better but located less well (docs/heads/words.md).

    Args:
        width: width of the table of words.
        heads: H; None uses :func:`~xattn.heads.cross_attention.head_count`.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`; ``class_names`` are the words. To
            train on captions, do not use ``norm``: words outside the caption have the value 0, which
            would distort its statistics.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("words", net, class_names=["cat", "dog"], norm=False)
        >>> head(head.tapped(net)(torch.rand(1, 3, 32, 32))).shape  # a map for each word
        torch.Size([1, 2, 2, 2])
    """

    asked: Tensor | None = None  # (K,) bool: words of the caption, see of_caption

    def __init__(
        self,
        backbone: Backbone,
        width: Count = 32,
        heads: Count | None = None,
        **shared: Unpack[SharedOptions],
    ) -> None:
        channels = backbone.channels[-1]
        classes, names = shared.get("classes"), shared.get("class_names")
        count = classes or (backbone.num_classes if names is None else len(names))
        super().__init__(backbone, {"width": width, "heads": heads}, count, **shared)
        self.attention = ParallelCrossAttention(
            channels, head_count(channels, heads), (width,), bias=False
        )
        self.table = nn.Parameter(torch.randn(count + 1, width))  # the last word means nothing
        self.classifier = AddBias(count)  # type: ignore[assignment]

    @staticmethod
    def default_taps(depth: int) -> tuple[str, ...]:
        """The input of the last third of the blocks: the output of block 7 of 12, counted from 0."""
        return (f"block.{depth - 1 - depth // 3}",)

    # ------------------------------------------------------------------ captions

    def words_of(self, caption: str) -> list[int]:
        """The numbers of the words in ``caption``, without repetition, in the order of the table;
        unknown words are ignored.

        Raises:
            ValueError: the caption contains no known word, or the head was trained without names.
        """
        if self.class_names is None:
            raise ValueError(
                "caption: this head has no names of words; create it with class_names=[...]"
            )
        found, text = [], caption.casefold()
        order = sorted(range(len(self.class_names)), key=lambda i: -len(self.class_names[i]))  # type: ignore[index]
        for i in order:  # "hot dog" before "dog"
            word = rf"(?<!\w){re.escape(self.class_names[i].casefold())}(?!\w)"
            text, times = re.subn(word, "\n", text)
            found += [i] if times else []
        if not found:
            known = ", ".join(self.class_names[:SHOWN])
            more = ", ..." if len(self.class_names) > SHOWN else ""
            raise ValueError(f"caption: got {caption!r}, with no known word; use {known}{more}")
        return sorted(found)

    def for_caption(self, caption: str) -> Self:
        """Return this head with the same weights, restricted to the words of ``caption``; all other maps
        are 0.

        Raises:
            ValueError: as in :meth:`words_of`.
        """
        made = copy.copy(self)
        made.asked = torch.zeros(self.num_classes, dtype=torch.bool, device=self.table.device)
        made.asked[self.words_of(caption)] = True
        return made

    def match(self, tokens: Tokens, captions: Tensor) -> Tensor:
        """Logits (B, K) of the words of each photo's caption, -inf for all others; captions (B, K) bool.

        Raises:
            ValueError: ``captions`` have a different shape, or one of them has no words.
        """
        shape = (tokens.patches[-1].shape[0], self.num_classes)
        if captions.shape != shape or captions.dtype != torch.bool:
            raise ValueError(
                f"captions: got {captions.dtype} of shape {tuple(captions.shape)}; give bool {shape}"
            )
        if not bool(captions.any(1).all()):
            raise ValueError("captions: got one without a known word; give each at least one")
        attended = self.attend(tokens)
        scores = self._hidden(attended.scores, captions)
        return self.classify(attended.with_scores(scores)).masked_fill(~captions, -torch.inf)

    def _hidden(self, scores: Tensor, captions: Tensor) -> Tensor:
        """``scores`` with -inf for words that are not in captions (B or 1, K), except the word that means
        nothing."""
        asked = F.pad(captions, (0, 1), value=True)[:, None]
        split = scores.unflatten(1, (self.attention.num_heads, -1))
        return split.masked_fill(~asked[..., None], -torch.inf).flatten(1, 2)

    # ------------------------------------------------------------------ defined by this head

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        x = F.layer_norm(x, x.shape[-1:])
        layer = self.attention
        keys = self._split(layer.k[0](self.table))
        # <x W_q, k> = <x, W_q^T k>: with few words, transforming them costs less than a query per patch.
        wq: Tensor = layer.q[0].weight  # type: ignore[assignment]
        rows = keys @ wq.unflatten(0, (layer.num_heads, -1))
        attended = AttentionTerms(
            Queries(rows.flatten(0, 1)[None], x, keys.shape[-1] ** -0.5), x[:, None]
        )
        if self.asked is None:
            return attended
        return attended.with_scores(self._hidden(attended.scores, self.asked[None]))

    def weights(self, scores: Tensor) -> Tensor:
        """A / N, softmax over the words: (B, H (K + 1), T)."""
        split = widen(scores).unflatten(1, (self.attention.num_heads, -1))
        return (split.softmax(2).flatten(1, 2) / scores.shape[-1]).to(scores.dtype)

    def finish(self, pooled: Tensor, attended: AttentionTerms) -> Step:
        layer = self.attention
        values = self._split(layer.v[0](self.table))[:, : self.num_classes]
        wo: Tensor = layer.proj[0].weight  # type: ignore[assignment]
        told = values @ wo.unflatten(1, (layer.num_heads, -1)).permute(1, 2, 0)
        own = pooled.unflatten(1, (layer.num_heads, -1))[:, :, : self.num_classes]

        def pull(rows: Tensor) -> Tensor:
            each = rows[:, :, None, :, None] * told
            return F.pad(each, (0, 0, 0, 1)).flatten(2, 3)

        return (own * told).sum((1, 3)), pull

    def _split(self, x: Tensor) -> Tensor:
        """(K + 1, H d) -> (H, K + 1, d)."""
        return x.unflatten(-1, (self.attention.num_heads, -1)).transpose(0, 1)

    # ------------------------------------------------------------------ maps

    def reading_maps(self, tokens: Tokens) -> Tensor:
        """Maps (B, K, h, w) of where each word is read, the mean of A over heads. Together with the map of
        the word that means nothing, the maps sum to 1 at every position."""
        maps = self.query_maps(tokens).unflatten(1, (self.attention.num_heads, -1)).mean(1)
        return maps[:, : self.num_classes] * (tokens.grid[0] * tokens.grid[1])

    def explanation(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        if self.explain_with != "attention":
            return super().explanation(taps, class_index)
        maps = self.reading_maps(self.tokens(taps))
        index = class_rows(class_index, self.num_classes, maps.shape[0])
        if index is None:
            return maps
        index = index.to(maps.device).expand(maps.shape[0], -1)
        return maps.gather(1, index[..., None, None].expand(-1, -1, *maps.shape[2:]))
