"""Coordinate the processes of a training run: starting, sharing weights, stopping, averaging gradients.

Each process has a share of every training batch. BatchNorm takes its statistics from the whole batch, and
dropout is drawn for the whole batch (:func:`whole_batch`), so several processes train the same head as a
single process would. ``accelerate`` is imported only where it is used, so that other commands start
without it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn.heads.attentive import FeatureNorm
from xattn.kernels.softmax.reference import widen
from xattn.runtime.distributed import peer_errors

RESUME = "start all of them again with --resume (resume=True) to continue from the last checkpoint"

T = TypeVar("T")


@contextmanager
def own_accelerator(device: torch.device, precision: str) -> Iterator[Any]:
    """Yield an ``Accelerator`` for this run only.

    The next run may use a different precision, and the caller's own accelerator is not changed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = AcceleratorState, GradientState, PartialState
    before = [dict(state._shared_state) for state in states]
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        step_scheduler_with_optimizer=False,
        device_placement=False,
    )
    alone = accelerator.num_processes == 1
    try:
        with peer_errors(RESUME):
            yield accelerator
    finally:
        for state, values in zip(states, before, strict=True):
            if alone or state is not PartialState:  # several processes keep their group
                state._shared_state.clear()
                state._shared_state.update(values)


def from_main(accelerator: Any, *values: Any) -> list[Any]:
    """Return the main process's values in every process."""
    from accelerate.utils import broadcast_object_list

    return list(values) if accelerator.num_processes == 1 else broadcast_object_list([*values])


def share_weights(accelerator: Any, module: nn.Module) -> None:
    """Copy the parameters and buffers of the main process to all processes."""
    from accelerate.utils import broadcast

    if accelerator.num_processes > 1:
        broadcast([p.data for p in (*module.parameters(), *module.buffers())])


def merge_dicts(accelerator: Any, own: dict[Any, T]) -> dict[Any, T]:
    """Merge the dicts of all processes into one."""
    from accelerate.utils import gather_object

    return own if accelerator.num_processes == 1 else {**own, **dict(gather_object([*own.items()]))}


def agree_on_stop(accelerator: Any, stop: int, count: int) -> tuple[int, list[int]]:
    """Return the most severe reason to stop in any process (0 if there is none), and the number of images
    of each process."""
    if accelerator.num_processes == 1:
        return stop, [count]
    told = accelerator.gather(torch.tensor([[stop, count]], device=accelerator.device))
    return int(told[:, 0].max()), told[:, 1].tolist()


def average(accelerator: Any, values: Tensor) -> Tensor:
    """Return the mean of ``values`` over all processes."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, "mean")


def average_gradients(accelerator: Any, module: nn.Module) -> None:
    """Replace gradients by their means over all processes, in a single message.

    If a parameter has no gradient in any process, its gradient stays None, so that the optimizer ignores
    it as it does in a single process.
    """
    if accelerator.num_processes == 1:
        return
    named = [p for p in module.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in named]
    there = parts[0].new_tensor([p.grad is not None for p in named])
    flat = accelerator.reduce(torch.cat([*(g.flatten() for g in parts), there]), "mean")
    *means, there = flat.split([*(p.numel() for p in named), len(named)])
    for p, mean, some in zip(named, means, there.tolist(), strict=True):
        p.grad = mean.view_as(p).clone() if some else None


@contextmanager
def seed_step(seed: int, step: int) -> Iterator[None]:
    """Draw random numbers, such as those of dropout, as a function of the step, so that they are the same
    in all processes.

    Afterwards the caller's generators have the same state as before.
    """
    digest = hashlib.sha256(repr((seed, step, 0)).encode()).digest()
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


# ---------------------------------------------------------------------- layers that couple images


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass
class Share:
    """One process's share of the batch of a step: ``rows`` of the batch's ``count`` images.

    A process without a row takes part with a placeholder of weight 0.
    """

    rows: Sequence[int] = ()
    count: int = 0


@contextmanager
def whole_batch(module: nn.Module) -> Iterator[Share]:
    """Let the layers of ``module`` train on the batch of all processes, within this context.

    Before each step, the caller writes this process's share of the batch into the yielded :class:`Share`.

    BatchNorm normalises with the statistics of all images, on any device; otherwise each process would
    normalise its own part separately. BatchNorm's input has the features on axis 1, and it may also be (n,
    C). Dropout of inputs (B, ...) is drawn for the whole batch: it depends neither on which process has an
    image nor on whether other images could be read.
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
    """The sum over all processes. All their losses depend on it, so its gradient is a sum, too."""

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
    """For each feature of ``x`` (B, C, ...): the number of values in all processes, their mean (C,) and
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
