"""The choice of an op's implementation: the definition, the CPU path, or the Triton kernels."""

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
INSTALL = 'Triton is not installed; run: pip install "xattn[gpu]"'


def choose(
    backend: str, device: torch.device, dtype: torch.dtype | None = None, limit: str | None = None
) -> str:
    """``"reference"``, ``"cpu"`` or ``"triton"``; ``"auto"`` is Triton on GPUs and cpu elsewhere.

    The ``cpu`` path is plain PyTorch and runs on every device, and where the kernels do not fit. Triton
    runs on a CPU only in its interpreter (``TRITON_INTERPRET=1``).

    Args:
        dtype: of the tensors.
        limit: what keeps the op's own kernels from this call, in words; None where nothing does.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where it cannot run.
    """
    if backend == "auto" and device.type != "cuda":
        return "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend in ("reference", "cpu"):
        return backend
    limit = _missing(device) or _unknown(dtype) or limit
    if limit is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton': {limit}")
    if not torch.compiler.is_compiling():
        _say_slow(limit)
    return "cpu"


def _missing(device: torch.device) -> str | None:
    """Why Triton does not run on ``device``."""
    if not HAS_TRITON:
        return INSTALL
    if device.type != "cuda" and not interpreted():
        return f"Triton does not run on {device}; use 'auto', or set TRITON_INTERPRET=1 for tests"
    if device.type == "cuda" and torch.cuda.get_device_properties(device).major < OLDEST:
        return (
            f"{device} has less shared memory than the kernels need; use 'auto', or an Ampere GPU"
        )
    return None


def _unknown(dtype: torch.dtype | None) -> str | None:
    if dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        return None
    return f"got {dtype}; give float32, float16 or bfloat16, or use 'auto'"


def too_wide(widest: int, *tensors: Tensor) -> str | None:
    """The limit of kernels that take heads of at most ``widest``, for :func:`choose`."""
    width = max(x.shape[-1] for x in tensors)
    return None if width <= widest else f"got width {width}; give at most {widest}, or use 'auto'"


@functools.cache
def _say_slow(why: str) -> None:
    """Warn once that a GPU runs plain PyTorch."""
    warnings.warn(f"kernels are plain PyTorch on this GPU: {why}", stacklevel=4)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which the device of ``x`` is the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which an op's products keep its own types, even under a user's autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
