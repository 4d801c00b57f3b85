"""Time, memory and operations of jobs, and the raw values of measurements.

Each round times every job once, in turn, so that a slow moment of the machine affects all of them; a ratio
is taken within the round, and its median over rounds is reported.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from xattn.runtime.files import write_rows

Job = Callable[[], Any]
Clock = Callable[[], float]
PASSES = ("forward", "forward + backward")
_ROWS: ContextVar[list[dict[str, Any]] | None] = ContextVar("rows", default=None)


# ---------------------------------------------------------------- time


def ratios(
    jobs: dict[str, Job], base: str, rounds: int, warmup: int = 2, of: str = ""
) -> dict[str, float]:
    """Median over ``rounds`` of time(job) / time(jobs[base]), each measured within one round."""
    took = times(jobs, rounds, warmup, of=of)
    return {name: median_ratio(took[name], took[base]) for name in jobs}


def times(
    jobs: Mapping[str, Job],
    rounds: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    of: str = "",
) -> dict[str, list[float]]:
    """Seconds that every job takes in each of ``rounds``. In a round, all jobs run once, one after the
    other; the rounds are recorded for the table row named ``of``."""
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
    """A clock of the CPU time of all threads; unlike wall-clock time, it does not run on while other
    programs use the processor. With a GPU, it is a wall clock."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def median_ratio(of: list[float], to: list[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def forward_and_both(
    run: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor
) -> tuple[Job, Job]:
    """Two jobs: one calls ``run`` on the leaves without a graph; the other calls ``run`` and then its
    backward pass, from ``grad`` to the leaves that ``run`` reads."""

    @torch.no_grad()
    def forward() -> Tensor:
        return run(*leaves)

    def both() -> None:
        torch.autograd.grad(run(*leaves), leaves, grad, allow_unused=True)

    return forward, both


def seconds_of(job: Job, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, including work on a GPU."""
    _synchronize()
    start = clock()
    job()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- memory


def peak_memory(job: Callable[[], Any]) -> int:
    """Peak memory of tensors in bytes, beyond those that exist before ``job``.

    The memory is counted in the allocator, so that custom operators and the backward pass are included.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints its own lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as probe:
        job()
    live = peak = 0
    events = probe.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda c: c[0]):
        live += change
        peak = max(peak, live)
    return peak


# ---------------------------------------------------------------- operations


def _pooling(q: Any, k: Any, v: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Operations for the scores, if they are products, and for the weighted sum."""
    (batch, queries, width), tokens = out_shape[0], v[2]
    return 2 * batch * queries * tokens * (width + (0 if q is None else q[2]))


def operations(job: Job) -> int:
    """Floating-point operations of the matrix products and convolutions of one call."""
    from xattn.kernels import pooling as _registers_the_op  # noqa: F401

    own = {torch.ops.xattn.pooling_forward: _pooling}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        job()
    return counter.get_total_flops()


# ---------------------------------------------------------------- raw values


@contextmanager
def record_rounds(path: Path | None) -> Iterator[None]:
    """Context manager that, on exit, writes the measurements recorded by :func:`keep_rounds` to ``path``,
    if given.

    Raises:
        ValueError: nothing was recorded.
    """
    rows: list[dict[str, Any]] = []
    token = _ROWS.set(rows if path is not None else None)
    try:
        yield
    finally:
        _ROWS.reset(token)
    if path is not None:
        write_rows(path, rows, "raw")


def keep_rounds(of: str, job: str, values: Sequence[float], unit: str = "s") -> None:
    """Record measurements of ``job``, one value per round; ``of`` names the row of the printed table."""
    rows = _ROWS.get()
    if rows is not None:
        rows += [
            {"of": of, "job": job, "round": turn, "value": value, "unit": unit}
            for turn, value in enumerate(values)
        ]


def keep_table(lines: Iterable[str]) -> None:
    """Record the rows of a printed Markdown table whose cells are the raw values."""
    rows = _ROWS.get()
    if rows is not None:
        cells = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines if x[:1] == "|"]
        rows += [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
