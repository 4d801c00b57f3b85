"""Measures how other programs affect the demo: ``python -m xattn.eval.studies bench-load``.

The demo runs first on a machine that should be idle, then beside busy loops, one more than there are
cores. Its processor time should stay the same, because on a shared machine it takes longer but does
no more work. The second row uses OpenMP's default, in which waiting threads spin
(``xattn.runtime.process``).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from xattn.eval.studies.benches.startup import Took, seconds_of
from xattn.runtime.measuring import keep_rounds

EPOCHS = 2  # instead of the demo's 40; its other parts are unchanged
BOUND = 1.5  # largest ratio of processor time with the loops to that without
# The defaults of GNU's and LLVM's OpenMP.
ROWS: dict[str, dict[str, str]] = {
    "asleep, as xattn sets it": {},
    "spinning, as OpenMP does": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
}


def study(rounds: int = 3) -> Iterator[str]:
    """Yield the lines of the table."""
    loops = (os.cpu_count() or 1) + 1
    heads = [f"{kind}, {where}" for where in ("alone", "busy") for kind in ("s", "processor s")]
    yield f"busy: beside {loops} busy loops on {loops - 1} cores; medians of {rounds}"
    yield f"| threads wait | {' | '.join(heads)} | ratio of processor s | bound |"
    yield "| :-- | --: | --: | --: | --: | --: | --: |"
    for name, environment in ROWS.items():
        alone, beside = [], []
        for _ in range(rounds):
            alone.append(_demo(environment))
            with busy(loops):
                beside.append(_demo(environment))
        pairs = zip(alone, beside, strict=True)
        ratio = statistics.median(b.processor / a.processor for a, b in pairs)
        columns = [column for runs in (alone, beside) for column in zip(*runs, strict=True)]
        for kind, column in zip(heads, columns, strict=True):
            keep_rounds(name, kind, column)
        medians = " | ".join(f"{statistics.median(column):.0f}" for column in columns)
        limit = f"{BOUND}{' (missed)' * (ratio > BOUND)}" if not environment else ""
        yield f"| {name} | {medians} | {ratio:.2f} | {limit} |"


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run ``loops`` busy processes until the block ends."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _demo(environment: dict[str, str]) -> Took:
    words = [sys.executable, "-m", "xattn.app.demo", "--epochs", str(EPOCHS)]
    with tempfile.TemporaryDirectory() as empty:
        return seconds_of(words, empty, check=True, **environment)
