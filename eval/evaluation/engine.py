"""Measures the explanations of many methods on many images with one bounded stream of forward passes.

    images -> clean pass (score, class) -> maps of each method -> grey masks -> metrics -> scorer

Images are processed in chunks of ``max_forward_batch``, or in one smaller chunk if there are fewer images.
Clean passes, explanations and perturbed passes all use this batch size (:func:`micro_batch`). Under
``torchrun``, each of n processes handles every n-th chunk, and all of them return the results for all
images. Finished work is stored at once (:mod:`~xattn.eval.evaluation.store`), so that a killed run can be
resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone
from xattn.backbone.scored import BackboneView, Scored, is_score, scored
from xattn.eval.annotations import Annotations
from xattn.eval.evaluation.evaluation_run import EvaluationRun
from xattn.eval.evaluation.facts import BoardState, Evaluation, run_facts
from xattn.eval.evaluation.map_maker import Randomized
from xattn.eval.evaluation.results import Results, collect
from xattn.eval.evaluation.store import Store
from xattn.eval.evaluation.stream import ImageStream, Item
from xattn.eval.interfaces import Classifier, check_classes
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.metrics.measure import warn_of_no_comparison
from xattn.eval.metrics.registry import create_metric, group_name, own_infos
from xattn.eval.metrics.scorer import MaskedScorer, micro_batch
from xattn.eval.protocol import Protocol, score_of
from xattn.explainers import Explainer
from xattn.explainers.adapters import as_explainers
from xattn.photos.images import MAX_PIXELS
from xattn.runtime.distributed import fail_together, gather, processes

Classes = int | str | Sequence[int | str] | None


def evaluate(
    backbone: Classifier,
    explainers: Mapping[str, Any],
    images: Any,
    *,
    metrics: str | PerturbationMetric | Sequence[str | PerturbationMetric] = ("masking",),
    levels: Sequence[float] | None = None,
    max_forward_batch: int = 32,
    view: str | None = None,
    seed: int | None = None,
    protocol: Protocol | None = None,
    progress: bool = True,
    classes: Classes = None,
    target: Any = None,
    max_pixels: int | None = MAX_PIXELS,
    limit: int | None = None,
    annotations: Annotations | None = None,
    randomized: Randomized | None = None,
    again_limit: int | None = 2,
    state: str | Path | None = None,
    kept_maps: int | BoardState = 0,
) -> Results:
    """Measure all metrics for all explainers on the same images; AD, IC, ADD and AG are the default.

    Args:
        backbone: a :class:`xattn.Backbone`, which computes all scores.
        explainers: maps row names to explainers, names from ``xattn list``, trained heads, or anything else
            that :mod:`xattn.explainers.adapters` accepts, which is first tried on a few images.
        images: a photo, folder or list file; a list of paths, PIL images or arrays (H, W, 3); or float
            tensors (3, H, W) or (B, 3, H, W) in [0, 1] at the model's input size, or a loader of them.
        metrics: names of metric groups (:data:`xattn.eval.metrics.GROUPS`), or metrics, including your own.
        protocol: its ``class_policy`` is replaced to match ``classes``, and its ``score`` is set to suit
            the backbone's task unless it is ``"logit"``.
        levels, view, seed: override the protocol, whose defaults are (1.0, 0.5, 0.15), ``"crop"`` and 0.
        max_forward_batch: images per forward pass and per explanation batch. If it is a multiple of 4, the
            results are bit-equal whatever else is scored in the same run. With fewer images than this, the
            passes are smaller, and runs are bit-equal if they have the same number of images.
        classes: the classes to explain instead of the predicted ones: one class for all images, or one per
            image, including unreadable images. A class is given by its index or name.
        target: another name for ``classes``; or any number computed from the network's output, as in
            :func:`xattn.explain`, for which new explainers are made.
        max_pixels: photos with more pixels are skipped, since they may be decompression bombs.
        limit: use at most this many images, see :func:`~xattn.photos.sources.limit_photos`.
        annotations: the positions of objects, see :func:`xattn.eval.load_annotations`.
        randomized: for each method, a function (stage, images, targets) -> maps that runs it on a network
            with randomised weights, see :class:`xattn.eval.sanity.Cascade`.
        again_limit: the number of images on which to measure metrics that need further explanations, if the
            explainer runs many perturbed passes; None for all images.
        state: an SQLite file for finished work. A run with the same arguments resumes from it. The new run
            may have more images, provided that the earlier one had at least ``max_forward_batch`` images.
        kept_maps: ``state`` keeps the raw maps and top classes of this many images, counted from the first.
            If an earlier run did not keep them, the images are explained again but not measured again.

    Raises:
        ValueError: no image could be read, an explainer returns a wrong shape or fails on all of the first
            images, a class or metric is unknown, or ``state`` belongs to another run.
        OSError: the path ``images`` does not exist, or ``state`` cannot be written.

    Example:
        >>> import torch, xattn
        >>> from xattn import evaluate
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> images = torch.rand(3, 3, 64, 64)
        >>> methods = {"gradcam": "gradcam", "random": "random"}
        >>> results = evaluate(net, methods, images, progress=False)
        >>> sorted(results.methods), results.rows()[0].metric
        (['gradcam', 'random'], 'AD')
    """
    if not explainers:
        raise ValueError("explainers: got none; give {name: explainer}")
    explainers = as_explainers(explainers, backbone, max_forward_batch)
    backbone, explainers, classes = _for_target(backbone, explainers, classes, target)
    given = {"levels": levels, "view": view, "seed": seed}
    protocol = _settled(protocol or Protocol(), backbone, classes is not None, given)
    chosen = (protocol.view, max_pixels, limit, protocol.seed)
    stream = ImageStream(images, backbone.preprocessing, *chosen)
    protocol = _of_stream(protocol, stream)
    evaluation = Evaluation(
        backbone,
        explainers,
        protocol,
        create_metrics(metrics, protocol, backbone.preprocessing.mean, backbone),
        annotations,
        randomized or {},
        again_limit,
        kept_maps if state is not None else 0,
    )
    _check_needs(evaluation, stream, randomized)
    wanted = _wanted_classes(backbone, classes, stream.length)
    return _run(evaluation, stream, wanted, state, max_forward_batch, progress)


def _for_target(
    backbone: Classifier, explainers: Mapping[str, Explainer], classes: Classes, target: Any
) -> tuple[Any, Mapping[str, Explainer], Classes]:
    """The backbone, explainers and classes to use for ``target``; without a target, they are unchanged."""
    if classes is not None and target is not None:
        raise ValueError("target: got both target and classes; give one of them")
    if target is None or not isinstance(backbone, Backbone) or not is_score(backbone, target):
        check_classes(backbone)
        named = target.tolist() if isinstance(target, Tensor) else target
        return backbone, explainers, classes if target is None else named
    view = scored(backbone, target)
    return view, explainers_for(view, explainers), None


def explainers_for(view: BackboneView, explainers: Mapping[str, Explainer]) -> dict[str, Explainer]:
    """Make explainers that explain ``view`` from explainers that explain its backbone."""
    return {
        name: e if e.backbone is view else e.with_target(view) for name, e in explainers.items()
    }


def _of_stream(protocol: Protocol, stream: ImageStream) -> Protocol:
    """The protocol, with its view set to "tensor" if the images are given as tensors."""
    if stream.tensors:
        return replace(protocol, view="tensor")
    if protocol.view == "tensor":
        raise ValueError("view: 'tensor' is for images given as tensors; choose 'crop' or 'whole'")
    return protocol


def _settled(
    protocol: Protocol, backbone: Classifier, classes_given: bool, given: Mapping[str, Any]
) -> Protocol:
    """The protocol with the fields in ``given`` that are not None, and with the class policy, score and
    target set to match the classes and the backbone."""
    of_target = isinstance(backbone, Scored)
    return replace(
        protocol,
        score="logit" if protocol.score == "logit" else score_of(backbone),
        class_policy="given" if classes_given or of_target else "predicted",
        target=getattr(backbone, "target_id", ""),
        **{key: value for key, value in given.items() if value is not None},
    )


def _check_needs(
    evaluation: Evaluation, stream: ImageStream, randomized: Randomized | None
) -> None:
    """Raise a ValueError if a metric lacks something that it needs, or ``again_limit`` is below 1."""
    for metric in evaluation.metrics:
        name = group_name(metric)
        if metric.needs_annotation and evaluation.annotations is None:
            raise ValueError(
                f"metrics: {name} needs the positions of objects; give annotations, or leave it out"
            )
        if metric.needs_annotation and stream.tensors:
            raise ValueError(f"metrics: {name} needs photos with file names; tensors have none")
        if metric.explains_randomized and randomized is None:
            raise ValueError(
                f"metrics: {name} needs maps from randomised networks; give randomized, see "
                f"Cascade, or use xattn compare"
            )
    limit = evaluation.again_limit
    if limit is not None and limit < 1:
        raise ValueError(f"again_limit: got {limit}; give at least 1, or None for all images")


def _run(
    evaluation: Evaluation,
    stream: ImageStream,
    wanted: int | list[int] | None,
    state: str | Path | None,
    max_forward_batch: int,
    progress: bool,
) -> Results:
    """Measure this process's share of the images, then collect the results of all processes."""
    path = None if state is None else Path(state)
    backbone, protocol = evaluation.backbone, evaluation.protocol
    methods = len(evaluation.explainers)
    ranks, rank = processes(backbone.device)
    size = micro_batch(max_forward_batch, stream.length)
    scorer = MaskedScorer(backbone, size, protocol.score, protocol.precision)
    facts = {**run_facts(evaluation, size), "classes": wanted}
    with closing(_opened(path, facts, rank)) as store:
        run = EvaluationRun(evaluation, scorer, store)
        with tqdm(
            total=None if stream.length is None else stream.length * methods,
            desc="evaluate",
            unit="map",
            disable=not progress or rank > 0,
            dynamic_ncols=True,
        ) as bar:
            for chunk in stream.blocks(size, rank, ranks):
                if chunk:
                    run.add(chunk, _targets(wanted, chunk), bar.update)
                bar.set_postfix_str(f"{len(stream.skipped)} skipped" if stream.skipped else "")
                if ranks > 1 and chunk:  # also count the share of the other processes
                    bar.update((chunk[-1].position + 1) * methods - bar.n)
        run.finish(stream)
        costs = gather(run.cost())  # from here on, every process has stored its results
        cost = {key: sum(part[key] for part in costs) for key in costs[0]}
        cost["max_forward_batch"] = size
        if path is None and ranks > 1:
            for tables in gather(store.tables()):
                store.merge(tables)
        results = collect(store, evaluation, cost, stream.length)
        if rank > 0:
            store.close()
        else:
            _warn_alone(evaluation, results, size)
        gather(None)  # makes the first process wait, so that it is the last to close the file
        return results


def _warn_alone(evaluation: Evaluation, results: Results, chunk: int) -> None:
    """Warn about each metric that compares photos but never had enough photos in a chunk."""
    for metric in evaluation.metrics:
        found = (m.attempts(c) for m in results.methods.values() for c in metric.columns)
        if metric.photos_needed and not any(found):
            warn_of_no_comparison(metric, chunk)


def _opened(path: Path | None, facts: Mapping[str, Any], rank: int) -> Store:
    """Open the state; if there are several processes, the first one creates the file before the others."""
    first = fail_together(lambda: Store(path, facts) if rank == 0 else None)
    return first or Store(path, facts)


def create_metrics(
    metrics: str | PerturbationMetric | Sequence[str | PerturbationMetric],
    protocol: Protocol,
    mean: Sequence[float],
    network: Any = None,
) -> list[PerturbationMetric]:
    """Create the metrics with the options that suit ``network``; names are looked up among the metric
    groups.

    Raises:
        ValueError: there are no metrics, one of them is unknown or undefined for this score, or two of them
            have the same column.
    """
    if not metrics:
        raise ValueError("metrics: got none; give names printed by xattn list")
    given = [metrics] if isinstance(metrics, str | PerturbationMetric) else metrics
    made = [
        create_metric(m, protocol, tuple(float(v) for v in mean)) if isinstance(m, str) else m
        for m in given
    ]
    for metric in made:
        if not isinstance(metric, PerturbationMetric):
            raise ValueError(
                f"metrics: got {metric!r}; give names that xattn list prints, or instances of "
                "PerturbationMetric (register functions with register_metric)"
            )
        own_infos(metric)
        metric.for_axes(3 if getattr(network, "reads_clips", False) else 2)
        problem = metric.score_problem(protocol.score)
        if problem is not None:
            raise ValueError(problem)
    made = [metric.for_network(network) for metric in made] if network is not None else made
    columns = [column for metric in made for column in metric.columns]
    twice = sorted({c.key for c in columns if columns.count(c) > 1})
    if twice:
        raise ValueError(f"metrics: {', '.join(twice)} was requested twice; leave one out")
    return made


def _wanted_classes(
    backbone: Classifier, classes: Classes, length: int | None
) -> int | list[int] | None:
    if classes is None:
        return None
    if isinstance(classes, int | str):
        return int(backbone.class_index(classes))
    wanted = [int(backbone.class_index(c)) for c in classes]
    if length is not None and len(wanted) != length:
        raise ValueError(f"classes: got {len(wanted)} for {length} images; give one per image")
    return wanted


def _targets(wanted: int | list[int] | None, chunk: list[Item]) -> Tensor | None:
    if wanted is None:
        return None
    if isinstance(wanted, int):
        return torch.full((len(chunk),), wanted, device="cpu")
    if chunk[-1].position >= len(wanted):
        raise ValueError(
            f"classes: got {len(wanted)}, but there are more images; give one per image"
        )
    return torch.tensor([wanted[item.position] for item in chunk], device="cpu")
