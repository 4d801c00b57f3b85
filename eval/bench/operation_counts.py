"""Operations of a job, counted instead of timed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xattn.eval.bench.timing import Job


def operations(job: Job) -> int:
    """Floating-point operations of the matrix products and convolutions of one call."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def macs(head: Any, tokens: Any) -> int:
    """Multiplications of the products and convolutions from ``tokens`` to the pooled vector."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not counted
        return operations(lambda: head.pooled(head.attend(tokens))) // 2
