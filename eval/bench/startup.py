"""How long the command line takes to answer, each time in a new process.

    xattn bench startup

The median of ten runs of each, in turn, after one that warms the disk cache. Times hold the start of the
interpreter itself, the first row. A bound that is missed is said beside the time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xattn.eval.bench.timing import times

# What is typed, the program, and the bound in seconds.
RUNS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("python -c pass", ("-c", "pass"), None),
    ("import xattn", ("-c", "import xattn"), 0.3),
    ("xattn --version", ("-m", "xattn.cli", "--version"), None),
    ("xattn --help", ("-m", "xattn.cli", "--help"), None),
    ("xattn explain --help", ("-m", "xattn.cli", "explain", "--help"), None),
    ("xattn expalin nope.jpg", ("-m", "xattn.cli", "expalin", "nope.jpg"), None),
    ("xattn explain nope.jpg", ("-m", "xattn.cli", "explain", "nope.jpg"), 0.6),
    ("xattn list", ("-m", "xattn.cli", "list"), None),
)


def bench(rounds: int = 10, runs: tuple[str, ...] = ()) -> Iterator[str]:
    """The lines of the table; ``runs`` takes rows by what is typed, by default all."""
    chosen = [run for run in RUNS if not runs or run[0] in runs]
    with tempfile.TemporaryDirectory() as empty:
        jobs = {typed: _Program(words, Path(empty)) for typed, words, _ in chosen}
        took = times(jobs, rounds)
    yield f"| typed | seconds, median of {rounds} | bound |"
    yield "| :-- | --: | --: |"
    for typed, _, bound in chosen:
        seconds = statistics.median(took[typed])
        missed = " (missed)" if bound is not None and seconds >= bound else ""
        yield f"| `{typed}` | {seconds:.2f}{missed} | {'' if bound is None else bound} |"


class _Program:
    """A program in a new process and an empty folder."""

    def __init__(self, words: tuple[str, ...], folder: Path) -> None:
        self.words, self.folder = [sys.executable, *words], folder

    def __call__(self) -> None:
        subprocess.run(self.words, cwd=self.folder, capture_output=True, check=False)
