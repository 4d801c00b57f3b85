"""Many processes, started by ``torchrun`` or ``accelerate launch``: who am I, what have the others?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def processes(device: torch.device) -> tuple[int, int]:
    """(count, rank) in the process group; a launch of several processes joins one first.

    It talks over gloo for a CPU ``device``, over nccl for a GPU. (1, 0) where there is no group, or
    it was left: the very processes that :func:`gather` asks.
    """
    if not _joined() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")
    if not _joined():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def gather(value: Any) -> list[Any]:
    """``value`` of every process, by rank; call it in all of them."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def peers(remedy: str = "start all of them again") -> Iterator[None]:
    """An error of the process group inside the block is one line: another process died.

    Raises:
        ConnectionError: that, with the ``remedy``.
    """
    try:
        yield
    except RuntimeError as error:
        if not _of_the_group(error):
            raise
        raise ConnectionError(
            f"processes: another one of this run died or ended with an error; {remedy}, nothing that was "
            f"written is lost"
        ) from error


def _of_the_group(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, which name its source file; joining raises DistErrors."""
    if isinstance(error, getattr(torch.distributed, "DistError", ())):
        return True
    return _joined() and "gloo" in str(error).lower()


def leave() -> None:
    """Wait for the others and leave the process group, if there is one."""
    if _joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
