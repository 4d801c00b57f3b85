"""Many processes, started by ``torchrun`` or ``accelerate launch``: who am I, what have the others?"""

from __future__ import annotations

import os
from typing import Any

import torch


def processes(device: torch.device) -> tuple[int, int]:
    """(count, rank) of this launch; joins its process group where there is more than one.

    The group talks over gloo for a CPU ``device``, over nccl for a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1, 0
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return state.num_processes, state.process_index


def gather(value: Any) -> list[Any]:
    """``value`` of every process, by rank; call it in all of them."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leave() -> None:
    """Wait for the others and leave the process group, if there is one."""
    if _joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
