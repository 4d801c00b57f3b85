"""Attention-gated U-Nets in two and three dimensions: AGUNet, DAUNet, and the plain U-Net.

    psi = sigmoid(BN(w relu([BN(W_g g); BN(W_x x)])))        skip x, decoder map g of the same size
    out = conv(concat(g, x psi))

    net = AGUNet(dims=2)                        # gates, multi-scale input, deep supervision
    net = AGUNet(dims=3, dual=True)             # DAUNet: dual attention at the bottleneck
    net = AGUNet(gates=False, multi_scale=False, deep_supervision=False)     # a plain U-Net

Bouget et al., arXiv 2101.07715. A mask is one logit per pixel; the heads of coarser levels are only used
for training. :mod:`xattn.models.masks` has the losses, files of weights, and the network as a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import check_whole

SMALLEST = 4  # an axis of at most this length is not pooled


class Outputs(NamedTuple):
    """The results of a pass: ``logits`` (B, M, *size); ``deep``, the logits of coarser levels, each at its
    own size, and ``gates``, psi (B, 1, *size of the level), both from fine to coarse; and ``deepest``, the
    feature map of the bottleneck."""

    logits: Tensor
    deep: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]
    deepest: Tensor


class AGUNet(nn.Module):
    """Map images (B, channels, *size) of any size to the logits of masks (B, masks, *size).

    Args:
        dims: 2 or 3, the number of axes of ``size``.
        filters: number of channels of each level; each level but the last is followed by max-pooling by 2,
            except along axes of length 4 or less.
        gates: whether skip connections are multiplied by psi.
        combine: how the two parts of a gate are combined: "concat" (the authors' program) or "add" (Oktay
            et al., arXiv 1804.03999).
        multi_scale: whether each level also receives the image, downscaled to its size.
        deep_supervision: whether each level has a head.
        dual: whether the bottleneck has attention over positions and channels (DAUNet).
        channel_mean: whether the attention over channels divides its scores by the number of positions,
            which the paper does not do.
        guided: whether the bottleneck's output enters each level of the decoder.
        norm: "batch" or "instance".
        dropout: the fraction of channels that are dropped in the dual attention during training.

    Raises:
        ValueError: an option is out of range, or the images have the wrong shape or number of channels.
    """

    def __init__(
        self,
        dims: int = 2,
        channels: int = 1,
        masks: int = 1,
        filters: Sequence[int] = (8, 16, 32, 64),
        *,
        gates: bool = True,
        combine: Literal["concat", "add"] = "concat",
        multi_scale: bool = True,
        deep_supervision: bool = True,
        dual: bool = False,
        channel_mean: bool = True,
        guided: bool = False,
        norm: Literal["batch", "instance"] = "batch",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise ValueError(f"dims: got {dims}; give 2 or 3")
        if len(filters) < 2:
            raise ValueError(
                f"filters: got {tuple(filters)}; give the channels of at least 2 levels"
            )
        if norm not in ("batch", "instance"):
            raise ValueError(f"norm: got {norm!r}; give 'batch' or 'instance'")
        if combine not in ("concat", "add"):
            raise ValueError(f"combine: got {combine!r}; give 'concat' or 'add'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}; give a number from 0 to below 1")
        widths = [check_whole("filters", width) for width in filters]
        self.dims, self.channels, self.masks = dims, check_whole("channels", channels), masks
        self.settings: dict[str, Any] = dict(
            dims=dims, channels=channels, masks=check_whole("masks", masks), filters=widths, gates=gates,
            combine=combine, multi_scale=multi_scale, deep_supervision=deep_supervision, dual=dual,
            channel_mean=channel_mean, guided=guided, norm=norm, dropout=dropout,
        )  # fmt: skip
        fine = range(len(widths) - 1)
        self.entries = nn.ModuleList(
            Entry(dims, channels, width) for width in (widths[1:] if multi_scale else [])
        )
        extra = widths[1:] if multi_scale else [0] * (len(widths) - 1)
        entering = [channels, *(a + b for a, b in zip(widths[:-1], extra, strict=True))]
        self.encoder = nn.ModuleList(
            double_conv(dims, a, b, norm) for a, b in zip(entering, widths, strict=True)
        )
        self.bottleneck = (
            DualAttention(dims, widths[-1], norm, dropout, channel_mean) if dual else nn.Identity()
        )
        self.ups = nn.ModuleList(Upsample(dims, widths[i + 1], widths[i], norm) for i in fine)
        self.gates = nn.ModuleList(Gate(dims, widths[i], norm, combine) for i in fine if gates)
        self.guides = nn.ModuleList(
            Upsample(dims, widths[-1], widths[i], norm, len(widths) - 1 - i) for i in fine if guided
        )
        parts = 3 if guided else 2
        self.decoder = nn.ModuleList(
            double_conv(dims, parts * widths[i], widths[i], norm) for i in fine
        )
        heads = fine if deep_supervision else range(1)
        self.heads = nn.ModuleList(conv(dims, widths[i], masks, 1) for i in heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        """Return the logits, including those of the coarser levels, and the gates."""
        skips, steps = self.encode(x)
        deepest = y = self.bottleneck(skips[-1])
        found: list[Tensor] = []
        gates: list[Tensor] = []
        stride = (1,) * self.dims  # from the deepest level to this one
        for i in reversed(range(len(self.ups))):
            skip, size = skips[i], skips[i].shape[2:]
            stride = tuple(a * b for a, b in zip(stride, steps[i], strict=True))
            y = self.ups[i](y, steps[i], size)
            if self.gates:
                gates.append(self.gates[i](y, skip))
                skip = skip * gates[-1]
            guide = [self.guides[i](deepest, stride, size)] if self.guides else []
            y = self.decoder[i](torch.cat([y, skip, *guide], 1))
            if i < len(self.heads):
                found.append(self.heads[i](y))
        return Outputs(found[-1], tuple(found[-2::-1]), tuple(gates[::-1]), deepest)

    def encode(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, ...]]]:
        """Return the feature map of each level, and the strides (1 or 2 per axis) between neighbouring
        levels."""
        if x.ndim != self.dims + 2 or x.shape[1] != self.channels or 0 in x.shape:
            axes = "H, W" if self.dims == 2 else "D, H, W"
            raise ValueError(f"x: got shape {tuple(x.shape)}; give (B, {self.channels}, {axes})")
        skips: list[Tensor] = []
        steps: list[tuple[int, ...]] = []
        image = y = x
        for i, block in enumerate(self.encoder):
            if i:
                step = tuple(2 if side > SMALLEST else 1 for side in y.shape[2:])
                steps.append(step)
                y = pool("max", y, step)
                if self.entries:
                    image = pool("avg", image, step)
                    y = torch.cat([y, self.entries[i - 1](image)], 1)
            y = block(y)
            skips.append(y)
        return skips, steps


class Gate(nn.Module):
    """The gate psi (B, 1, *size) of a skip connection, computed from the skip and the decoder's map, both
    (B, C, *size)."""

    def __init__(self, dims: int, width: int, norm: str, combine: str) -> None:
        super().__init__()
        inner = max(width // 2, 1)
        self.combine = combine
        self.of_decoder = nn.Sequential(conv(dims, width, inner, 1), make_norm(dims, inner, norm))
        self.of_skip = nn.Sequential(conv(dims, width, inner, 1), make_norm(dims, inner, norm))
        parts = 2 if combine == "concat" else 1
        self.psi = nn.Sequential(conv(dims, parts * inner, 1, 1), make_norm(dims, 1, norm))

    def forward(self, decoder: Tensor, skip: Tensor) -> Tensor:
        g, x = self.of_decoder(decoder), self.of_skip(skip)
        both = torch.cat([g, x], 1) if self.combine == "concat" else g + x
        return torch.sigmoid(self.psi(F.relu(both)))


class PositionAttention(nn.Module):
    """PAM: x + gamma softmax((x W_c)(x W_b)^T) (x W_d) over the N positions, without a scale."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        inner = max(width // 8, 1)
        self.query, self.key = (conv(dims, width, inner, 1, bias=False) for _ in range(2))
        self.value = conv(dims, width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).flatten(2).transpose(1, 2)[:, None]
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
        return x + self.gamma * mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class ChannelAttention(nn.Module):
    """CAM: x + gamma x softmax(x^T x / N) over the C channels; the paper does not divide by N."""

    def __init__(self, mean: bool = True) -> None:
        super().__init__()
        self.mean = mean
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        logits = flat @ flat.mT / (flat.shape[2] if self.mean else 1)
        return x + self.gamma * (logits.softmax(-1).mT @ flat).unflatten(2, x.shape[2:])


class DualAttention(nn.Module):
    """The sum of attention over positions and attention over channels, each between two convolutions."""

    def __init__(self, dims: int, width: int, norm: str, dropout: float, mean: bool = True) -> None:
        super().__init__()
        self.position, self.channel = PositionAttention(dims, width), ChannelAttention(mean)
        self.of_position, self.of_channel = (
            nn.Sequential(
                conv(dims, width, width, 3, bias=False),
                make_norm(dims, width, norm),
                nn.ReLU(),
                drop(dims, dropout),
                conv(dims, width, width, 3),
            )
            for _ in range(2)
        )
        self.last = nn.Sequential(
            drop(dims, dropout), conv(dims, width, width, 1), make_norm(dims, width, norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        both = self.of_position(self.position(x)) + self.of_channel(self.channel(x))
        return self.last(both)


class Entry(nn.Sequential):
    """A convolution with ReLU that is applied to the image after downscaling it to a level's size."""

    def __init__(self, dims: int, channels: int, width: int) -> None:
        super().__init__(conv(dims, channels, width, 3), nn.ReLU())


class Upsample(nn.Module):
    """A transposed convolution that enlarges by up to 2^times per axis to a given size, followed by norm
    and ReLU."""

    def __init__(self, dims: int, width: int, out: int, norm: str, times: int = 1) -> None:
        super().__init__()
        self.padding = 2 ** (times - 1)
        side = 2 * self.padding + 1
        self.weight = nn.Parameter(torch.empty(width, out, *(side,) * dims))
        nn.init.normal_(self.weight, std=math.sqrt(2 / (width * (side / 2**times) ** dims)))
        self.norm = make_norm(dims, out, norm)

    def forward(self, x: Tensor, stride: tuple[int, ...], size: Sequence[int]) -> Tensor:
        """Enlarge ``x`` (B, C, *s) to ``size``, where s = ceil(size / stride)."""
        extra = [
            want - (side - 1) * step - 1
            for want, side, step in zip(size, x.shape[2:], stride, strict=True)
        ]
        convolve: Any = F.conv_transpose2d if len(stride) == 2 else F.conv_transpose3d
        made = convolve(x, self.weight, None, stride, self.padding, extra)
        return F.relu(self.norm(made))


def double_conv(dims: int, width: int, out: int, norm: str) -> nn.Sequential:
    """Create two 3-wide convolutions, each followed by norm and ReLU."""
    layers: list[nn.Module] = []
    for a in (width, out):
        layers += [conv(dims, a, out, 3, bias=False), make_norm(dims, out, norm), nn.ReLU()]
    return nn.Sequential(*layers)


def conv(dims: int, width: int, out: int, side: int, bias: bool = True) -> nn.Module:
    """Create a convolution that keeps the size."""
    make: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    return make(width, out, side, padding=side // 2, bias=bias)


def make_norm(dims: int, width: int, norm: str) -> nn.Module:
    kinds: dict[tuple[str, int], Any] = {
        ("batch", 2): nn.BatchNorm2d,
        ("batch", 3): nn.BatchNorm3d,
        ("instance", 2): nn.InstanceNorm2d,
        ("instance", 3): nn.InstanceNorm3d,
    }
    return kinds[norm, dims](width, affine=True)


def drop(dims: int, share: float) -> nn.Module:
    """Create a layer that drops whole channels."""
    return nn.Dropout2d(share) if dims == 2 else nn.Dropout3d(share)


def pool(kind: Literal["max", "avg"], x: Tensor, step: tuple[int, ...]) -> Tensor:
    """Pool ``x`` (B, C, *size) by ``step`` per axis; a remainder at an edge is pooled separately."""
    pools: dict[tuple[str, int], Any] = {
        ("max", 2): F.max_pool2d,
        ("max", 3): F.max_pool3d,
        ("avg", 2): F.avg_pool2d,
        ("avg", 3): F.avg_pool3d,
    }
    return pools[kind, len(step)](x, step, ceil_mode=True)
