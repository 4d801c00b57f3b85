"""Measures the cost of each relevance composite, compared with a forward and a forward-backward pass.

    python -m xattn.eval.studies bench-relevance --rounds 9

The whole call of an explainer is measured in processor time, including its checks. The plain passes are the
network's own, with the gradient of a class's logits with respect to the normalised image. Weights are
random and need no gradient.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from xattn.backbone import Backbone, load_backbone
from xattn.explainers import create_explainer
from xattn.explainers.relevance.rules import COMPOSITES
from xattn.runtime.measuring import (
    Job,
    keep_rounds,
    median_ratio,
    peak_memory,
    processor_clock,
    times,
)
from xattn.runtime.process import keep_memory

NETWORKS = (
    "vit_tiny_patch16_224",
    "tf_efficientnet_lite0",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "resnet18",
)
SHOWN = ("gradient", "libragrad", "attn_lrp", "res_lrp", "epsilon", "gamma", "vit")
MOST = {
    "gradient": (1.1, 1.1),
    "libragrad": (1.1, 1.1),
    "attn_lrp": (1.1, 1.1),
    "res_lrp": (1.25, 1.3),
    "epsilon": (1.25, 1.3),
}
"""Goals, as multiples of the time and the memory of a forward and backward pass. The composites
without a goal run convolutions several times."""


def study(
    backbones: Sequence[str] = NETWORKS,
    composites: Sequence[str] = SHOWN,
    batch: int = 8,
    rounds: int = 9,
) -> Iterator[str]:
    """Yield the lines of the table, network by network."""
    unknown = [name for name in composites if name not in COMPOSITES]
    if unknown or batch < 1 or rounds < 1:
        raise ValueError(
            f"composites, batch, rounds: got {unknown or (batch, rounds)}; give names of "
            f"{', '.join(COMPOSITES)}, and at least 1 of the others"
        )
    keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"{device}, {torch.get_num_threads()} threads, batch {batch}, {rounds} rounds"
    yield "\n| network | job | seconds | of forward | of both | peak MB | of both | holds |"
    yield "| :-- | :-- | --: | --: | --: | --: | --: | :-- |"
    for name in backbones:
        backbone = load_backbone(name, weights=None, device=device)
        yield from _rows(backbone, composites, batch, rounds)


def _rows(backbone: Backbone, composites: Sequence[str], batch: int, rounds: int) -> Iterator[str]:
    size = backbone.preprocessing.input_size
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    images = images.to(backbone.device)
    jobs = plain_passes(backbone, images)
    forward, both = jobs
    for name in composites:
        explainer = create_explainer("lrp", backbone, composite=name)
        jobs[name] = partial(explainer.attribute, images, 3)
    of = f"{backbone.name}, batch {batch}"
    took = times(jobs, rounds, clock=processor_clock(), of=of)
    peak = {job: peak_memory(run) for job, run in jobs.items()}
    for job in jobs:
        keep_rounds(of, job, [peak[job]], "peak bytes")
        time, memory = median_ratio(took[job], took[both]), peak[job] / peak[both]
        holds = ""
        if job in MOST:
            holds = "yes" if time <= MOST[job][0] and memory <= MOST[job][1] else "no"
        cells = [backbone.name, job, f"{statistics.median(took[job]):.3f}"]
        cells += [f"{median_ratio(took[job], took[forward]):.2f}x", f"{time:.2f}x"]
        yield f"| {' | '.join([*cells, f'{peak[job] / 1e6:.0f}', f'{memory:.2f}x', holds])} |"


def plain_passes(backbone: Backbone, images: Tensor) -> dict[str, Job]:
    """A forward pass, and one followed by the backward pass from class 3's logits to the image."""
    backbone.requires_grad_(False)
    x = backbone.normalize(images)

    @torch.no_grad()
    def forward() -> Tensor:
        return backbone.logits_normalized(x)

    def both() -> Tensor:
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(backbone.logits_normalized(leaf)[:, 3].sum(), leaf)
        return gradient

    return {"forward": forward, "forward + backward": both}
