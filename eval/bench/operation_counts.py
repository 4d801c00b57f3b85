"""Operations of a job, counted instead of timed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xattn.eval.bench.timing import Job
from xattn.kernels import pooling as _registers_the_op  # noqa: F401


def _pooling(q: Any, k: Any, v: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Of the scores, if they are products, and of the weighted sum."""
    (batch, queries, width), tokens = out_shape[0], v[2]
    return 2 * batch * queries * tokens * (width + (0 if q is None else q[2]))


OWN_OPS = {torch.ops.xattn.pooling_forward: _pooling}


def operations(job: Job) -> int:
    """Floating-point operations of the matrix products and convolutions of one call."""
    with FlopCounterMode(display=False, custom_mapping=OWN_OPS) as counter:
        job()
    return counter.get_total_flops()


def macs(head: Any, tokens: Any) -> int:
    """Multiplications of the products and convolutions from ``tokens`` to the pooled vector."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not counted
        return operations(lambda: head.pooled(head.attend(tokens))) // 2
