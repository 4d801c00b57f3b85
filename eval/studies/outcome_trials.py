"""Trials of the evidence head: named variants of its masks, loss, parts and maps.

    python -m xattn.eval.studies outcome-trials PHOTOS --trials base superpixels on_policy \\
        --unannotated COCO --output runs/trials --tables runs/tables --compiled --precision bfloat16

Every trial is the evidence head of ``TrainConfig("outcomes")``, changed in one respect. It is
trained on the training photos of a fold and scored on the held-out photos of that fold, or of
``--held-out`` or ``--unannotated``; ``--rows`` adds rows for comparison, as in
:mod:`~xattn.eval.studies.fold_rows`. ``LABEL=NAME:option=value`` changes a trial further, by
settings of training, ``photos``, how it is shown (``passes``, ``maps``), its own options, or
options of the head: ``base:photos=50``, ``base:seed=3``, ``joint:weight=0.1``. A finished trial is
loaded, and a killed one resumes. Random labels are a study of their own,
:mod:`~xattn.eval.studies.random_labels`.

The loss of some trials reads more than a table of outcomes: empty photos, T-TAME's objective, or a
teacher.

    L = L_outcomes + weight x efficiency,    L = L_outcomes + weight x L_T-TAME,    L = 1 - corr(S, teacher)

The first two terms are added to the loss on outcomes; the third replaces it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.annotations.objects import load_annotations
from xattn.eval.evaluation.results import Results
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.report.text_tables import format_table
from xattn.eval.studies import outcome_losses
from xattn.eval.studies.class_folds import class_folds, merge
from xattn.eval.studies.fold_rows import (
    METRICS,
    SHOWN,
    TRAINING,
    FoldRows,
    Row,
    differences_table,
    labelled,
    pop_options,
    score_explainer,
    score_row,
    side_by_side,
    table_of,
)
from xattn.eval.studies.outcome_losses import Distilled, Efficiency
from xattn.eval.studies.trial_training import (
    EvidenceWithPositions,
    SigmoidEvidence,
    Trial,
    TrialRun,
    closed_form,
    edge_aware,
    mean_of_heads,
    on_own_masks,
    on_two_tables,
    one_head,
    trained,
    untrained_head,
)
from xattn.explainers import Explainer, create_explainer
from xattn.heads.maps.evidence import PARTS, standardise
from xattn.photos.images import list_images, load_image
from xattn.photos.sources import open_photos
from xattn.photos.view import prepare
from xattn.runtime.files import atomic_file, write_text
from xattn.runtime.names import did_you_mean
from xattn.training.data import TrainImages
from xattn.training.objectives.base import Step
from xattn.training.objectives.mask import Mask
from xattn.training.outcome_fitting import OutcomePlaces, OutcomesJob, Place
from xattn.training.outcome_rows import CELLS, FILLS, KINDS, replacement_pixels
from xattn.training.run import Run


def with_efficiency(trial: Trial, run: TrialRun) -> Explainer:
    """A head whose loss includes ``weight`` times the efficiency term."""
    terms = Efficiency(empty_logits(run.backbone, trial.chosen(run)), trial.options["weight"])
    return trial.explainer(run, trained(trial, run, run.folder / "run", terms=terms))


def empty_logits(backbone: Backbone, photos: Sequence[Path]) -> dict[str, Tensor]:
    """The logits (F, K) of the backgrounds behind each photo's masks, by the photo's name."""
    found, dtype = {}, next(backbone.parameters()).dtype
    for name, image in readable(backbone, photos):
        behind = torch.stack([replacement_pixels(image, fill) for fill in FILLS])
        # With gradients, as passes without them may be compiled anew for each batch size.
        found[name] = backbone.logits(behind.to(backbone.device, dtype)).detach().float().cpu()
    return found


def readable(backbone: Backbone, photos: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """The names of the photos that can be read, with their evaluation crops (3, H, W)."""
    opened = open_photos(photos)
    images = TrainImages(opened, backbone.preprocessing, 0, augment=False)
    for i in range(len(opened)):
        image = images[0, i][1]
        if image is not None:
            yield opened.name(i), image


def joint(trial: Trial, run: TrialRun) -> Explainer:
    """A head whose loss adds ``weight`` times T-TAME's objective on ``photos`` of each batch."""

    def job(*arguments: Any) -> OutcomesJob:
        return JointJob(*arguments, weight=trial.options["weight"], count=trial.options["photos"])

    return trial.explainer(run, trained(trial, run, run.folder / "run", job=job))


class JointJob(OutcomesJob):
    """The loss on outcomes plus ``weight`` times T-TAME's objective (recipe "small") on the first
    ``count`` photos of each batch."""

    def __init__(self, *arguments: Any, weight: float, count: int) -> None:
        super().__init__(*arguments)
        backbone, photos, _, _, config, *_ = arguments
        if config.crops > 1:
            raise ValueError(
                f"crops: got {config.crops}; T-TAME's part sees the model's own crop, give 1"
            )
        self.weight, self.count, self.masking = weight, count, TrainConfig("small")
        self.images = TrainImages(photos, backbone.preprocessing, config.seed, augment=False)
        self._kept: dict[int, Tensor] = {}

    def losses(
        self, run: Run[Any], backbone: Backbone, places: list[Place], batch: OutcomePlaces
    ) -> dict[str, Tensor]:
        """Like :meth:`OutcomesJob.losses`, with T-TAME's loss as ``mask``."""
        terms = super().losses(run, backbone, places, batch)
        images = torch.stack([self._image(self.numbers[i]) for _, i in places[: self.count]])
        with run.forward(batch.share):
            step = Step(run.head, backbone, images.to(backbone.device), self.masking)
            found = Mask().on_photos(step)["loss"]
        return {**terms, "loss": terms["loss"] + self.weight * found, "mask": found}

    def _image(self, number: int) -> Tensor:
        """The evaluation crop of a photo, cached as bytes."""
        if number not in self._kept:
            image = self.images[0, number][1]
            if image is None:
                raise OSError("data: an image that could be read before no longer can")
            self._kept[number] = (image * 255).round().to(torch.uint8)
        return self._kept[number].float() / 255


def distilled(trial: Trial, run: TrialRun) -> Explainer:
    """A head that learns to match the mean map of the explainers in ``options``, by correlation."""
    terms = Distilled(teacher_maps(run, trial.chosen(run), trial.options))
    return trial.explainer(run, trained(trial, run, run.folder / "run", terms=terms))


def teacher_maps(
    run: TrialRun, photos: Sequence[Path], methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """For each photo, by name, the mean (28, 28) of the standardised maps that ``methods`` (name ->
    options) give for its most probable class. Each mean is saved in a file, and loaded if it
    exists."""
    explainers = [
        create_explainer(name, run.backbone, max_forward_batch=run.max_forward_batch, **options)
        for name, options in methods.items()
    ]
    text = json.dumps([run.backbone.fingerprint, methods], sort_keys=True)
    about = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = run.tables / f"{run.backbone.name}-maps-{'+'.join(methods)}-{about}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    images = readable(run.backbone, photos)
    for name, image in tqdm(images, "teacher maps", len(photos), disable=not run.progress):
        digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
        place = folder / f"{digest[:32]}.npy"
        if not place.is_file():
            maps = _mean_map(run.backbone, explainers, image[None]).numpy()
            with atomic_file(place) as temporary, temporary.open("wb") as stream:
                np.save(stream, maps)
        found[name] = torch.from_numpy(np.load(place))
    return found


def _mean_map(backbone: Backbone, explainers: Sequence[Explainer], image: Tensor) -> Tensor:
    target = backbone.logits(image.to(backbone.device)).argmax(1).cpu()
    maps = [explainer.attribute(image, target).float().cpu() for explainer in explainers]
    cells = [standardise(F.adaptive_avg_pool2d(found, CELLS)) for found in maps]
    return torch.stack(cells).mean(0)[0, 0]


def _one(about: str, **changed: Any) -> Trial:
    return Trial(about=about, make=one_head, **changed)


def _without(*parts: str) -> list[str]:
    return [part for part in PARTS if part not in parts]


MASKS: dict[str, Trial] = {
    "masks_32": _one("32 masks a photo in place of 16", train={"masks": 32}),
    "masks_64": _one("64 masks a photo in place of 16", train={"masks": 64}),
    "crops_4": _one("four crops of every photo, 16 masks each", train={"crops": 4}),
    "superpixels": _one("masks of SLIC's superpixels alone", table={"kinds": ["superpixels"]}),
    "with_superpixels": _one(
        "superpixels as a fifth kind of masks", table={"kinds": [*KINDS, "superpixels"]}
    ),
    "squares": _one("masks of squares alone", table={"kinds": ["squares32", "squares16"]}),
    "blobs": _one("masks of smooth noise alone", table={"kinds": ["blobs"]}),
    "no_evidence_masks": _one(
        "squares and blobs, without thresholds of CAM",
        table={"kinds": ["squares32", "squares16", "blobs"]},
    ),
    "evidence_masks": _one("thresholds of CAM under noise alone", table={"kinds": ["evidence"]}),
    "black": _one("black alone behind the masks", table={"fills": ["black"]}),
    "on_policy": Trial(
        about="a second table, its masks thresholds of the trained head's own scores",
        make=on_own_masks,
    ),
    "second_table": Trial(
        about="control of on_policy: a second table of fresh masks of all kinds", make=on_two_tables
    ),
    "second_table_of_cam": Trial(
        about="control of on_policy: a second table of thresholds of CAM",
        make=on_two_tables, options={"kinds": ["evidence"]},
    ),
}  # fmt: skip
"""Trials with other masks, or more of them."""

LOSSES: dict[str, Trial] = {
    "no_area": _one("area not projected out", terms=outcome_losses.without_area),
    "probability_only": _one(
        "the own class's probability as the only outcome",
        train={"others": 0}, terms=outcome_losses.probability_only,
    ),
    "log_odds_only": _one("log-odds alone, of all classes", terms=outcome_losses.log_odds_only),
    "own_class_only": _one("no outcomes of other classes", train={"others": 0}),
    "squared_error": _one(
        "squared error in place of the correlation", terms=outcome_losses.squared_error
    ),
    "shapley": _one("masks weighed as the Shapley kernel does", terms=outcome_losses.shapley),
    "efficiency": Trial(
        about="a further term: the map's sum is what the photo adds to the log-odds",
        make=with_efficiency, options={"weight": 0.1},
    ),
    "joint": Trial(
        about="a further term: T-TAME's objective on 8 photos of each batch",
        make=joint, head_class=SigmoidEvidence, options={"weight": 0.3, "photos": 8},
    ),
    "distilled": Trial(
        about="the mean map of LIME and RISE as the target, in place of outcomes",
        make=distilled, train={"others": 0}, options={"lime": {}, "rise": {}},
    ),
}  # fmt: skip
"""Trials with another loss."""

HEADS: dict[str, Trial] = {
    "cam_only": Trial(
        about="no training: class activation maps", make=untrained_head, head={"parts": []}
    ),
    "closed_form": Trial(
        about="a, b and theta alone, by normal equations",
        make=closed_form, head={"parts": ["contrast", "features"]},
    ),
    "no_contrast": _one("no contrast: neither b nor h", head={"parts": _without("contrast", "h")}),
    "no_features": _one("no norms and texture", head={"parts": _without("features")}),
    "no_u": _one("no u", head={"parts": _without("u")}),
    "no_g": _one("no g", head={"parts": _without("g")}),
    "no_h": _one("no h", head={"parts": _without("h")}),
    "no_network": _one("a, b and theta alone, by gradient steps", head={"parts": ["contrast", "features"]}),
    "with_positions": _one(
        "a network that also reads where a cell is", head_class=EvidenceWithPositions
    ),
    "components_64": _one("64 principal components a tap in place of 8", head={"components": 64}),
}  # fmt: skip
"""Trials with another head."""

MAPS: dict[str, Trial] = {
    "mean_of_3_seeds": Trial(
        about="three heads of other seeds, their scores averaged",
        make=mean_of_heads, options={"heads": 3},
    ),
    "edge_aware": Trial(
        about="up-sampled by a guided filter along the photo's edges",
        make=edge_aware, options={"radius": 8, "eps": 1e-3},
    ),
    "passes_2": _one("the mean of the photo's map and its mirror image's", shown={"passes": 2}),
    "passes_4": _one("the mean of flips and shifts, four passes", shown={"passes": 4}),
}  # fmt: skip
"""Trials with other maps of trained heads."""

TRIALS: Mapping[str, Trial] = {
    "base": _one("the evidence head as it is trained by default"),
    **MASKS,
    **LOSSES,
    **HEADS,
    **MAPS,
}
"""All trials by name."""


def parse_trial(text: str) -> tuple[str, Trial]:
    """The label and trial in ``LABEL=NAME:option=value,...``; the label is the text by default."""
    label, rest = labelled(text)
    name, options = parse_mechanism(rest)
    if name not in TRIALS:
        raise ValueError(f"trials: got {name!r}; {did_you_mean(name, TRIALS)}")
    trial = TRIALS[name]
    return label, replace(
        trial,
        options={**trial.options, **pop_options(options, trial.options)},
        photos=options.pop("photos", trial.photos),
        train={**trial.train, **pop_options(options, TRAINING)},
        shown={**trial.shown, **pop_options(options, SHOWN)},
        head={**trial.head, **options},
    )


def score_trial(
    label: str,
    trial: Trial,
    run: TrialRun,
    held_out: Sequence[Path],
    *,
    metrics: Sequence[str | PerturbationMetric] = METRICS,
    precision: str = "float32",
) -> Results:
    """Run ``trial`` in the folder of ``run`` and score it on ``held_out``."""
    return score_explainer(
        run.backbone, label, lambda: trial.make(trial, run), trial.record(run), held_out, run.folder,
        run.split, metrics=metrics, precision=precision, max_forward_batch=run.max_forward_batch,
        progress=run.progress,
    )  # fmt: skip


def unannotated(backbone: Backbone, folder: str | Path) -> list[Path]:
    """The photos of ``folder/images`` whose predicted class has no object in the annotations of
    ``folder``.

    They serve to choose settings, as the other photos are for reporting.
    """
    folder = Path(folder)
    annotations = load_annotations(folder, backbone)
    found = []
    for path in list_images(folder / "images"):
        image, view = prepare(load_image(path), backbone.preprocessing, "crop")
        top = int(backbone.logits(image[None].to(backbone.device)).argmax())
        try:
            annotated = annotations.of(path, view).mask(top) is not None
        except ValueError:  # no object of any class
            annotated = False
        if not annotated:
            found.append(path)
    if not found:
        raise ValueError(f"unannotated: the class of every photo of {folder} has an object")
    return found


@dataclass(frozen=True, kw_only=True)
class OutcomeTrials(FoldRows):
    """Train variants of the evidence head and score them on photos of classes that no head saw."""

    trials: tuple[str, ...] = ("base",)
    """LABEL=NAME:option=value,...; by default, the others are compared with the first."""
    rows: tuple[str, ...] = ()  # Heads and explainers to compare with, as in fold_rows.
    output: Path = Path("runs/trials")  # Gets a folder for each fold and trial, and the full table.
    held_out: str | None = None
    """Score these photos, with heads trained on one fold's training photos, instead of folds."""
    unannotated: str | None = None
    """Score the photos of this folder's images whose predicted class has no object in its annotations."""
    train_fold: int = 0
    """The fold whose training photos are used with --held-out and --unannotated."""
    workers: int = 0  # Data-loader processes in training.

    def parts_to_score(
        self, backbone: Backbone, paths: Sequence[Path]
    ) -> dict[str, tuple[int, list[Path]]]:
        """For each folder of results, the fold to train on and the photos to score."""
        k = self.train_fold
        if self.held_out is not None and self.unannotated is not None:
            raise ValueError("held_out: got it and unannotated; give one of them")
        if self.held_out is not None:
            return {f"held-out-{k}": (k, list_images(self.held_out))}
        if self.unannotated is not None:
            return {f"unannotated-{k}": (k, unannotated(backbone, self.unannotated))}
        return self.parts(paths)


def study(args: OutcomeTrials) -> Iterator[str]:
    """Run the trials that are not finished yet, and yield the lines of the report."""
    trials = dict(parse_trial(text) for text in args.trials)
    rows = [Row.parse(text) for text in args.rows]
    backbone, paths = args.load(), list_images(args.data)
    outcomes = {row.label: table_of(row, backbone, paths, args.tables) for row in rows}
    scoring: dict[str, Any] = {"metrics": args.metrics, "precision": args.precision}
    folds, tables = class_folds(paths, args.folds), []
    for part, (fold, held_out) in args.parts_to_score(backbone, paths).items():
        train = sorted(set(paths) - set(folds[fold]))
        scored = []
        for label, trial in trials.items():
            run = TrialRun(
                backbone=backbone, photos=paths, train=train, folder=args.output / part / label,
                tables=args.tables, seed=fold, settings={"workers": args.workers},
            )  # fmt: skip
            scored.append(score_trial(label, trial, run, held_out, **scoring))
        for row in rows:
            folder, table = args.output / part / row.label, outcomes[row.label]
            scored.append(
                score_row(backbone, row, train, held_out, folder, table=table, seed=fold, **scoring)
            )
        tables.append(side_by_side(scored))
    table = merge(tables)
    about = {label: trial.about for label, trial in trials.items()}
    found = differences_table(table, args.against or next(iter(table.methods)), about=about)
    text = f"{format_table(table, 'markdown')}\n{found}"
    write_text(args.output / "trials.md", text + "\n")
    yield text
