"""What the processes of a training run do together: launch, share weights, stop, average gradients.

``accelerate`` is imported where it is used: commands that do not train should not pay for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xattn.runtime.distributed import peers

RESUME = "start all of them again with --resume (resume=True) to go on from the last checkpoint"

T = TypeVar("T")


@contextmanager
def own_accelerator(device: torch.device, precision: str) -> Iterator[Any]:
    """An Accelerator for this run only.

    The next run may ask for another precision, and an accelerator of the caller stays as it was.
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
        with peers(RESUME):
            yield accelerator
    finally:
        for state, values in zip(states, before, strict=True):
            if alone or state is not PartialState:  # several processes keep their group
                state._shared_state.clear()
                state._shared_state.update(values)


def from_main(accelerator: Any, *values: Any) -> list[Any]:
    """The values that the main process passed, in every process."""
    from accelerate.utils import broadcast_object_list

    return list(values) if accelerator.num_processes == 1 else broadcast_object_list([*values])


def share_weights(accelerator: Any, module: nn.Module) -> None:
    """Give all processes the parameters and buffers of the main one."""
    from accelerate.utils import broadcast

    if accelerator.num_processes > 1:
        broadcast([p.data for p in (*module.parameters(), *module.buffers())])


def merge(accelerator: Any, own: dict[Any, T]) -> dict[Any, T]:
    """The dicts of all processes as one."""
    from accelerate.utils import gather_object

    return own if accelerator.num_processes == 1 else {**own, **dict(gather_object([*own.items()]))}


def agree(accelerator: Any, stop: int, count: int) -> tuple[int, list[int]]:
    """The gravest reason of any process to stop (0: none), and the number of images of each process."""
    if accelerator.num_processes == 1:
        return stop, [count]
    told = accelerator.gather(torch.tensor([[stop, count]], device=accelerator.device))
    return int(told[:, 0].max()), told[:, 1].tolist()


def average(accelerator: Any, values: Tensor) -> Tensor:
    """The mean of ``values`` over all processes."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values, "mean")


def average_gradients(accelerator: Any, module: nn.Module) -> None:
    """Replace gradients by their means over all processes, in one message.

    A parameter without a gradient in any process keeps None, so that the optimizer leaves it alone as it
    does in a single process.
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
def seeded(seed: int, step: int) -> Iterator[None]:
    """Draw random numbers, such as dropout's, as a function of the step, alike in all processes.

    Afterwards the caller's generators are where they were before.
    """
    digest = hashlib.sha256(repr((seed, step, 0)).encode()).digest()
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        yield
