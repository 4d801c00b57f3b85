"""Estimates the cost of an evaluation before it starts: the number of forward passes of each method, and
the total time.

The number of passes is an upper bound, since equal perturbed images are scored only once. Passes that all
methods share are counted once: those for the table of outcomes, and those on images that do not depend on
the map. The estimated time is the number of passes times the measured time per pass, plus the time in which
the metrics make their images, which is measured on the first image. A gradient counts as two more passes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.eval.interfaces import Classifier, Explainer, ExplainerFacts, ScoredModel
from xattn.eval.metrics.base import PerturbationMetric, Sample
from xattn.eval.metrics.board.cohort import ChunkPhotos, Cohort, Maps, Mosaic
from xattn.eval.metrics.board.table import OutcomeTable
from xattn.eval.metrics.scorer import micro_batch


@dataclass(frozen=True)
class Plan:
    """Estimated forward passes and seconds of an evaluation.

    Attributes:
        images: number of images.
        explaining: the number of passes for explanations, by method.
        scoring: the number of passes for metrics, by method.
        table_passes: the number of passes that all methods share, such as those for tables of outcomes.
        seconds_per_pass: seconds per image in a full micro-batch.
        seconds: the estimated total time.
    """

    images: int
    explaining: dict[str, int]
    scoring: dict[str, int]
    seconds_per_pass: float
    seconds: float
    table_passes: int = 0

    @property
    def passes(self) -> int:
        """The total number of passes, including a clean pass for every image."""
        explained, scored = sum(self.explaining.values()), sum(self.scoring.values())
        return self.images + explained + scored + self.table_passes

    def __str__(self) -> str:
        costly = sorted(self.explaining, key=lambda name: -self.explaining[name])[:3]
        named = ", ".join(f"{name} {self.explaining[name]:,}" for name in costly)
        return (
            f"plan: at most {self.passes:,} forward passes for {len(self.explaining)} methods on "
            f"{self.images} images: {sum(self.explaining.values()):,} explain ({named}), "
            f"{sum(self.scoring.values()) + self.table_passes:,} score; "
            f"{1000 * self.seconds_per_pass:.1f} ms per pass, about {duration(self.seconds)}"
        )


def plan(
    backbone: Classifier,
    explainers: Mapping[str, Explainer],
    metrics: Sequence[PerturbationMetric],
    image: Tensor,
    count: int,
    *,
    max_forward_batch: int = 32,
    again_limit: int | None = 2,
    processes: int = 1,
    tabled: bool = False,
) -> Plan:
    """Estimate the cost for ``count`` images from one ``image`` (3, H, W) or clip (3, T, H, W).

    The passes of each metric are counted on this image, and one micro-batch is timed.

    Args:
        count: the number of images to evaluate.
        again_limit: see :func:`xattn.eval.evaluate`.
        processes: the number of processes that share the work.
        tabled: whether the tables of outcomes already exist.
    """
    size = micro_batch(max_forward_batch, count)
    batch = image.to(backbone.device).expand(size, *image.shape).contiguous()
    seconds_per_pass = _seconds_per_pass(backbone, batch)
    requests, again, making, shared = 0, 0, 0.0, set[bytes]()
    counter = _Counter(backbone)
    table = OutcomeTable(counter, image.to(backbone.device), 0, torch.zeros(2, device="cpu"))
    for metric in metrics:
        started = time.perf_counter()
        scored, explained = _dry_run(metric.for_network(backbone), table)
        making += time.perf_counter() - started
        same = {*scored} - {b""}
        if same:  # only images that a second, different map also leads to do not depend on the map
            same &= {*_dry_run(metric.for_network(backbone), table, turned=True)[0]}
        shared |= same
        requests, again = requests + sum(s not in same for s in scored), again + explained
    outcomes = (len(shared) + (0 if tabled else counter.asked)) * count
    explaining, scoring, seconds = {}, {}, (count + outcomes) * seconds_per_pass
    for name, explainer in explainers.items():
        facts = ExplainerFacts.of(explainer)
        forwards = facts.forwards or 0
        repeated = count if not facts.perturbs or again_limit is None else min(count, again_limit)
        explaining[name] = forwards * (count + again * repeated)
        scoring[name] = requests * count
        passes = scoring[name] + explaining[name] * (1 if facts.perturbs or not forwards else 3)
        seconds += passes * seconds_per_pass + making * count
    return Plan(count, explaining, scoring, seconds_per_pass, seconds / processes, outcomes)


class _SinglePhoto(ChunkPhotos):
    """A chunk of one photo, which replaces all other photos that a contrast needs."""

    def next_photo(self, i: int) -> int | None:
        return i

    def mosaic(self, i: int, n: int, confidence: float, halved: bool) -> Mosaic | None:
        return Mosaic(n, (0,) * n**2, self.tables[i])


class _Counter:
    """A scorer that only counts the requested passes and returns zeros."""

    max_forward_batch, score = 1000, "probability"

    def __init__(self, backbone: ScoredModel) -> None:
        self.backbone, self.asked = backbone, 0

    def score_logits(self, inputs: Tensor, function: Any = None) -> Tensor:
        self.asked += len(inputs)
        return torch.zeros(len(inputs), 2, device="cpu")


def _seconds_per_pass(backbone: ScoredModel, batch: Tensor) -> float:
    """Seconds per image in the second of two passes; the first pass is a warm-up."""
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            backbone.logits(batch).cpu()
        took = time.perf_counter() - started
    return took / len(batch)


def _dry_run(
    metric: PerturbationMetric, table: OutcomeTable, turned: bool = False
) -> tuple[list[bytes], int]:
    """Run a metric on an example map without a network.

    The example map has its peak in the centre, or, with ``turned``, its minimum there.

    Returns:
        A hash of each image that the metric wants scored, or ``b""`` if the image cannot be shared with
        other methods; and the number of images that it wants explained again.
    """
    image = table.image
    if metric.needs_annotation:
        return [], 0
    y, x = (torch.linspace(-1, 1, side, device="cpu") for side in image.shape[-2:])
    grey = torch.exp(-2 * (y[:, None] ** 2 + x**2))[None].to(image)
    grey = 1 - grey if turned else grey
    grey = grey.expand(1, *image.shape[1:]).contiguous()
    explained = [0]

    def explain(images: Tensor) -> Tensor:
        explained[0] += len(images)
        return grey.expand(len(images), *grey.shape) * images.mean(1, keepdim=True)

    def alone(images: Tensor, targets: Tensor) -> Tensor:
        return explain(images)

    def again(places: Sequence[int], targets: Tensor) -> Maps:
        return list(explain(image[None]))

    def again_random(places: Sequence[int]) -> Maps:
        return list(explain(image[None]))

    sample = Sample(
        image=image,
        grey=grey,
        raw=grey,
        target=0,
        score=0.5,
        explain=explain,
        explain_randomized=lambda stage, images: explain(images),
        table=table,
        beside=(Cohort(_SinglePhoto([table], [0]), [grey], [[0]], again, again_random, alone), 0),
    )
    hashes = [_hash(r.image) if r.shared else b"" for r in metric.measure(sample)]
    return hashes, explained[0]


def _hash(image: Tensor) -> bytes:
    return hashlib.sha256(image.detach().cpu().contiguous().numpy().data).digest()


def duration(seconds: float) -> str:
    """A number of seconds as text in s, min or h, such as "12 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
