"""Chooses an op's implementation: the reference, the CPU path or the Triton kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST = 8  # compute capability: 7.5 has neither bfloat16 nor the shared memory of the kernels
WIDEST = 128  # widest heads; at 256 kernels spill, and some need more shared memory than there is
ENTRIES = 2**27  # entries of a tile of plain PyTorch on a GPU: 512 MB in float32
INSTALL = 'Triton is not installed; run: pip install "xattn[gpu]"'


def choose(
    backend: str, device: torch.device, dtype: torch.dtype | None = None, limit: str | None = None
) -> str:
    """Choose ``"reference"``, ``"cpu"`` or ``"triton"``; ``"auto"`` is Triton on GPUs and cpu elsewhere.

    The ``cpu`` path is plain PyTorch, runs on every device, and handles calls that the kernels do not
    support. Triton runs on a CPU only in its interpreter (``TRITON_INTERPRET=1``).

    Args:
        dtype: the dtype of the tensors.
        limit: the reason, in words, why the op's kernels do not support this call; None if they do.

    Raises:
        ValueError: the backend is unknown, or ``"triton"`` cannot run.
    """
    if backend == "auto" and device.type != "cuda":
        return "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in ("reference", "cpu"):
        return backend
    if not HAS_TRITON:
        limit = INSTALL
    elif device.type != "cuda" and not interpreted():
        limit = f"Triton does not run on {device}; set TRITON_INTERPRET=1 for tests"
    elif device.type == "cuda" and torch.version.hip is not None:
        limit = "the kernels are for NVIDIA's GPUs"
    elif device.type == "cuda" and torch.cuda.get_device_properties(device).major < OLDEST:
        limit = f"{device} has too little shared memory; take an Ampere GPU or newer"
    elif dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        limit = f"got {dtype}; give float32, float16 or bfloat16"
    if limit is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton': {limit}, or use 'auto'")
    if not torch.compiler.is_compiling():
        _say_slow(limit)
    return "cpu"


def width_limit(*tensors: Tensor) -> str | None:
    """Return the ``limit`` of :func:`choose` for kernels in which a tile holds the whole width of a
    head."""
    width = max(x.shape[-1] for x in tensors)
    return None if width <= WIDEST else f"got width {width}; give at most {WIDEST}"


@functools.cache
def _say_slow(why: str) -> None:
    """Warn once that plain PyTorch runs on a GPU."""
    warnings.warn(f"kernels are plain PyTorch on this GPU: {why}", stacklevel=3)


def readable(x: Tensor) -> bool:
    """Whether a check may read the elements of ``x``. On a GPU, where reading stalls the stream, it may do
    so only with ``XATTN_CHECK=1``."""
    return x.device.type == "cpu" or os.environ.get("XATTN_CHECK") == "1"


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the device of ``x`` is the current device, on which Triton launches
    kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tile_entries(device: torch.device, cached: int) -> int:
    """The number of entries that plain PyTorch processes at a time. On a CPU, it is ``cached``, so that the
    entries fit into the cache; on a GPU, it is at least ``ENTRIES``, because each operation costs a
    launch."""
    return cached if device.type == "cpu" else max(cached, ENTRIES)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which an op's products keep their dtypes, even if the user's autocast is on."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
