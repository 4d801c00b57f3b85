"""Times of jobs as ratios, both sides measured in one run.

Each round times every job once, in turn, so that a slow moment of the machine hits all of them; the
ratio is taken within the round and its median over rounds is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xattn.eval.bench.rounds import keep_rounds

Job = Callable[[], Any]
Clock = Callable[[], float]
PASSES = ("forward", "forward + backward")


def ratios(
    jobs: dict[str, Job], base: str, rounds: int, warmup: int = 2, of: str = ""
) -> dict[str, float]:
    """Median over ``rounds`` of time(job) / time(jobs[base]), each measured within one round."""
    took = times(jobs, rounds, warmup, of=of)
    return {name: median_ratio(took[name], took[base]) for name in jobs}


def times(
    jobs: dict[str, Job],
    rounds: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    of: str = "",
) -> dict[str, list[float]]:
    """Seconds of every job in each of ``rounds``, in which all run once, in turn; kept as rounds ``of`` a
    row of the table."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            seconds = seconds_of(job, clock)
            if turn >= warmup:
                took[name].append(seconds)
    for name, seconds_each in took.items():
        keep_rounds(of, name, seconds_each)
    return took


def processor_clock() -> Clock:
    """The time of all threads on a CPU, which other programs do not lengthen as they do a wall clock's;
    with a GPU the wall clock."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def median_ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def forward_and_both(
    run: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> tuple[Job, Job]:
    """``run`` of the leaves without a graph, and with its backward pass, from ``grad`` to those leaves that
    it reads."""

    @torch.no_grad()
    def forward() -> Tensor:
        return run(*leaves)

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    return forward, both


def seconds_of(job: Job, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, work on a GPU included."""
    _synchronize()
    start = clock()
    job()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
