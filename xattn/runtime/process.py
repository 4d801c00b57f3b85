"""The process that does the work: threads sleep while waiting, freed memory is kept, Ctrl-C can wait.

By default, threads that wait for each other spin. torch divides an operation among the threads of OpenMP,
and each that finishes early waits in a loop for the others, ready for the next operation. If another
program occupies one thread's core, the other threads spin for that program's whole time slice: beside three
busy programs on two cores, a job takes about five times the processor time, and delays the other programs
as much. With sleeping threads, the job takes only its own time.

Entry points of programs call :func:`sleep_while_waiting` first, because OpenMP reads its settings when
torch is imported. ``import xattn`` does not call it, because the process belongs to the program that
imports the library. The number of threads remains torch's own: sixteen sleeping threads on two cores take
little more time than two.

By default glibc returns large tensors to the kernel each time they are freed. On a CPU, convolutional
networks then spend most of their time in page faults. The CLI, the benchmarks and the data workers call
:func:`keep_memory` once; ``XATTN_ALLOCATOR=system`` opts out.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], int]]:
    """Hold back the first Ctrl-C (or SIGTERM) until the caller asks for it; a second one takes effect at
    once.

    A checkpoint taken in the middle of a step would not be a state of an uninterrupted run. The caller
    gets the number of the signal, or 0. A program's own SIGTERM handler is left in place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.append(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if number == signal.SIGINT or handler == signal.SIG_DFL:
            signal.signal(number, ask)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launch_rank() -> tuple[int, int]:
    """(count, rank) of the processes started by ``torchrun`` or ``accelerate launch``; this does not need
    torch."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_memory(threshold: int = 1 << 30) -> bool:
    """Raise glibc's mmap and trim thresholds to ``threshold`` bytes; return False if this has no effect."""
    import ctypes
    import platform

    if os.environ.get("XATTN_ALLOCATOR") == "system" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Older glibc refuses an mmap threshold above 32 MiB.
    mmap = mallopt(M_MMAP_THRESHOLD, threshold) or mallopt(M_MMAP_THRESHOLD, 1 << 25)
    trim = mallopt(M_TRIM_THRESHOLD, threshold)
    return bool(mmap and trim)


def sleep_while_waiting() -> None:
    """Set ``OMP_WAIT_POLICY`` to ``passive`` for this process and its children, unless it is already set.

    The OpenMP libraries of GNU, LLVM and Intel support this variable. ``GOMP_SPINCOUNT`` and
    ``KMP_BLOCKTIME`` take precedence.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
