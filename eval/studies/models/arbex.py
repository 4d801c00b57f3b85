"""ARBEx, expressions of faces from two streams (arXiv 2305.01486): the image, and its landmarks.

    scale s:  x_s from the image (h x h), l_s from the landmarks (one window, w x w)
              x_s <- x_s + gamma Attention(q = l_s, k, v = each window of x_s) + gamma MLP
    all scales -> tokens of one width, a class token, transformer blocks -> e -> MLP -> logits

Attention has a learned bias by relative place. The published model reads frozen nets (MobileFaceNet and
IR50, 112 pixels); here both streams are small, and start untrained. Landmarks enter as a map of Gaussians,
a channel for each part of the face. With ``reliability`` anchors correct the prediction
(:mod:`xattn.heads.reliability`). Gamma starts at 0.1, the published one at 1e-5.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.heads.reliability import TINY, Balanced, create_balancing
from xattn.runtime.option_checks import Count, Share, checked

Streams = Literal["both", "image", "landmarks"]
HEADS = (2, 4, 8)  # of the scales
SPREAD = 1.0  # standard deviation of a landmark, in cells of its map


class WindowCrossAttention(nn.Module):
    """``attention(x, queries)`` of (B, C, h, h) and (B, C, w, w) -> (B, C, h, h): the tokens of each window
    of x answer the same queries. Without ``queries`` every window asks itself.

    Args:
        width: C, a multiple of ``heads``. window: w, a divisor of h.
        gamma: what the scales of both residuals start at.
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
    """``model(images, landmarks)`` of (B, channels, size, size) and (B, P, 2) -> logits (B, classes).

    Args:
        parts: the part of the face, 0, 1, ..., of each of the P landmarks.
        size: pixels a side, a multiple of 32; of 64 for three scales, as published.
        widths: channels of one to three scales, of size / 4, / 8, / 16 cells, in windows of half of that.
        dim, depth, heads: of the blocks with the class token.
        streams: "both", or one alone: "image" asks itself; for "landmarks" their map is the image.
        gamma: what the scales of the residuals of window attention start at.
        dropout: in the MLP of the classifier.
        reliability: options of :class:`~xattn.heads.reliability.ReliabilityBalancing`, or None.
    """

    @checked
    def __init__(
        self,
        classes: Count,
        parts: Sequence[int],
        *,
        size: Count = 32,
        channels: Count = 1,
        widths: Sequence[int] = (32, 64),
        dim: Count = 64,
        depth: Count = 2,
        heads: Count = 8,
        streams: Streams = "both",
        gamma: float = 0.1,
        dropout: Share = 0.5,
        reliability: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.size, self.channels, self.streams = size, channels, streams
        self.points = len(parts)
        which = (
            F.one_hot(torch.tensor(list(parts), dtype=torch.long)) if parts else torch.zeros(0, 1)
        )
        self.register_buffer("which", which.t().float(), persistent=False)  # (parts, P)
        self.which: Tensor
        drawn = self.which.shape[0]
        self.image = _stages(drawn if streams == "landmarks" else channels, widths)
        self.landmarks = _stages(drawn, widths) if streams == "both" else None
        sizes = [size // 4 // 2**i for i in range(len(widths))]
        self.cross = nn.ModuleList(
            WindowCrossAttention(w, s // 2, h, gamma)
            for w, s, h in zip(widths, sizes, HEADS, strict=False)
        )
        self.to_tokens = nn.ModuleList(
            nn.Conv2d(w, dim, s // sizes[-1], s // sizes[-1])
            for w, s in zip(widths, sizes, strict=True)
        )
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, len(sizes) * sizes[-1] ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, 2.0, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Sequential(
            *(nn.Linear(dim, dim // 2), nn.BatchNorm1d(dim // 2), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(dim // 2, classes),
        )
        self.balancing = None
        if reliability is not None:
            self.balancing = create_balancing(classes, dim, dict(reliability))

    def landmark_maps(self, landmarks: Tensor, size: int) -> Tensor:
        """(B, parts, size, size): the sum of a Gaussian for each landmark of a part."""
        middle = (torch.arange(size, device=landmarks.device) + 0.5) / size
        near = [
            (-0.5 * ((middle - landmarks[..., i, None]) * size / SPREAD).square()).exp()
            for i in (0, 1)
        ]  # (B, P, size), of x and y
        return torch.einsum("gp,bpy,bpx->bgyx", self.which, near[1], near[0])

    def embed(self, images: Tensor | None, landmarks: Tensor | None = None) -> Tensor:
        """e (B, dim), what the classifier reads."""
        self._check(images, landmarks)
        queries: Tensor | None = None
        if self.streams == "landmarks":
            assert landmarks is not None
            x = self.landmark_maps(landmarks, self.size)
        else:
            assert images is not None
            x = images
        if self.landmarks is not None:
            assert landmarks is not None
            queries = self.landmark_maps(landmarks, self.size // 2)
        tokens = []
        for i, (stage, cross, convert) in enumerate(
            zip(self.image, self.cross, self.to_tokens, strict=True)
        ):
            x = stage(x)
            if self.landmarks is not None:
                queries = self.landmarks[i](queries)
            tokens.append(convert(cross(x, queries)).flatten(2).transpose(1, 2))
        joined = torch.cat(tokens, 1) + self.positions
        joined = torch.cat([self.class_token.expand(len(x), -1, -1), joined], 1)
        return self.norm(self.blocks(joined))[:, 0]

    def forward(self, images: Tensor | None, landmarks: Tensor | None = None) -> Tensor:
        return self.classifier(self.embed(images, landmarks))

    def balanced(
        self, images: Tensor | None, landmarks: Tensor | None = None, trust: float = 1.0
    ) -> Balanced:
        """The corrected probabilities, and how reliable they are."""
        e = self.embed(images, landmarks)
        assert self.balancing is not None, "create the model with reliability={...}"
        return self.balancing(e, self.classifier(e), trust)

    def loss(
        self, images: Tensor | None, landmarks: Tensor | None, labels: Tensor, trust: float = 1.0
    ) -> Tensor:
        """Cross-entropy; with anchors of the corrected p, plus ``trust`` times the anchors' two losses."""
        e = self.embed(images, landmarks)
        logits = self.classifier(e)
        if self.balancing is None:
            return F.cross_entropy(logits, labels)
        p = self.balancing(e, logits, trust).probabilities
        anchored = self.balancing.anchor_loss() + self.balancing.center_loss(e, logits, labels)
        return F.nll_loss(p.clamp_min(TINY).log(), labels) + trust * anchored

    def _check(self, images: Tensor | None, landmarks: Tensor | None) -> None:
        if self.streams != "landmarks":
            wanted = (self.channels, self.size, self.size)
            if images is None or images.shape[1:] != wanted:
                got = None if images is None else tuple(images.shape)
                raise ValueError(f"images: got {got}; give (B, {', '.join(map(str, wanted))})")
        if self.streams != "image":
            if landmarks is None or landmarks.shape[1:] != (self.points, 2):
                got = None if landmarks is None else tuple(landmarks.shape)
                raise ValueError(
                    f"landmarks: got {got}; give (B, {self.points}, 2), x and y as shares of the image, "
                    f"or create the model with streams='image'"
                )


def _stages(channels: int, widths: Sequence[int]) -> nn.ModuleList:
    """A stage for each width, of which each halves the size and the first does so twice."""
    first = nn.Sequential(_layer(channels, widths[0]), _layer(widths[0], widths[0]))
    return nn.ModuleList([first, *(_layer(a, b) for a, b in itertools.pairwise(widths))])


def _layer(channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def _windows(x: Tensor, w: int) -> Tensor:
    """(B, C, h, h) -> (B W, w w, C), the W windows of an image in a row."""
    count = x.shape[2] // w
    x = x.unflatten(2, (count, w)).unflatten(4, (count, w))  # (B, C, n, w, n, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)


def _whole(windows: Tensor, w: int, size: int) -> Tensor:
    """The inverse of :func:`_windows`."""
    count = size // w
    x = windows.unflatten(1, (w, w)).unflatten(0, (-1, count, count))  # (B, n, n, w, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
