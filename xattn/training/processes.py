"""What a training run asks of all its processes at once: set up, own the folder, stop together."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn.files import printable
from xattn.kernels.softmax.reference import widen
from xattn.training.run_folder import claim

FAILED = 1000  # beside the numbers of signals


@contextmanager
def own_accelerator(device: torch.device, precision: str) -> Iterator[Any]:
    """An Accelerator of this run alone: a next fit may ask for another precision, and one that the
    caller has is left as it was."""
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
        yield accelerator
    finally:
        for state, values in zip(states, before, strict=True):
            if alone or state is not PartialState:  # many processes keep their group
                state._shared_state.clear()
                state._shared_state.update(values)


def claim_together(
    stack: ExitStack, folder: Path | None, run: dict[str, Any], resume: bool, accelerator: Any
) -> Any:
    """The log of the claimed folder; what refuses the main process refuses all of them."""
    from accelerate.utils import broadcast_object_list

    log, refusal = None, None
    try:
        log = stack.enter_context(claim(folder, run, resume, accelerator.is_main_process))
    except (ValueError, OSError) as error:
        refusal = error
    if accelerator.num_processes > 1:
        refusal = broadcast_object_list([refusal])[0]
    if refusal is not None:
        raise refusal
    return log


def agree(accelerator: Any, stop: int, count: int) -> tuple[int, list[int]]:
    """The gravest reason of any process to stop (0: none), and how many images each one has."""
    if accelerator.num_processes == 1:
        return stop, [count]
    told = accelerator.gather(torch.tensor([[stop, count]], device=accelerator.device))
    return int(told[:, 0].max()), told[:, 1].tolist()


def stopped(stop: int, failure: OSError | None) -> BaseException:
    """The exception that ends all processes for the reason they agreed on."""
    if stop == FAILED:
        return failure or ChildProcessError("data: another process cannot read on; see its error")
    return KeyboardInterrupt() if stop == signal.SIGINT else SystemExit(128 + stop)


def tensorboard(folder: Path | None, step: int) -> Any:
    """A writer for the run in ``folder`` that drops what a killed run wrote later; None without one."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
    except UnicodeEncodeError:
        warnings.warn(
            f"output: {printable(str(folder))} is not a UTF-8 name, which TensorBoard needs; the losses "
            f"go to log.jsonl alone",
            stacklevel=3,
        )
        return None


@contextmanager
def shared_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers of ``module`` in training see the batch of all processes, on any device.

    Without it two processes would normalise each half of the batch by itself. Each layer's input has
    its features on axis 1, or is (n, C).
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        layers = []
    for layer in layers:
        layer.forward = functools.partial(_shared_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Sum(torch.autograd.Function):
    """The sum over all processes; every process's loss depends on it, so its gradient is their sum."""

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


def _shared_forward(layer: _BatchNorm, x: Tensor) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = widen(x)
    count = x.new_tensor(x.numel() / x.shape[1], dtype=wide.dtype)
    torch.distributed.all_reduce(count)
    mean = _Sum.apply(wide.sum(axes)) / count
    centred = wide - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes)) / count
    if layer.track_running_stats and layer.running_mean is not None:
        assert layer.running_var is not None and layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        with torch.no_grad():
            layer.running_mean.lerp_(mean.to(layer.running_mean), rate)
            unbiased = variance * count / (count - 1).clamp_min(1)
            layer.running_var.lerp_(unbiased.to(layer.running_var), rate)
    y = centred * (variance + layer.eps).rsqrt().view(shape)
    if layer.affine:
        y = y * layer.weight.view(shape) + layer.bias.view(shape)
    return y.to(x.dtype)
