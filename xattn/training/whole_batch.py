"""Layers that couple the images of a batch, run on the batch of all processes together.

Each process holds a share of a training batch. BatchNorm takes its statistics from the whole batch, and
dropout is drawn for it, so several processes train the head that one process would.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn.heads.attentive import FeatureNorm
from xattn.kernels.softmax.reference import widen

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Share:
    """What one process has of the batch that a step trains on: ``rows`` of its ``count`` images.

    A process without a row takes part with a stand-in of weight 0.
    """

    rows: Sequence[int] = ()
    count: int = 0


@contextmanager
def whole_batch(module: nn.Module) -> Iterator[Share]:
    """In the block, the layers of ``module`` train on the batch of all processes.

    Before each step the caller writes into the yielded :class:`Share` what this process has of the batch.

    BatchNorm normalises by the statistics of all images, on any device; otherwise each process would
    normalise its own part by itself. The features of its input lie on axis 1, or the input is (n, C).
    Dropout of inputs (B, ...) is drawn for the whole batch: it depends neither on which process has an
    image, nor on whether another image could be read.
    """
    share = Share()
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    layers = [m for m in module.modules() if together and isinstance(m, _BatchNorm)]
    drops = [m for m in module.modules() if isinstance(m, _DROPOUTS)]
    for layer in layers:
        layer.forward = functools.partial(_shared_forward, layer, share)  # type: ignore[method-assign]
        if isinstance(layer, FeatureNorm):
            layer.moments = functools.partial(_shared_moments, share)  # type: ignore[method-assign]
    for drop in drops:
        drop.forward = functools.partial(_shared_dropout, drop, share)  # type: ignore[method-assign]
    try:
        yield share
    finally:
        for patched in (*layers, *drops):
            del patched.forward
            if "moments" in vars(patched):
                del patched.moments


class _Sum(torch.autograd.Function):
    """The sum over all processes. The losses of all of them depend on it, so its gradient is a sum, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def _moments(share: Share, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feature of ``x`` (B, C, ...): the number of values in all processes, their mean (C,) and
    their biased variance (C,)."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    weight = 1.0 if share.rows else 0.0
    count = x.new_tensor(weight * x.numel() / x.shape[1])
    torch.distributed.all_reduce(count)
    mean = _Sum.apply(weight * x.sum(axes)) / count
    centred = x - mean.view([1, -1, *[1] * (x.ndim - 2)])
    return count, mean, _Sum.apply(weight * centred.square().sum(axes)) / count


def _shared_moments(share: Share, x: Tensor) -> tuple[Tensor, Tensor]:
    _, mean, variance = _moments(share, widen(x))
    return mean.to(x.dtype), variance.to(x.dtype)


def _shared_forward(layer: _BatchNorm, share: Share, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    wide = widen(x)
    count, mean, variance = _moments(share, wide)
    if layer.track_running_stats and layer.running_mean is not None:
        assert layer.running_var is not None and layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        with torch.no_grad():
            layer.running_mean.lerp_(mean.to(layer.running_mean), rate)
            unbiased = variance * count / (count - 1).clamp_min(1)
            layer.running_var.lerp_(unbiased.to(layer.running_var), rate)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    y = (wide - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        y = y * layer.weight.view(shape) + layer.bias.view(shape)
    return y.to(x.dtype)


def _shared_dropout(layer: nn.Module, share: Share, x: Tensor) -> Tensor:
    forward = type(layer).forward
    whole = list(share.rows) == list(range(share.count))
    if not layer.training or whole or len(x) != len(share.rows):
        return forward(layer, x)
    kept = forward(layer, x.new_ones(share.count, *x.shape[1:]))
    return x * kept[torch.tensor(share.rows, device=x.device)]
