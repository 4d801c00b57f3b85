"""Measures how a mechanism's time and memory grow from the first number of tokens to each other one.

    python -m xattn.eval.studies bench-growth --only hip llsa --tokens 16384 65536

It times the forward pass of one layer on a square grid, without projections. Dense attention, which would
grow quadratically, is left out, so that long sequences can be measured on a CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from xattn.eval.bench.attention import DENSE, check_arguments, default_mechanisms, jobs
from xattn.runtime.measuring import median_ratio, peak_memory
from xattn.runtime.measuring import times as measure
from xattn.runtime.process import keep_memory


def study(
    only: Sequence[str] = (), tokens: Sequence[int] = (16384, 65536), rounds: int = 5
) -> Iterator[str]:
    """Yield the lines of the table; each round measures a mechanism at all numbers of tokens."""
    only = tuple(only) or default_mechanisms()
    check_arguments(only, tokens, rounds)
    keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield f"{device}, {torch.get_num_threads()} threads, {dtype}, forward"
    yield "\n| attention | tokens | ms | growth | peak MB | growth |"
    yield "| :-- | --: | --: | --: | --: | --: |"
    for name in only:
        made = {n: jobs([name], n, device, dtype, low_rank=False, lists=False)[0] for n in tokens}
        for row in [label for label in made[tokens[0]] if label != DENSE]:
            took = measure({str(n): made[n][row][0] for n in tokens}, rounds, of=row)
            memory = {n: peak_memory(made[n][row][0]) for n in tokens}
            for n in tokens:
                cells = [row, str(n), f"{1e3 * statistics.median(took[str(n)]):.1f}"]
                cells += [f"{median_ratio(took[str(n)], took[str(tokens[0])]):.2f}x"]
                cells += [f"{memory[n] / 1e6:.1f}", f"{memory[n] / memory[tokens[0]]:.2f}x"]
                yield f"| {' | '.join(cells)} |"
