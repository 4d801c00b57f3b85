"""Measures the cost of rollout and relevance without N x N matrices, compared with stored attention maps.

    python -m xattn.eval.studies bench-maps --tokens 1025 4097

The stored version works as implementations of rollout usually do: it computes the softmax explicitly and
keeps the maps (B, H, N, N) of every layer until the end. Like ours, it multiplies only one row, so it is
faster than most implementations. The network is a ViT-S/16 (12 layers, 6 heads of width 64) with random
weights; there is one image.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone, load_backbone
from xattn.explainers import create_explainer
from xattn.runtime.measuring import (
    Job,
    keep_rounds,
    median_ratio,
    peak_memory,
    seconds_of,
    times,
)
from xattn.runtime.process import keep_memory

MODEL, PATCH = "vit_small_patch16_224", 16
MOST_TIME, MOST_MEMORY = 1.5, 0.1  # largest ratios to the stored version, from 4097 tokens on


def study(tokens: Sequence[int] = (1025, 4097), rounds: int = 3) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    wrong = [n for n in tokens if n < 2 or math.isqrt(n - 1) ** 2 != n - 1]
    if wrong or not tokens:
        raise ValueError(f"tokens: got {wrong or tokens}; give 1 + a square, such as 1025 or 4097")
    kept = keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"{MODEL} on {device}, {torch.get_num_threads()} threads, raised allocator thresholds: {kept}"
    yield (
        "\n| map | tokens | seconds | peak MB | stored: seconds | peak MB | time ratio "
        "| memory ratio | difference | holds |"
    )
    yield "| :-- | --: | --: | --: | --: | --: | --: | --: | --: | :-- |"
    for n in tokens:
        side = PATCH * math.isqrt(n - 1)
        backbone = load_backbone(MODEL, weights=None, device=device, input_size=side)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(1, 3, side, side, generator=generator).to(device)
        for name, stored in (("rollout", stored_rollout), ("generic_relevance", stored_relevance)):
            jobs: dict[str, Job] = {
                "ours": partial(create_explainer(name, backbone).attribute, images, 3),
                "stored": partial(stored, backbone, images, 3),
            }
            copies = 1 if name == "rollout" else 3  # A, dA, and what autograd holds meanwhile
            need = copies * stored_bytes(backbone, n)
            yield _row(name, n, jobs, need, rounds)


def stored_bytes(backbone: Backbone, tokens: int) -> int:
    """The size in bytes of all layers' maps for one image."""
    blocks: Any = backbone.model.blocks
    return len(blocks) * blocks[0].attn.num_heads * tokens**2 * backbone.mean.element_size()


def _row(name: str, tokens: int, jobs: dict[str, Job], need: int, rounds: int) -> str:
    cells = [name, str(tokens)]
    if need > 0.9 * available_memory():
        peaks: list[int] = []
        seconds = seconds_of(lambda: peaks.append(peak_memory(jobs["ours"])))  # one run: it is long
        keep_rounds(f"{name}, {tokens} tokens", "ours", [seconds])
        keep_rounds(f"{name}, {tokens} tokens", "ours", peaks, "peak bytes")
        cells += [f"{seconds:.2f}", f"{peaks[0] / 1e6:.0f}"]
        cells += ["", f"{need / 1e6:.0f} needed", *[""] * 4]
        return f"| {' | '.join(cells)} |"
    difference = float((jobs["ours"]() - jobs["stored"]()).abs().max())  # also warms up
    took = times(jobs, rounds, warmup=0, of=f"{name}, {tokens} tokens")
    peak = {job: peak_memory(run) for job, run in jobs.items()}
    for job, most in peak.items():
        keep_rounds(f"{name}, {tokens} tokens", job, [most], "peak bytes")
    time = median_ratio(took["ours"], took["stored"])
    memory = peak["ours"] / peak["stored"]
    for job in jobs:
        cells += [f"{statistics.median(took[job]):.2f}", f"{peak[job] / 1e6:.0f}"]
    holds = "yes" if time <= MOST_TIME and memory <= MOST_MEMORY else "no"
    cells += [f"{time:.2f}x", f"1/{1 / memory:.1f}", f"{difference:.1e}"]
    return f"| {' | '.join([*cells, holds if tokens >= 4097 else ''])} |"


# ---------------------------------------------------------------------- the stored version


def stored_maps(backbone: Backbone, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the explicit softmax (B, H, N, N) of every layer."""
    maps: list[Tensor] = []
    blocks: Any = backbone.model.blocks
    layers = [block.attn for block in blocks]
    flags = [layer.fused_attn for layer in layers]
    handles = [
        layer.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.fused_attn = False
        return backbone.logits(images), maps
    finally:
        for layer, flag, handle in zip(layers, flags, handles, strict=True):
            layer.fused_attn = flag
            handle.remove()


@torch.no_grad()
def stored_rollout(backbone: Backbone, images: Tensor, target: int) -> Tensor:
    _, maps = stored_maps(backbone, images)
    r = _class_row(maps)
    for a in reversed(maps):
        r = 0.5 * r + 0.5 * (r @ a.mean(1))
    return _as_map(backbone, r, images)


def stored_relevance(backbone: Backbone, images: Tensor, target: int) -> Tensor:
    logits, maps = stored_maps(backbone, images.clone().requires_grad_())
    grads = torch.autograd.grad(logits[:, target].sum(), maps)
    with torch.no_grad():
        r = _class_row(maps)
        for a, grad in reversed(list(zip(maps, grads, strict=True))):
            r = r + r @ (a * grad).clamp(min=0).mean(1)
    return _as_map(backbone, r, images)


def _class_row(maps: Sequence[Tensor]) -> Tensor:
    row = maps[0].new_zeros(maps[0].shape[0], 1, maps[0].shape[-1])
    row[..., 0] = 1
    return row


def _as_map(backbone: Backbone, row: Tensor, images: Tensor) -> Tensor:
    return row[..., 1:].unflatten(-1, backbone.grid(*images.shape[-2:]))


def available_memory() -> int:
    """Bytes that a process can still use; on Linux, this includes memory that only caches files."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"MemAvailable: *(\d+) kB", text)
    return 1024 * int(found[1]) if found else 8 << 30
