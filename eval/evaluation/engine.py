"""Measures the explanations of many methods on many images with one bounded stream of forward passes.

    images -> clean pass (score, class) -> maps of each method -> grey masks -> metrics -> scorer

Images stream through in chunks of ``max_forward_batch``, or fewer if there are fewer images; clean
passes, explanations and perturbed passes all run at that one batch shape (:func:`micro_batch`).
Under ``torchrun``, each of n processes takes every n-th chunk, and all return the results for all
images. Finished work is stored at once (:mod:`~xattn.eval.evaluation.store`), so that a killed run
can be resumed.
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
    """Measure every metric of every explainer on the same images; by default AD, IC, ADD and AG.

    Args:
        backbone: a :class:`xattn.Backbone`; it computes all scores, whatever an explainer looks at.
        explainers: by row name: explainers, names from ``xattn list``, trained heads, or anything that
            :mod:`xattn.explainers.adapters` accepts, which is tried out on the first images.
        images: a photo, folder or list file; a list of paths, PIL images or arrays (H, W, 3); or float
            tensors (3, H, W) or (B, 3, H, W) in [0, 1] at the model's input size, also from a loader.
        metrics: names of groups (:data:`xattn.eval.metrics.GROUPS`), or metrics, including your own.
        protocol: its ``class_policy`` follows ``classes``, and its ``score`` the backbone's task unless
            it is ``"logit"``.
        levels, view, seed: replace those of the protocol: (1.0, 0.5, 0.15), ``"crop"``, 0.
        max_forward_batch: images per forward pass and per explanation batch. If it is a multiple of 4,
            results are bit-equal whatever else is scored in the same run. With fewer images than this,
            passes are smaller, and runs are bit-equal if they have the same number of images.
        classes: explain these instead of the predicted class: one for all images, or one per image
            (unreadable ones included), as index or name.
        target: another name for ``classes``; or any number computed from the network's output, as in
            :func:`xattn.explain`, for which the explainers are made again.
        max_pixels: larger photos are skipped as decompression bombs.
        limit: use at most this many images, see :func:`~xattn.photos.sources.limit_photos`.
        annotations: where objects are, see :func:`xattn.eval.load_annotations`.
        randomized: for each method, (stage, images, targets) -> its maps on a network with randomised
            weights, see :class:`xattn.eval.sanity.Cascade`.
        again_limit: for explainers that run many perturbed passes, the number of images on which
            metrics that explain again are measured; None for all.
        state: an SQLite file for finished work. A run with the same arguments resumes from it, also
            with more images if the earlier run had at least ``max_forward_batch``.
        kept_maps: number of first images whose raw maps and top classes ``state`` keeps. If an earlier
            run did not keep them, the images are explained again but not measured again.

    Raises:
        ValueError: no image could be read, an explainer returns a wrong shape or fails on all of
            the first images, a class or metric is unknown, or ``state`` belongs to another run.
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
    """Backbone, explainers and classes for ``target``; unchanged if there is no target."""
    if classes is not None and target is not None:
        raise ValueError("target: got both target and classes; give one of them")
    if target is None or not isinstance(backbone, Backbone) or not is_score(backbone, target):
        check_classes(backbone)
        named = target.tolist() if isinstance(target, Tensor) else target
        return backbone, explainers, classes if target is None else named
    view = scored(backbone, target)
    return view, explainers_for(view, explainers), None


def explainers_for(view: BackboneView, explainers: Mapping[str, Explainer]) -> dict[str, Explainer]:
    """Make explainers of ``view`` from explainers of its backbone."""
    return {
        name: e if e.backbone is view else e.with_target(view) for name, e in explainers.items()
    }


def _of_stream(protocol: Protocol, stream: ImageStream) -> Protocol:
    """The protocol, with the view set for images that come as tensors."""
    if stream.tensors:
        return replace(protocol, view="tensor")
    if protocol.view == "tensor":
        raise ValueError("view: 'tensor' is for images given as tensors; choose 'crop' or 'whole'")
    return protocol


def _settled(
    protocol: Protocol, backbone: Classifier, classes_given: bool, given: Mapping[str, Any]
) -> Protocol:
    """The protocol with the choices in ``given``, and with the score that suits the backbone's task or
    target."""
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
    """Raise a ValueError if something that a metric needs was not given."""
    for metric in evaluation.metrics:
        name = group_name(metric)
        if metric.needs_annotation and evaluation.annotations is None:
            raise ValueError(
                f"metrics: {name} needs to know where objects are; give annotations, or leave it out"
            )
        if metric.needs_annotation and stream.tensors:
            raise ValueError(f"metrics: {name} needs photos with file names; tensors have none")
        if metric.explains_randomized and randomized is None:
            raise ValueError(
                f"metrics: {name} needs each method on randomised networks; give randomized, see "
                f"Cascade (xattn compare does)"
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
                if ranks > 1 and chunk:  # the other processes' share
                    bar.update((chunk[-1].position + 1) * methods - bar.n)
        run.finish(stream)
        costs = gather(run.cost())  # all have written
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
        gather(None)  # the first process closes the file last
        return results


def _warn_alone(evaluation: Evaluation, results: Results, chunk: int) -> None:
    """Warn which metrics had no photos to compare with."""
    for metric in evaluation.metrics:
        found = (m.attempts(c) for m in results.methods.values() for c in metric.columns)
        if metric.photos_needed and not any(found):
            warn_of_no_comparison(metric, chunk)


def _opened(path: Path | None, facts: Mapping[str, Any], rank: int) -> Store:
    """Open the state; if there are several processes, the first one creates the file."""
    first = fail_together(lambda: Store(path, facts) if rank == 0 else None)
    return first or Store(path, facts)


def create_metrics(
    metrics: str | PerturbationMetric | Sequence[str | PerturbationMetric],
    protocol: Protocol,
    mean: Sequence[float],
    network: Any = None,
) -> list[PerturbationMetric]:
    """Create the metrics (names are looked up among the metric groups), with the options that suit
    ``network``.

    Raises:
        ValueError: there are no metrics, or two of them have the same column.
    """
    if not metrics:
        raise ValueError("metrics: got none; give names that xattn list prints")
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
        raise ValueError(f"metrics: {', '.join(twice)} requested twice; leave one out")
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
