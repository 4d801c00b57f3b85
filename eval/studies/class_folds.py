"""Cross-validation over classes: every photo is scored by a head that never saw its class.

    python -m xattn.eval.studies class-folds PHOTOS --output runs/folds

``PHOTOS`` has one folder per class. Each fold's head is trained with :func:`xattn.fit` on the other
classes; its held-out photos are scored beside Grad-CAM and the sanity rows; the folds' per-image
numbers are merged, so that intervals and paired differences cover all photos. A fold that is
finished is not computed again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.evaluation.results import Difference, MethodResult, Results
from xattn.eval.evaluation.split import Split
from xattn.eval.report.results_files import read_json, write_csv, write_json
from xattn.eval.report.text_tables import format_table
from xattn.eval.sanity import sanity_rows
from xattn.eval.studies.run_files import kept_record
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import create_explainer
from xattn.heads import parse_options
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images
from xattn.runtime.files import write_json as write_record
from xattn.training import fit
from xattn.training.run_folder import RUN_FILE


def class_folds(paths: Sequence[Path], folds: int, seed: int = 0) -> list[list[Path]]:
    """Split ``paths`` by the folder they lie in, so that no class is in two folds."""
    classes = sorted({p.parent for p in paths})
    if not 2 <= folds <= len(classes):
        raise ValueError(
            f"folds: got {folds} for {len(classes)} class folders; give 2 or more of each"
        )
    random.Random(seed).shuffle(classes)
    place = {c: i % folds for i, c in enumerate(classes)}
    return [[p for p in paths if place[p.parent] == k] for k in range(folds)]


def merge(parts: Sequence[Results]) -> Results:
    """The results of disjoint image sets under one protocol, as if evaluated together."""
    first = parts[0]
    if len({(p.protocol.id, tuple(p.methods)) for p in parts}) != 1:
        raise ValueError("parts: protocols or methods differ; evaluate all with the same")
    methods = {}
    for name, method in first.methods.items():
        same = [p.methods[name] for p in parts]
        methods[name] = MethodResult(
            forwards=method.forwards,
            is_mask=method.is_mask,
            objective=method.objective,
            tied=sum(m.tied for m in same),
            requests=sum(m.requests for m in same),
            seconds=sum(m.seconds for m in same),
            reasons=_shifted([m.reasons for m in same], [len(m.valid) for m in same]),
            failed=_shifted([m.failed for m in same], [len(m.valid) for m in same]),
            measured={c: np.concatenate([m.measured[c] for m in same]) for c in method.measured},
            valid=np.concatenate([m.valid for m in same]),
            scores={k: _stacked([m.scores[k] for m in same]) for k in method.scores},
            values={c: np.concatenate([m.values[c] for m in same]) for c in method.values},
        )
    images = [image for p in parts for image in p.images]
    invalid = sum(p.protocol.n_invalid for p in parts)
    return Results(
        protocol=replace(first.protocol, n=len(images), n_invalid=invalid),
        images=images,
        methods=methods,
        skipped=[s for p in parts for s in p.skipped],
        backbone=first.backbone,
        cost={k: sum(p.cost[k] for p in parts) for k in first.cost if k != "max_forward_batch"},
        n_resamples=first.n_resamples,
        options=first.options,
        notes={k: v for p in parts for k, v in p.notes.items()},
    )


def _stacked(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Scores (n,) or curves (n, T) one after the other; curves of fewer steps end in NaN."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    steps = max(part.shape[1] for part in parts)
    padded = [np.pad(p, ((0, 0), (0, steps - p.shape[1])), constant_values=np.nan) for p in parts]
    return np.concatenate(padded)


def _shifted(parts: Sequence[Mapping[int, str]], sizes: Sequence[int]) -> dict[int, str]:
    """Entries by image number among all images, from entries by number in each part."""
    starts = np.cumsum([0, *sizes]).tolist()
    return {
        start + i: value
        for start, part in zip(starts, parts, strict=False)
        for i, value in part.items()
    }


class SquashedExplainer:
    """Another explainer's map as sigmoid(standardised map): the same ranking with softer grey levels.

    An ablation: how much of a difference in AD, IC or ADD is due to the ranking, how much to grey levels?
    """

    is_mask = False

    def __init__(self, explainer: Any) -> None:
        self.explainer, self.forwards = explainer, explainer.total_forwards

    def attribute(self, inputs: Any, target: Any) -> Any:
        maps = self.explainer.attribute(inputs, target)
        mean, std = maps.mean((2, 3), keepdim=True), maps.std((2, 3), keepdim=True)
        return ((maps - mean) / std.clamp_min(1e-12)).sigmoid()


def train_and_score(
    backbone: Backbone,
    train: Sequence[Path],
    held_out: Sequence[Path],
    config: TrainConfig,
    folder: Path,
    *,
    heads: Mapping[str, tuple[str, dict[str, Any]]],
    explainers: Sequence[str] = ("gradcam",),
    max_forward_batch: int = 32,
    seed: int = 0,
    progress: bool = True,
    split: Split | None = None,
    **record: Any,
) -> Results:
    """Train ``heads`` {row: (head, options)} on ``train``, score them on ``held_out``.

    Each head has two rows: its default map, and its other form (mask or raw scores). Each of the
    ``explainers`` has a second row, its :class:`SquashedExplainer`. The sanity rows belong to the first
    head. Runs and results are kept in ``folder``; finished ones are read, not computed again. ``split`` is
    given if the network itself was fitted too.
    """
    record = {
        "config": asdict(config), "heads": {n: [h, dict(o)] for n, (h, o) in heads.items()},
        "explainers": list(explainers), "backbone": backbone.fingerprint, "seed": seed,
        "held_out": [f"{p.parent.name}/{p.name}" for p in held_out], **record,
    }  # fmt: skip
    done = folder / "results.json"
    if done.is_file():
        kept_record(folder / "record.json", record)
        return read_json(done)
    shared: dict[str, Any] = {"seed": config.seed, "max_forward_batch": max_forward_batch}
    methods: dict[str, Any] = {}
    trained = []
    split = split or Split("class folds")
    held_out = split.score(held_out)
    for row, (name, options) in heads.items():
        head = seeded_head(name, backbone, seed, **options)
        run = folder / f"run-{row}"
        resume = (run / RUN_FILE).is_file()
        fit(head, backbone, split.fit(train), config, output=run, resume=resume, progress=progress)
        trained.append(head)
        other, words = (
            ("mask", "mask") if head.explain_with == "scores" else ("scores", "raw scores")
        )
        methods[row] = create_explainer("head", backbone, head, **shared)
        methods[f"{row}, {words}"] = create_explainer("head", backbone, head, maps=other, **shared)
    for name in explainers:
        methods[name] = create_explainer(name, backbone, trained[0], **shared)
        methods[f"{name}, squashed"] = SquashedExplainer(methods[name])
    methods.update(sanity_rows(backbone, "head", head=trained[0], seed=config.seed))
    results = evaluate(
        backbone, methods, held_out, max_forward_batch=max_forward_batch, progress=progress
    )
    write_record(folder / "record.json", record)
    split.write(folder / "split.json")
    write_json(results, done)
    return results


def cross_validate(
    backbone: Backbone,
    paths: Sequence[Path],
    config: TrainConfig,
    output: Path,
    *,
    head: str = "ttame",
    options: dict[str, Any] | None = None,
    folds: int = 5,
    only: Sequence[int] = (),
    explainers: Sequence[str] = ("gradcam",),
    max_forward_batch: int = 32,
    progress: bool = True,
) -> Results:
    """Train and score the heads of all folds; see the module. ``only`` names the folds to compute now."""
    parts = []
    for k, held_out in enumerate(class_folds(paths, folds, config.seed)):
        if only and k not in only:
            continue
        part = train_and_score(
            backbone,
            sorted(set(paths) - set(held_out)),
            held_out,
            config,
            output / f"fold-{k}",
            heads={head: (head, options or {})},
            explainers=explainers,
            max_forward_batch=max_forward_batch,
            seed=config.seed + k,
            progress=progress,
            folds=folds,
        )
        parts.append(part)
    return merge(parts)


def format_differences(differences: Sequence[Difference], method: str, reference: str) -> str:
    """A Markdown table of paired differences, with a verdict for each."""
    lines = [
        f"| metric | level | {method} - {reference} | 95 % interval | n | verdict |",
        "| :-- | --: | --: | :-- | --: | :-- |",
    ]
    for d in differences:
        lines.append(
            f"| {d.metric} | {100 * d.level:g} % | {d.diff:+.2f} | [{d.lo:+.2f}, {d.hi:+.2f}] "
            f"| {d.n} | {d.verdict} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Folds:
    """Cross-validate a head over classes."""

    data: tyro.conf.Positional[str]  # A folder with one folder of images per class.
    output: Path = Path("runs/folds")  # One folder per fold, and the results of all.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    head: str = "ttame"  # See xattn list.
    options: tuple[str, ...] = ()  # Options of the head as name=value.
    folds: int = 5  # Number of parts.
    only: tuple[int, ...] = ()
    """Compute only these folds, so that several processes can share the work."""
    explainers: tuple[str, ...] = ("gradcam",)  # Methods to compare with.
    train: tyro.conf.OmitArgPrefixes[TrainConfig]
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs."""


def study(args: Folds) -> Iterator[str]:
    """Run the folds that are not finished yet, and yield the lines of the report."""
    backbone = study_backbone(args.backbone, args.weights, channels_last=args.channels_last)
    results = cross_validate(
        backbone, list_images(args.data), args.train, args.output, head=args.head,
        options=parse_options(args.options), folds=args.folds, only=args.only, explainers=args.explainers,
    )  # fmt: skip
    if not args.only:
        write_json(results, args.output / "results.json")
        write_csv(results, args.output / "results.csv")
        results.to_csv(args.output / "values.csv", per_image=True)
    text = [format_table(results, "markdown")]
    for reference in args.explainers:
        differences = results.compare(args.head, reference)
        text.append(format_differences(differences, args.head, reference))
    yield "\n\n".join(text)
