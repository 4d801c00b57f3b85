"""What attention maps cost: rollout and relevance without N x N beside the same from stored maps.

    xattn bench maps --tokens 1025 4097

The stored side is what implementations of rollout do: softmax written out, the maps (B, H, N, N) of
every layer kept until the end. It multiplies one row only, too, which most do not, and so is faster
than they are. A ViT-S/16 (12 layers of 6 heads of 64) with random weights, one image.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xattn.eval.speed import Job, _seconds, median_ratio, times

MODEL, PATCH = "vit_small_patch16_224", 16
MOST_TIME, MOST_MEMORY = 1.5, 0.1  # of the stored side, from 4097 tokens on


def bench(tokens: Sequence[int] = (1025, 4097), rounds: int = 3) -> Iterator[str]:
    """The lines of the table, as they are measured.

    Raises:
        ValueError: a number of tokens that is not 1 + a square.
    """
    from xattn.backbone import load_backbone
    from xattn.explainers import create_explainer
    from xattn.runtime.allocator import keep_memory

    wrong = [n for n in tokens if n < 2 or math.isqrt(n - 1) ** 2 != n - 1]
    if wrong or not tokens:
        raise ValueError(f"tokens: got {wrong or tokens}; give 1 + a square, such as 1025 or 4097")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}; give at least 1")
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


def stored_bytes(backbone: Any, tokens: int) -> int:
    """Bytes of the maps of all layers, for one image."""
    blocks = backbone.model.blocks
    return len(blocks) * blocks[0].attn.num_heads * tokens**2 * backbone.mean.element_size()


def _row(name: str, tokens: int, jobs: dict[str, Job], need: int, rounds: int) -> str:
    cells = [name, str(tokens)]
    if need > 0.9 * available_memory():
        peaks: list[int] = []
        seconds = _seconds(lambda: peaks.append(peak_memory(jobs["ours"])))  # one run: it is long
        cells += [f"{seconds:.2f}", f"{peaks[0] / 1e6:.0f}"]
        cells += ["", f"{need / 1e6:.0f} needed", *[""] * 4]
        return f"| {' | '.join(cells)} |"
    difference = float((jobs["ours"]() - jobs["stored"]()).abs().max())  # also warms up
    took = times(jobs, rounds, warmup=0)
    peak = {job: peak_memory(run) for job, run in jobs.items()}
    time = median_ratio(took["ours"], took["stored"])
    memory = peak["ours"] / peak["stored"]
    for job in jobs:
        cells += [f"{statistics.median(took[job]):.2f}", f"{peak[job] / 1e6:.0f}"]
    holds = "yes" if time <= MOST_TIME and memory <= MOST_MEMORY else "no"
    cells += [f"{time:.2f}x", f"1/{1 / memory:.1f}", f"{difference:.1e}"]
    return f"| {' | '.join([*cells, holds if tokens >= 4097 else ''])} |"


def peak_memory(job: Callable[[], Any]) -> int:
    """Bytes that tensors take at most, beyond those that live before ``job``.

    Counted in the allocator, so that what custom operators and the backward pass allocate is in.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints lines of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as probe:
        job()
    live = peak = 0
    events = probe.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda c: c[0]):
        live += change
        peak = max(peak, live)
    return peak


def available_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not tell
        return 8 << 30


# ---------------------------------------------------------------------- the stored side


def stored_maps(backbone: Any, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the softmax (B, H, N, N) of every layer, written out and kept."""
    maps: list[Tensor] = []
    layers = [block.attn for block in backbone.model.blocks]
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
def stored_rollout(backbone: Any, images: Tensor, target: int) -> Tensor:
    _, maps = stored_maps(backbone, images)
    r = _class_row(maps)
    for a in reversed(maps):
        r = 0.5 * r + 0.5 * (r @ a.mean(1))
    return _as_map(backbone, r, images)


def stored_relevance(backbone: Any, images: Tensor, target: int) -> Tensor:
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


def _as_map(backbone: Any, row: Tensor, images: Tensor) -> Tensor:
    return row[..., 1:].unflatten(-1, backbone.grid(*images.shape[-2:]))
