"""Several processes, started by ``torchrun`` or ``accelerate launch``: count, rank, gathering."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from xattn.runtime.process import launch_rank

T = TypeVar("T")


def processes(device: torch.device) -> tuple[int, int]:
    """(count, rank) in the process group, which is joined first if several processes were launched.

    The group uses gloo for a CPU ``device`` and nccl for a GPU. Returns (1, 0) if there is no group, or
    this process has left it; :func:`gather` collects from the same processes.
    """
    if not _joined() and launch_rank()[0] > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")
    if not _joined():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def gather(value: Any) -> list[Any]:
    """Return the ``value`` of every process, by rank; all processes must call this function."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def fail_together(function: Callable[[], T]) -> T:
    """Return the result of ``function()``, which all processes call; if one of them fails, all raise its
    error.

    Raises:
        ValueError, OSError, MemoryError: as in ``function``; other errors end only their own process.
    """
    failure: Exception | None = None
    try:
        value = function()
    except (ValueError, OSError, MemoryError) as error:
        failure = error
    failures = [found for found in gather(failure) if found is not None]
    if failures:
        raise failure or failures[0]
    return value


@contextmanager
def peer_errors(remedy: str = "start all of them again") -> Iterator[None]:
    """Context manager that turns an error of the process group into one line that names the cause: another
    process died.

    Raises:
        ConnectionError: there was such an error; the message gives the ``remedy``.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError that names its source file; joining raises a DistError.
        joining = isinstance(error, getattr(torch.distributed, "DistError", ()))
        if not joining and not (_joined() and "gloo" in str(error).lower()):
            raise
        raise ConnectionError(
            f"processes: another process of this run died or ended with an error; {remedy}, nothing "
            f"that was written is lost"
        ) from error


def leave_group() -> None:
    """Wait for the other processes and leave the group, if there is one."""
    if _joined():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
