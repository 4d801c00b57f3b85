"""Let the threads of a network sleep while they wait for each other: by default they spin.

torch shares an operation out to the threads of OpenMP, and each that is done first waits in a loop for the
others, ready for the next operation. Where another program holds the core of a thread that is awaited, the
others burn its whole time slice: a job beside three busy programs on two cores takes about five times the
processor time, and keeps the other programs waiting as long. Asleep, it takes that of one thread.

Entry points of programs call this first, since OpenMP reads its settings when torch is imported.
``import xattn`` does not: the process belongs to the program that imports a library. The number of threads
stays torch's own: sixteen that sleep on two cores take little more than two.
"""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Set ``OMP_WAIT_POLICY`` to ``passive`` for this process and those it starts, unless it is set.

    GNU's, LLVM's and Intel's OpenMP heed it. ``GOMP_SPINCOUNT`` and ``KMP_BLOCKTIME`` go before it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
