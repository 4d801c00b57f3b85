"""Measures how long the command line takes to answer, each time in a new process.

    python -m xattn.eval.studies bench-startup

Each command runs once per round, in turn, in ten rounds after one that warms the disk cache. Times include
the start of the interpreter, which is the first row. Other programs affect processor seconds least.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from xattn.runtime.measuring import keep_rounds

# The command as typed, the arguments of the program, and the bound in seconds.
RUNS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("python -c pass", ("-c", "pass"), None),
    ("import xattn", ("-c", "import xattn"), 0.3),
    ("xattn --version", ("-m", "xattn", "--version"), None),
    ("xattn --help", ("-m", "xattn", "--help"), None),
    ("xattn explain --help", ("-m", "xattn", "explain", "--help"), None),
    ("xattn expalin nope.jpg", ("-m", "xattn", "expalin", "nope.jpg"), None),
    ("xattn explain nope.jpg", ("-m", "xattn", "explain", "nope.jpg"), 0.6),
)


class Took(NamedTuple):
    """The seconds of one run: wall-clock and processor time."""

    wall: float
    processor: float


def study(rounds: int = 10, typed: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines of the table; ``typed`` selects rows, by default all."""
    runs = [run for run in RUNS if not typed or run[0] in typed]
    took: dict[str, list[Took]] = {run[0]: [] for run in runs}
    with tempfile.TemporaryDirectory() as empty:
        for turn in range(1 + rounds):
            for name, words, _ in runs:
                found = seconds_of([sys.executable, *words], empty)
                if turn:
                    took[name].append(found)
    yield f"| typed | seconds, median of {rounds} | processor seconds | bound |"
    yield "| :-- | --: | --: | --: |"
    for name, _, bound in runs:
        columns = list(zip(*took[name], strict=True))
        for kind, column in zip(Took._fields, columns, strict=True):
            keep_rounds(name, kind, column)
        wall, processor = (statistics.median(column) for column in columns)
        limit = "" if bound is None else f"{bound}{' (missed)' * (wall >= bound)}"
        yield f"| `{name}` | {wall:.2f} | {processor:.2f} | {limit} |"


def seconds_of(words: Sequence[str], folder: str, check: bool = False, **environment: str) -> Took:
    """The time of a program that runs in ``folder``, in its own process, with extra environment variables.

    With ``check``, a failure of the program is an error."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, check=check
    )
    wall, after = time.perf_counter() - started, os.times()
    spent = after.children_user + after.children_system
    return Took(wall, spent - before.children_user - before.children_system)
