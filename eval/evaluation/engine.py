"""Measure the explanations of many methods on many images with one bounded stream of forward passes.

    images -> clean pass (score, class) -> maps of each method -> grey masks -> probes -> scorer

Images stream through in chunks of ``max_forward_batch``; clean passes, explanations and perturbed
passes all run at that one batch shape, so results do not depend on how many images there are.
Under ``torchrun`` each process takes every n-th chunk, and all return the results of all images.
What is finished is stored at once (:mod:`~xattn.eval.evaluation.store`): a killed run resumes from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.eval.annotations import Annotations
from xattn.eval.evaluation.evaluation_run import EvaluationRun, Randomized
from xattn.eval.evaluation.facts import run_facts
from xattn.eval.evaluation.scorer import MaskedScorer
from xattn.eval.evaluation.store import Store
from xattn.eval.evaluation.stream import ImageStream, Item
from xattn.eval.metrics.base import Probe
from xattn.eval.metrics.registry import create_probe
from xattn.eval.protocol import SCORES, Protocol
from xattn.eval.results import Results, collect
from xattn.photos.images import MAX_PIXELS
from xattn.runtime.distributed import gather, processes


def evaluate(
    backbone: Any,
    explainers: Mapping[str, Any],
    images: Any,
    *,
    metrics: Sequence[str | Probe] = ("masking",),
    levels: Sequence[float] | None = None,
    max_forward_batch: int = 32,
    view: str | None = None,
    seed: int | None = None,
    protocol: Protocol | None = None,
    progress: bool = True,
    classes: int | str | Sequence[int | str] | None = None,
    max_pixels: int | None = MAX_PIXELS,
    limit: int | None = None,
    annotations: Annotations | None = None,
    randomized: Randomized | None = None,
    again_limit: int | None = 2,
    state: str | Path | None = None,
    kept_maps: int = 0,
) -> Results:
    """Every metric of every explainer on the same images; by default AD, IC, ADD and AG.

    Args:
        backbone: a :class:`xattn.Backbone`; it alone scores, whatever an explainer looks at.
        explainers: by the name of their row in the table.
        images: a photo, folder or list file; a list of paths or PIL images; or float tensors
            (3, H, W) or (B, 3, H, W) in [0, 1] at the model's input size, also from a generator.
        metrics: groups by name (:data:`xattn.eval.metrics.PROBES`), or probes.
        protocol: its ``class_policy`` follows ``classes``, its ``score`` the backbone's task unless
            it is ``"logit"``.
        levels, view, seed: replace the protocol's own: (1.0, 0.5, 0.15), ``"crop"``, 0.
        max_forward_batch: images a forward pass; also how many are explained at a time. A multiple
            of 4 keeps results bit-equal whatever else is scored in the same run.
        classes: explain these instead of the predicted class: one for all images, or one an image
            (unreadable ones included), as index or name.
        max_pixels: larger photos are skipped as decompression bombs.
        limit: only the first so many images.
        annotations: where objects are, see :func:`xattn.eval.load_annotations`.
        randomized: by method, (stage, images, targets) -> its maps on a network with randomised
            weights, see :class:`xattn.eval.Cascade`.
        again_limit: metrics that explain again are measured on this many images for explainers that
            run many perturbed passes; None for all.
        state: an SQLite file that keeps what is finished. A run with the same arguments goes on
            from it.
        kept_maps: of how many of the first images ``state`` keeps the maps as explained, and the first
            classes; such that an earlier run did not keep are explained again, and not measured.

    Raises:
        ValueError: no image could be read, an explainer returns a wrong shape or fails on all of
            the first images, a class or metric is unknown, or ``state`` belongs to another run.
        OSError: the path ``images`` does not exist, or ``state`` cannot be written.
    """
    if not explainers:
        raise ValueError("explainers: got none; give {name: explainer}")
    if not getattr(backbone, "has_classes", True):
        backbone.require_classes()
    given = {"levels": levels, "view": view, "seed": seed}
    protocol = protocol or Protocol()
    protocol = replace(
        protocol,
        score="logit" if protocol.score == "logit" else SCORES[backbone.task],
        class_policy="predicted" if classes is None else "given",
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    stream = ImageStream(images, backbone.preprocessing, protocol.view, max_pixels, limit)
    if stream.tensors:
        protocol = replace(protocol, view="tensor")
    elif protocol.view == "tensor":
        raise ValueError("view: 'tensor' is for images given as tensors; choose 'crop' or 'whole'")
    probes = create_probes(metrics, protocol, backbone.preprocessing.mean)
    if any(probe.needs_annotation for probe in probes) and annotations is None:
        raise ValueError(
            "metrics: localization needs to know where objects are; give annotations, or leave it out"
        )
    if any(probe.needs_annotation for probe in probes) and stream.tensors:
        raise ValueError("metrics: localization needs photos with file names; tensors have none")
    if randomized is None and any(probe.explains_randomized for probe in probes):
        raise ValueError(
            "metrics: randomization needs each method on randomised networks; give randomized, see "
            "Cascade (xattn compare does)"
        )
    if again_limit is not None and again_limit < 1:
        raise ValueError(f"again_limit: got {again_limit}; give at least 1, or None for all images")
    wanted = _wanted_classes(backbone, classes, stream.length)
    ranks, rank = processes(backbone.device)
    scorer = MaskedScorer(backbone, max_forward_batch, protocol.score, protocol.precision)
    facts = run_facts(backbone, explainers, protocol, probes, scorer, again_limit)
    facts["annotations"] = None if annotations is None else annotations.fingerprint
    facts["classes"], facts["randomized"] = wanted, sorted(randomized or {})
    path = None if state is None else Path(state)
    with closing(Store(path, facts, rank)) as store:
        run = EvaluationRun(
            backbone,
            explainers,
            protocol,
            probes,
            scorer,
            store,
            annotations,
            randomized or {},
            again_limit,
            kept_maps if path is not None else 0,
        )

        from tqdm import tqdm

        with tqdm(
            total=None if stream.length is None else stream.length * len(explainers),
            desc="evaluate",
            unit="map",
            disable=not progress or rank > 0,
            dynamic_ncols=True,
        ) as bar:
            for chunk in stream.blocks(max_forward_batch, rank, ranks):
                if chunk:
                    run.add(chunk, _targets(wanted, chunk), bar.update)
                bar.set_postfix_str(f"{len(stream.skipped)} skipped" if stream.skipped else "")
                if ranks > 1 and chunk:  # the other processes' share
                    bar.update((chunk[-1].position + 1) * len(explainers) - bar.n)
        run.finish(stream)
        costs = gather(run.cost())
        cost = {key: sum(part[key] for part in costs) for key in costs[0]}
        cost["max_forward_batch"] = max_forward_batch
        _put_together(store, ranks, rank, path)
        return collect(store, protocol, probes, explainers, backbone, cost, stream.length)


def create_probes(
    metrics: Sequence[str | Probe], protocol: Protocol, mean: Sequence[float]
) -> list[Probe]:
    """The probes of groups by name; a ValueError where a column would stand twice."""
    if not metrics:
        raise ValueError("metrics: got none; give names of xattn list")
    probes = [
        create_probe(m, protocol, tuple(float(v) for v in mean)) if isinstance(m, str) else m
        for m in metrics
    ]
    for probe in probes:
        problem = probe.score_problem(protocol.score)
        if problem is not None:
            raise ValueError(problem)
    columns = [column for probe in probes for column in probe.columns]
    twice = sorted({c.key for c in columns if columns.count(c) > 1})
    if twice:
        raise ValueError(f"metrics: {', '.join(twice)} asked for twice; leave one out")
    return probes


def _put_together(store: Store, ranks: int, rank: int, path: Path | None) -> None:
    """All processes' rows into the store of each, or into the one file."""
    if path is None:
        for other, (images, results) in enumerate(gather(store.rows()) if ranks > 1 else []):
            if other != rank:
                store.take_in(images, results)
        return
    if rank > 0:
        store.close()
    gather(None)  # all have written
    if rank == 0:
        store.merge()
    gather(None)
    if rank > 0:
        store.reopen()


def _wanted_classes(
    backbone: Any, classes: int | str | Sequence[int | str] | None, length: int | None
) -> int | list[int] | None:
    if classes is None:
        return None
    if isinstance(classes, int | str):
        return int(backbone.class_index(classes))
    wanted = [int(backbone.class_index(c)) for c in classes]
    if length is not None and len(wanted) != length:
        raise ValueError(f"classes: got {len(wanted)} for {length} images; give one an image")
    return wanted


def _targets(wanted: int | list[int] | None, chunk: list[Item]) -> Tensor | None:
    if wanted is None:
        return None
    if isinstance(wanted, int):
        return torch.full((len(chunk),), wanted, device="cpu")
    if chunk[-1].position >= len(wanted):
        raise ValueError(
            f"classes: got {len(wanted)}, and there are more images; give one an image"
        )
    return torch.tensor([wanted[item.position] for item in chunk], device="cpu")
