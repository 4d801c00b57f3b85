"""The Terminator (github.com/hyperevolnet/Terminator): a classifier with hyper-kernels, no
residuals.

A slow network maps coordinates to the kernels K (:mod:`xattn.blocks.hyper_kernel`), which a fast
network multiplies with its input. A block, with x (B, C, h, w), y its means, std by image and
channel:

    c = x o K,    f = std(R_1(c) + R_2(x)),    m = std(W x),    i = std(x o sigmoid(y o k o y))
    g_1, g_2, g_3 = a(c f), a(c m), a(c i)         planes multiplied as matrices; a(o) = sigmoid(o) o
    s_j = x o sigmoid(mean_channels(g_j) y o k o y)
    l_1 .. l_4 = gelu(bstd(W depthwise(x, K_l)))   K_l with sides 3, 9, 5 and 7, times a context
    out = dropout(gelu(gstd(W [g, s, l, outputs of earlier blocks])))

    R(x) = W_y (gelu(std(W_k x o W_q W_v x)) + b)

bstd is over the batch, gstd over groups of channels: every other group by image, the rest by batch.
So outputs depend on the batch, as in the original. Where the authors' code is not public, or ties a
kernel to one grid (group standardisation, a bias for each place, the scale in the local kernels),
this is the simplest form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.blocks.hyper_kernel import (
    HyperKernel,
    hyper_interact,
    hyper_score,
    plane_product,
    standardise,
)

LOCAL = (3, 9, 5, 7)  # sides of the local kernels
GROUPS = 4


class Mix(nn.Linear):
    """A linear layer over the channels of (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.flatten(2) + self.bias[:, None]).unflatten(2, x.shape[2:])


class Gate(nn.Module):
    """R, the authors' RGU: (B, C, h, w) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.value, self.query, self.out = (Mix(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        product = self.key(x) * self.query(self.value(x))
        gated: Tensor = self.out(F.gelu(standardise(product)) + self.bias)
        return gated


class LocalBranch(nn.Module):
    """A depthwise convolution by a hyper-kernel, then a mix of channels.

    The kernel of each channel is scaled by a context computed from the mean of x over the batch.
    """

    def __init__(self, width: int, size: int, hidden: int) -> None:
        super().__init__()
        self.size = size
        self.kernel = HyperKernel(width, 2, hidden)
        self.reduce, self.context = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mix = Mix(width, width)
        nn.init.ones_(self.context.bias)

    def forward(self, x: Tensor) -> Tensor:
        about = self.context(F.gelu(self.reduce(x.mean((0, 2, 3)))))
        kernel = self.kernel((self.size, self.size)) * about[:, None, None] / self.size
        return F.gelu(batch_standardised(self.mix(depthwise(x, kernel))))


class TerminatorBlock(nn.Module):
    """``block(x, earlier)``: (B, C, h, w), and outputs of earlier blocks, to (B, out, h, w).

    Args:
        width, out: channels; ``earlier``: the total channels of the earlier outputs.
        hidden: width of the slow network of K; those of the other kernels have half of it.
        slow: whether K and k are kernels; if not, they are 1.
    """

    def __init__(
        self, width: int, out: int, earlier: int, hidden: int, slow: bool, dropout: float
    ) -> None:
        super().__init__()
        self.kernel = HyperKernel(width, 2, hidden) if slow else None
        self.channel_kernel = HyperKernel(1, 1, hidden // 2) if slow else None
        self.of_context, self.of_input = Gate(width), Gate(width)
        self.mix = Mix(width, width)
        self.local = nn.ModuleList(LocalBranch(width, size, hidden // 2) for size in LOCAL)
        self.join = Mix(10 * width + earlier, out)
        self.dropout = nn.Dropout(dropout)

    def kernels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """K (C, h, w) and k (C,)."""
        if self.kernel is None or self.channel_kernel is None:
            return x.new_ones(x.shape[1:]), x.new_ones(x.shape[1])
        return self.kernel(x.shape[2:]), self.channel_kernel((x.shape[1],))[0]

    def forward(self, x: Tensor, earlier: Sequence[Tensor] = ()) -> Tensor:
        kernel, channel = self.kernels(x)
        context, y = x * kernel, x.mean((2, 3))
        score = hyper_score(y, channel)[:, :, None, None]
        fast = standardise(self.of_context(context) + self.of_input(x))
        others = standardise(self.mix(x)), standardise(x * score)
        products = [F.silu(plane_product(context, planes)) for planes in (fast, *others)]
        scored = [x * hyper_interact(planes, y * channel * y) for planes in products]
        local = [branch(x) for branch in self.local]
        joined = self.join(torch.cat([*products, *scored, *local, *earlier], 1))
        dropped: Tensor = self.dropout(F.gelu(group_standardised(joined)))
        return dropped


class Terminator(nn.Module):
    """Images (B, channels, h, w) to logits.

    Args:
        widths: output channels of each block; for the slow loss, multiples of the previous one.
        slow: see :class:`TerminatorBlock`.
    """

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (12, 24),
        classes: int = 10,
        hidden: int = 16,
        slow: bool = True,
        dropout: float = 0.05,
    ) -> None:
        super().__init__()
        sizes = [channels, *widths]
        self.blocks = nn.ModuleList(
            TerminatorBlock(sizes[i], sizes[i + 1], sum(sizes[1 : i + 1]), hidden, slow, dropout)
            for i in range(len(widths))
        )
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for block in self.blocks:
            x = block(x, outputs)
            outputs.append(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve (B, C, h, w) with (C, k, k), channel by channel, with zero padding.

    It multiplies by a matrix (h w, h w) for each channel: on small planes, this is faster on a CPU
    than a grouped convolution.
    """
    h, w = x.shape[2:]
    size = kernel.shape[-1]
    rows, columns = (
        torch.arange(n)[:, None] - torch.arange(n) + size // 2 for n in (h, w)
    )  # [source, target]
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    index = torch.where(inside, rows * size + columns, size * size).flatten()
    matrices = F.pad(kernel.flatten(1), (0, 1)).index_select(1, index).unflatten(1, (h * w, h * w))
    return (x.flatten(2).transpose(0, 1) @ matrices).transpose(0, 1).unflatten(2, (h, w))


def batch_standardised(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Standardise each channel of x over the batch and all places; no running statistics."""
    return F.batch_norm(x, None, None, training=True, eps=eps)


def group_standardised(x: Tensor, groups: int = GROUPS, eps: float = 1e-5) -> Tensor:
    """x with mean 0 and variance 1 in each of ``groups`` groups of channels.

    Statistics of the first, third, ... group are over the channels and places of each image; those
    of the other groups are also over the batch.
    """
    parts = []
    for i, part in enumerate(x.chunk(groups, 1)):
        over = (0, 1, 2, 3) if i % 2 else (1, 2, 3)
        variance, mean = torch.var_mean(part, over, correction=0, keepdim=True)
        parts.append((part - mean) * (variance + eps).rsqrt())
    return torch.cat(parts, 1)


class ResNet(nn.Module):
    """A residual network for small images: two stages of one basic block each, the second with half
    the side and twice the channels (arXiv 1512.03385)."""

    def __init__(self, width: int, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(channels, width), nn.ReLU())
        self.stages = nn.ModuleList([Residual(width, width, 1), Residual(width, 2 * width, 2)])
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))); x goes through a 1 x 1 convolution where the shape changes."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv(width, out, stride), nn.ReLU(), *_conv(out, out))
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or width != out:
            self.skip = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


def _conv(first: int, out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(first, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
