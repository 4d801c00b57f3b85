"""The choice of an op's implementation: the definition, the CPU path, or the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "reference", "cpu", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None


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
    if backend == "triton" and not runs:
        why = "Triton is not installed" if not HAS_TRITON else f"Triton does not run on {device}"
        raise ValueError(
            f"backend='triton': {why}; use 'auto', or set TRITON_INTERPRET=1 for tests"
        )
    if backend == "auto":
        return "triton" if runs else "cpu"
    return backend


def own_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which an op's products keep its own types, even under a user's autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
