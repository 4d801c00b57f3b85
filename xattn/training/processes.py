"""What a training run asks of all its processes at once: own the folder, share a batch, stop together."""

from __future__ import annotations

import functools
import hashlib
import signal
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xattn.heads.attentive import FeatureNorm
from xattn.kernels.softmax.reference import widen
from xattn.runtime.distributed import peers
from xattn.runtime.files import printable
from xattn.training.run_folder import claim

RESUME = "start all of them again with --resume (resume=True) to go on from the last checkpoint"
FAILED = 1000  # beside the numbers of signals
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


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
        with peers(RESUME):
            yield accelerator
    finally:
        for state, values in zip(states, before, strict=True):
            if alone or state is not PartialState:  # many processes keep their group
                state._shared_state.clear()
                state._shared_state.update(values)


def claim_together(
    stack: ExitStack,
    folder: Path | None,
    run: dict[str, Any],
    resume: bool,
    accelerator: Any,
    needed: Collection[str],
) -> tuple[Any, dict[str, Any] | None]:
    """The log of the claimed folder, and the state to resume from, in all processes that of the main
    one; what refuses it refuses all of them."""
    from accelerate.utils import broadcast_object_list

    log, state, refusal = None, None, None
    try:
        claimed = claim(folder, run, resume, accelerator.is_main_process, needed)
        log, state = stack.enter_context(claimed)
    except (ValueError, OSError) as error:
        refusal = error
    if accelerator.num_processes > 1:
        refusal, state = broadcast_object_list([refusal, state])
    if refusal is not None:
        raise refusal
    return log, state


@contextmanager
def restoring(folder: Path | None) -> Iterator[None]:
    """Errors while a state is loaded are reported as errors of the checkpoint."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"resume: the checkpoint in {folder} does not fit this run ({reason}); train again into a "
            f"new output folder"
        ) from error


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


@dataclass
class Share:
    """What one process has of the batch that a step trains on: ``rows`` of its ``count`` images.

    Without a row the process takes part with a stand-in, which counts for nothing.
    """

    rows: Sequence[int] = ()
    count: int = 0


@contextmanager
def whole_batch(module: nn.Module) -> Iterator[Share]:
    """The layers of ``module`` work, in training, on the batch of all processes; the caller says
    before each step what this one has of it, in what is yielded.

    BatchNorm normalises by the statistics of all images, on any device; without it two processes would
    normalise each half of the batch by itself. Its input has the features on axis 1, or is (n, C).
    Dropout of inputs (B, ...) is drawn for the whole batch, so that it does not depend on who has which
    image, nor on whether another one could be read.
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


def average_gradients(accelerator: Any, module: nn.Module) -> None:
    """The mean over all processes, in one message; a tensor that has a gradient in none keeps None,
    so that the optimizer leaves it alone as it does in one process."""
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
def seeded(seed: int, step: int) -> Iterator[None]:
    """Random numbers, such as dropout's, as a function of the step and alike in all processes; the
    caller's go on afterwards as if none had been drawn."""
    digest = hashlib.sha256(repr((seed, step, 0)).encode()).digest()
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield


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


def _moments(share: Share, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many values each feature of ``x`` (B, C, ...) has in all processes, their mean (C,) and
    biased variance (C,)."""
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
