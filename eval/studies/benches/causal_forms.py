"""Compares the causal forms of attention mechanisms with their bidirectional forms, on sequences.

    python -m xattn.eval.studies bench-causal --only hedgehog flow --tokens 16384

One layer with 6 heads of width 64 runs on one sequence. In each round all jobs run once, in turn.
Each ratio is causal over bidirectional time within a round; the median over the rounds is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from xattn.attention import create_mechanism, list_attention, mechanism_class
from xattn.attention.model.spec import format_mechanism
from xattn.eval.bench.attention import HEADS, WIDTH, check_arguments
from xattn.runtime.measuring import PASSES, forward_and_both, median_ratio, times
from xattn.runtime.process import keep_memory


def study(
    only: Sequence[str] = (), tokens: Sequence[int] = (4096, 16384), rounds: int = 5
) -> Iterator[str]:
    """Yield the lines of the table as they are measured.

    Args:
        only: mechanisms to measure; by default all that have a causal form.
    """
    only = only or [name for name in list_attention() if mechanism_class(name).entry.causal]
    check_arguments(only, tokens, rounds)
    for name in only:
        if not mechanism_class(name).entry.causal:
            raise ValueError(f"only: {name} has no causal form; leave it out")
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    yield (
        f"{device}, {torch.get_num_threads()} threads, {dtype}, {HEADS} heads of {WIDTH}, "
        f"raised allocator thresholds: {kept}"
    )
    yield (
        "\n| attention | tokens | forward ms | causal | ratio | forward + backward ms | causal | ratio |"
    )
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: |"
    for n in tokens:
        for name in only:
            for options in mechanism_class(name).entry.bench:
                cells = [format_mechanism(name, options), str(n)]
                yield f"| {' | '.join([*cells, *_measured(name, options, n, device, dtype, rounds)])} |"


def _measured(
    name: str, options: Mapping[str, Any], n: int, device: str, dtype: torch.dtype, rounds: int
) -> list[str]:
    torch.manual_seed(0)
    layer = create_mechanism(name, HEADS * WIDTH, HEADS, **options).to(device, dtype)
    q, k, v, g = torch.randn(4, 1, HEADS, n, WIDTH).to(device, dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    x = torch.randn(1, n, HEADS * WIDTH).to(device, dtype)
    made = {
        causal: forward_and_both(
            lambda *qkv, causal=causal: layer(*qkv, (n,), x=x, causal=causal), leaves, g
        )
        for causal in (False, True)
    }
    cells = []
    for turn in range(2):
        of = f"{format_mechanism(name, options)}, {n} tokens, {PASSES[turn]}"
        took = times({str(causal): pair[turn] for causal, pair in made.items()}, rounds, of=of)
        cells += [f"{1e3 * statistics.median(took[key]):.1f}" for key in ("False", "True")]
        cells.append(f"{median_ratio(took['True'], took['False']):.2f}x")
    return cells
