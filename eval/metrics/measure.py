"""The functional form of the metrics: measure a batch of maps, with any callable as the model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xattn.eval import functional
from xattn.eval.annotations import Annotation
from xattn.eval.metrics.base import Column, Finish, PerturbationMetric, Request, Sample
from xattn.eval.metrics.board.cohort import ChunkPhotos, Cohort, Maps
from xattn.eval.metrics.board.table import OutcomeTable
from xattn.eval.metrics.scorer import MaskedScorer, PendingScore, micro_batch


def measure(
    metric: PerturbationMetric,
    f: Any,
    images: Tensor,
    maps: Tensor,
    targets: Tensor | int,
    *,
    score: str = "probability",
    normalization: str = "minmax",
    resize: str = "bilinear",
    max_forward_batch: int = 32,
    seed: int = 0,
    first: int = 0,
    is_mask: bool = False,
    explain: Callable[[Tensor, Tensor], Tensor] | None = None,
    explain_randomized: Callable[[int | str, Tensor, Tensor], Tensor] | None = None,
    annotations: Sequence[Annotation | None] | None = None,
) -> dict[Column, Tensor]:
    """Measure one metric. Returns values (B,) float64 per column, NaN if undefined or the map is invalid.

    Args:
        f: a backbone, or a function (b, 3, H, W) -> logits (b, K), whose softmax is scored.
        images: (B, 3, H, W) float in [0, 1]; ``annotations``: one per image, for metrics that need them.
        maps: (B, 1, h, w), or (B, 1, t, h, w) for clips: raw maps, or masks in [0, 1] if ``is_mask``.
        targets: the explained class: one for all images, or a LongTensor (B,).
        score: ``"probability"`` or ``"logit"``.
        normalization, resize: see :class:`~xattn.eval.Protocol`.
        seed: perturbations depend on it and on the position of the image, counted from ``first``.
        explain: a function (images, targets) -> raw maps (b, 1, h, w), for metrics that need new maps.
        explain_randomized: the same for randomised networks, a function (stage, images, targets) -> maps.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import create_metric, measure
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images, maps = torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64)
        >>> values = measure(create_metric("insertion-deletion"), net, images, maps, 3)
        >>> sorted(values)
        [Column(metric='deletion', level=None), Column(metric='insertion', level=None)]
    """
    batch, size, compared = len(images), images.shape[2:], False
    classes = _classes(targets, len(maps), batch)
    network = f if hasattr(f, "probabilities") else _Callable(f)
    metric = metric.for_axes(len(size)).for_network(network)
    scorer = MaskedScorer(network, micro_batch(max_forward_batch, batch), score=score)
    grey, valid = functional.saliency(
        maps, size, is_mask=is_mask, normalization=normalization, resize=resize
    )
    raw = functional.upsample(maps.detach().float().nan_to_num(), size, resize)
    undefined = torch.full((batch,), math.nan, dtype=torch.float64, device="cpu")
    values = {column: undefined.clone() for column in metric.columns}
    for part in torch.arange(batch, device="cpu").split(scorer.max_forward_batch):
        scores, _, _, logits = scorer.clean_classes(images[part], classes[part])
        seeds = [sample_seed(seed, first + i) for i in part.tolist()]
        tables = list(map(partial(OutcomeTable, scorer), images[part].float(), seeds, logits))
        cohort = _cohort(tables, classes[part], maps[part], explain, explain_randomized, resize)
        waiting = []
        for place, (i, p) in enumerate(zip(part.tolist(), scores.tolist(), strict=True)):
            target, table = int(classes[i]), tables[place]
            comparable = metric.can_compare(cohort.chunk_photos, place)
            compared |= comparable
            if not valid[i] or not comparable:
                continue
            sample = Sample(
                image=table.image,
                grey=grey[i],
                raw=raw[i],
                target=target,
                score=p,
                seed=table.seed,
                is_mask=is_mask,
                resize=resize,
                normalization=normalization,
                explain=explain and partial(_explain, explain, target),
                explain_randomized=explain_randomized
                and partial(_explain_at_stage, explain_randomized, target),
                annotation=None if annotations is None else annotations[i],
                table=table,
                beside=(cohort, place),
            )
            waiting.append((i, *_submitted(metric, sample, scorer)))
        scorer.flush()
        for i, finish, tickets in waiting:
            for column, value in finish_values(metric, finish, scores_of(tickets)).items():
                values[column][i] = value
        scorer.forget()
    if metric.photos_needed and not compared:
        warn_of_no_comparison(metric, scorer.max_forward_batch)
    return values


def warn_of_no_comparison(metric: PerturbationMetric, chunk: int) -> None:
    """Warn that no chunk of ``chunk`` photos contains what ``metric`` needs to compare maps."""
    names = ", ".join(column.key for column in metric.columns)
    warnings.warn(
        f"{names}: no photo has a value; give photos of which a chunk (max_forward_batch, here {chunk}) "
        f"contains {metric.photos_needed}",
        stacklevel=3,
    )


def _cohort(
    tables: list[OutcomeTable],
    classes: Tensor,
    maps: Tensor,
    explain: Callable[[Tensor, Tensor], Tensor] | None,
    explain_randomized: Callable[[int | str, Tensor, Tensor], Tensor] | None,
    resize: str,
) -> Cohort:
    """Return the maps that contrasts use for comparison in one batch. All photos of the batch are explained
    together again."""
    images = torch.stack([table.image for table in tables])
    for table, k in zip(tables, classes.tolist(), strict=True):
        table.wanted = (k,)

    def alone(images: Tensor, targets: Tensor) -> Tensor:
        if explain is None:
            raise ValueError("explain: None; this metric explains again; give the method")
        return explain(images, targets)

    def on_random(places: Sequence[int]) -> Maps:
        assert explain_randomized is not None
        return list(explain_randomized(-1, images, classes))

    return Cohort(
        ChunkPhotos(tables, classes.tolist()),
        list(maps),
        [list(range(len(tables)))],
        lambda places, targets: list(alone(images, targets)),
        None if explain_randomized is None else on_random,
        alone,
        resize,
    )


def finish_values(
    metric: PerturbationMetric, finish: Finish, scores: Mapping[str, Tensor]
) -> dict[Column, float]:
    """Return the values that ``finish`` computes from ``scores``.

    Raises:
        ValueError: if they are not a dict, or have a key that is not a column of the metric.
    """
    values = finish(scores)
    if not isinstance(values, Mapping) or not set(values) <= set(metric.columns):
        keys = values if isinstance(values, Mapping) else [values]
        got = ", ".join(getattr(key, "key", repr(key)) for key in keys)
        known = ", ".join(f"{tuple(column)}" for column in metric.columns)
        raise ValueError(
            f"metrics: {type(metric).__name__} returned {got}; return {{column: value}} for its columns, "
            f"{known}"
        )
    return {column: float(value) for column, value in values.items()}


def _classes(targets: Tensor | int, maps: int, images: int) -> Tensor:
    """Return the classes (B,) on the CPU. Raise a ValueError unless there is one map and one class per
    image."""
    if isinstance(targets, int):
        targets = torch.full((images,), targets, device="cpu")
    if maps != images or len(targets) != images:
        raise ValueError(
            f"maps, targets: got {maps} and {len(targets)} for {images} images; give one per image"
        )
    return targets.cpu()


def _submitted(
    metric: PerturbationMetric, sample: Sample, scorer: MaskedScorer
) -> tuple[Finish, dict[str, list[PendingScore]]]:
    tickets: dict[str, list[PendingScore]] = {}
    return submit_all(metric.measure(sample), scorer, sample.target, tickets), tickets


def submit_all(
    requests: Generator[Request, None, Finish],
    scorer: MaskedScorer,
    target: int,
    tickets: dict[str, list[PendingScore]],
) -> Finish:
    """Submit a metric's requests to ``scorer``, and collect the pending scores for each key in
    ``tickets``."""
    while True:
        try:
            request = next(requests)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        ticket = scorer.submit(request.image, target, request.shared, request.hit)
        tickets.setdefault(request.key, []).append(ticket)


def scores_of(tickets: dict[str, list[PendingScore]]) -> dict[str, Tensor]:
    """Convert resolved tickets to float64 scores (T,) for each key."""
    return {
        key: torch.tensor([t.score for t in row], dtype=torch.float64, device="cpu")
        for key, row in tickets.items()
    }


def sample_seed(seed: int, position: int) -> int:
    """Return the seed of an image's random perturbations, which is the same for all methods."""
    return (seed * 1_000_003 + position) % 2**63


class _Callable:
    """Gives a function the part of a backbone's interface that the scorer needs."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        self.logits = f

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(1)


def _explain(explain: Callable[[Tensor, Tensor], Tensor], target: int, images: Tensor) -> Tensor:
    return explain(images, torch.full((len(images),), target, device="cpu"))


def _explain_at_stage(
    explain: Callable[[int | str, Tensor, Tensor], Tensor],
    target: int,
    stage: int | str,
    images: Tensor,
) -> Tensor:
    return explain(stage, images, torch.full((len(images),), target, device="cpu"))
