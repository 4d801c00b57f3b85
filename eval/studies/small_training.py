"""Training of a study's small networks: AdamW on one thread, so that CPU seconds are comparable.

The learning rate rises for a tenth of the steps, then falls to 0 by half a cosine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def minimize(
    net: nn.Module,
    losses: Iterable[Tensor],
    steps: int,
    lr: float,
    weight_decay: float,
    rise: float = 0.1,
    max_norm: float | None = None,
) -> float:
    """Train ``net`` and return the CPU seconds; ``net`` is left in evaluation mode.

    Args:
        losses: one for each step, computed on demand.
        steps: the length of the schedule.
        rise: the share of the steps in which the learning rate rises.
        max_norm: the norm that larger gradients are scaled down to.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(steps, 2), pct_start=rise, cycle_momentum=False
    )
    net.train()
    with single_thread():
        start = time.process_time()
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if max_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            optimizer.step()
            schedule.step()
        seconds = time.process_time() - start
    net.eval()
    return seconds


@contextmanager
def single_thread() -> Iterator[None]:
    """A context in which torch computes on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
