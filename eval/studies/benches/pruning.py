"""Measures the gain of pruning tokens in a whole ViT (spatten), compared with the unpruned network.

    python -m xattn.eval.studies bench-pruning

Weights are random, so only the times and the change of the logits relative to their spread are
measured. Half of the patches are removed before block 3 of 12; by the count of operations, including
the importance scores, the gain can reach 1.60x.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
import tyro

from xattn.attention import converted_copy
from xattn.runtime.measuring import Job, median_ratio, operations, times
from xattn.runtime.process import keep_memory

MODEL = "vit_base_patch16_224"
OPTIONS = {"keep": 0.5, "first": 3, "last": 3}


@torch.inference_mode()
def study(
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    model: str = MODEL,
    options: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, Any]]] = OPTIONS,
) -> Iterator[str]:
    """Yield the lines of the table as they are measured; ``options`` are options of spatten."""
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dense = timm.create_model(model).eval().to(device)
    pruned = converted_copy(dense, "spatten", options=options)
    said = ", ".join(f"{key} {value}" for key, value in options.items())
    yield (
        f"{model} on {device}, {torch.get_num_threads()} threads, {said}; raised allocator "
        f"thresholds: {kept}"
    )
    yield "\n| batch | dense ms | pruned ms | gain | operations | change of logits | same class, % |"
    yield "| --: | --: | --: | --: | --: | --: | --: |"
    for batch in batches:
        side: Any = dense.patch_embed
        size = (batch, 3, *side.img_size)
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
        jobs: dict[str, Job] = {"dense": partial(dense, x), "pruned": partial(pruned, x)}
        took = times(jobs, rounds, warmup=2, of=f"batch {batch}")
        before, after = dense(x), pruned(x)
        change = (after - before).norm() / (before - before.mean(1, keepdim=True)).norm()
        same = (after.argmax(1) == before.argmax(1)).double().mean()
        ratio = operations(jobs["dense"]) / operations(jobs["pruned"])
        cells = [f"{1e3 * statistics.median(took[name]):.1f}" for name in jobs]
        cells += [f"{median_ratio(took['dense'], took['pruned']):.2f}x", f"{ratio:.2f}x"]
        yield f"| {batch} | {' | '.join(cells)} | {float(change):.3f} | {100 * float(same):.0f} |"
