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
INSTALL = 'Triton is not installed; run: pip install "xattn[gpu]"'


def choose(backend: str, device: torch.device) -> str:
    """``"reference"``, ``"cpu"`` or ``"triton"``; ``"auto"`` is Triton on GPUs and cpu elsewhere.

    The ``cpu`` path is plain PyTorch and runs on every device. Triton runs on a CPU only in its
    interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ValueError: an unknown backend, or Triton where it cannot run.
    """
    if backend == "auto" and device.type != "cuda":
        return "cpu"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}; choose one of {', '.join(BACKENDS)}")
    runs = HAS_TRITON and (device.type == "cuda" or interpreted())
    if backend == "triton" and not HAS_TRITON:
        raise ValueError(f"backend='triton': {INSTALL}")
    if backend == "triton" and not runs:
        raise ValueError(
            f"backend='triton': Triton does not run on {device}; use 'auto', or set "
            f"TRITON_INTERPRET=1 for tests"
        )
    if backend == "auto":
        if not HAS_TRITON:
            _say_slow()
        return "triton" if runs else "cpu"
    return backend


@functools.cache
def _say_slow() -> None:
    """Warn once that a GPU runs plain PyTorch."""
    warnings.warn(f"kernels are plain PyTorch on this GPU: {INSTALL}", stacklevel=4)


def own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which an op's products keep its own types, even under a user's autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
