"""ARBEx (arXiv 2305.01486): facial expressions from frozen networks of images and landmarks.

    scale s:  x_s: maps of the image network (h x h), l_s: of the landmark network (one window, w x w)
              x_s <- x_s + gamma Attention(q = l_s, k, v = each window of x_s) + gamma MLP
    all scales -> tokens of one width, a class token, transformer blocks -> e -> MLP -> logits

Attention has a learned bias by relative position. With ``reliability``, anchors correct the
prediction (:mod:`xattn.heads.reliability`). Gamma starts at 0.1 here, and at 1e-5 in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.heads.reliability import TINY, Balanced, create_balancing
from xattn.runtime.option_checks import Count, Share, checked


class WindowCrossAttention(nn.Module):
    """``attention(x, queries)`` of (B, C, h, h) and (B, C, w, w) -> (B, C, h, h).

    The same queries attend to the tokens of each window of x. Without ``queries``, it is
    self-attention within each window.

    Args:
        width: C, a multiple of ``heads``. window: w, a divisor of h.
        gamma: the initial scale of both residuals.
    """

    def __init__(self, width: int, window: int, heads: int, gamma: float) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.norm, self.query_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        self.gammas = nn.Parameter(torch.full((2, width), gamma))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        places = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = places[:, :, None] - places[:, None] + window - 1
        index = apart[0] * (2 * window - 1) + apart[1]
        self.register_buffer("relative", index, persistent=False)
        self.relative: Tensor

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        size = x.shape[2]
        windows = _windows(x, self.window)  # (B W, w w, C)
        read = self.norm(windows)
        asked = read
        if queries is not None:
            asked = self.query_norm(queries.flatten(2).transpose(1, 2))
            asked = asked.repeat_interleave(len(windows) // len(asked), 0)
        k, v = self.key_value(read).chunk(2, -1)
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.query(asked), k, v)
        )
        bias = self.bias[self.relative].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
        windows = windows + self.gammas[0] * self.out(y.transpose(1, 2).flatten(2))
        windows = windows + self.gammas[1] * self.mlp(windows)
        return _whole(windows, self.window, size)


class Arbex(nn.Module):
    """``model(image_maps, landmark_maps)`` -> logits (B, classes).

    ``image_maps``: (B, channels_s, h_s, h_s) at each scale, from a frozen network;
    ``landmark_maps``: (B, C_s, w_s, w_s) from another, or None if ``landmarks`` is empty: then
    windows use self-attention.

    Args:
        image: (channels, side h_s) at each scale; the sides are multiples of the last.
        windows: w_s at each scale, a divisor of h_s.
        landmarks: channels of the landmark network at each scale; empty to use only the image.
        width: channels at every scale; ``dim``, ``depth``: of the blocks with the class token.
        heads: number of heads in all attention.
        gamma: the initial scale of the residuals of window attention.
        dropout: in the MLP of the classifier.
        reliability: options of :class:`~xattn.heads.reliability.ReliabilityBalancing`, or None.

    >>> model = Arbex(6, image=[(40, 12), (112, 6)], windows=(6, 3), landmarks=(64, 64)).eval()
    >>> images = [torch.zeros(2, 40, 12, 12), torch.zeros(2, 112, 6, 6)]
    >>> model(images, [torch.zeros(2, 64, 6, 6), torch.zeros(2, 64, 3, 3)]).shape
    torch.Size([2, 6])
    """

    @checked
    def __init__(
        self,
        classes: Count,
        *,
        image: Sequence[tuple[int, int]],
        windows: Sequence[int],
        landmarks: Sequence[int] = (),
        width: Count = 32,
        dim: Count = 64,
        depth: Count = 2,
        heads: Count = 4,
        gamma: float = 0.1,
        dropout: Share = 0.5,
        reliability: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.image, self.windows = tuple(image), tuple(windows)
        self.channels = tuple(landmarks)
        last = self.image[-1][1]
        self.read = nn.ModuleList(_adapter(channels, width) for channels, _ in self.image)
        self.cross = nn.ModuleList(
            WindowCrossAttention(width, window, heads, gamma) for window in self.windows
        )
        self.to_tokens = nn.ModuleList(
            nn.Conv2d(width, dim, side // last, side // last) for _, side in self.image
        )
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, len(self.image) * last**2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, 2.0, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Sequential(
            *(nn.Linear(dim, dim // 2), nn.BatchNorm1d(dim // 2), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(dim // 2, classes),
        )
        # Optional parts are drawn last, so that the other parts start with the same weights.
        self.ask = nn.ModuleList(_adapter(channels, width) for channels in self.channels)
        self.balancing = None
        if reliability is not None:
            self.balancing = create_balancing(classes, dim, dict(reliability))

    def embed(
        self, image_maps: Sequence[Tensor], landmark_maps: Sequence[Tensor] | None = None
    ) -> Tensor:
        """e (B, dim), what the classifier reads."""
        self._check("image_maps", image_maps, self.image)
        if self.channels:
            wanted = list(zip(self.channels, self.windows, strict=True))
            self._check("landmark_maps", landmark_maps, wanted)
        tokens = []
        for s, (read, cross, convert) in enumerate(
            zip(self.read, self.cross, self.to_tokens, strict=True)
        ):
            queries = None
            if self.channels:
                assert landmark_maps is not None
                queries = self.ask[s](landmark_maps[s])
            x = cross(read(image_maps[s]), queries)
            tokens.append(convert(x).flatten(2).transpose(1, 2))
        joined = torch.cat(tokens, 1) + self.positions
        joined = torch.cat([self.class_token.expand(len(joined), -1, -1), joined], 1)
        return self.norm(self.blocks(joined))[:, 0]

    def forward(
        self, image_maps: Sequence[Tensor], landmark_maps: Sequence[Tensor] | None = None
    ) -> Tensor:
        return self.classifier(self.embed(image_maps, landmark_maps))

    def balanced(
        self,
        image_maps: Sequence[Tensor],
        landmark_maps: Sequence[Tensor] | None = None,
        trust: float = 1.0,
    ) -> Balanced:
        """The corrected probabilities, and how reliable they are."""
        e = self.embed(image_maps, landmark_maps)
        assert self.balancing is not None, "create the model with reliability={...}"
        return self.balancing(e, self.classifier(e), trust)

    def loss(
        self,
        image_maps: Sequence[Tensor],
        landmark_maps: Sequence[Tensor] | None,
        labels: Tensor,
        trust: float = 1.0,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy with ``weights`` (classes,); with anchors, that of the corrected p, plus
        ``trust`` times the two losses of the anchors."""
        e = self.embed(image_maps, landmark_maps)
        logits = self.classifier(e)
        if self.balancing is None:
            return F.cross_entropy(logits, labels, weights)
        p = self.balancing(e, logits, trust).probabilities
        anchored = self.balancing.anchor_loss() + self.balancing.center_loss(e, logits, labels)
        return F.nll_loss(p.clamp_min(TINY).log(), labels, weights) + trust * anchored

    @staticmethod
    def _check(name: str, maps: Sequence[Tensor] | None, wanted: Sequence[tuple[int, int]]) -> None:
        shapes = [(channels, side, side) for channels, side in wanted]
        got = None if maps is None else [tuple(m.shape[1:]) for m in maps]
        if got != shapes:
            raise ValueError(f"{name}: got {got} of each image; give {shapes}")


def _adapter(channels: int, width: int) -> nn.Sequential:
    """A layer that brings a frozen network's maps, at any scale of values, to ``width`` channels."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1))


def _windows(x: Tensor, w: int) -> Tensor:
    """(B, C, h, h) -> (B W, w w, C), with the W windows of an image one after another."""
    count = x.shape[2] // w
    x = x.unflatten(2, (count, w)).unflatten(4, (count, w))  # (B, C, n, w, n, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)


def _whole(windows: Tensor, w: int, size: int) -> Tensor:
    """The inverse of :func:`_windows`."""
    count = size // w
    x = windows.unflatten(1, (w, w)).unflatten(0, (-1, count, count))  # (B, n, n, w, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
