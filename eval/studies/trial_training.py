"""Training of trials: a trial, its tables of outcomes, and the functions that make its explainer.

Such a function is called as ``make(trial, run)`` and returns the explainer that is scored. Everything that
it computes is stored in folders, so a trial that was killed can resume.

Some heads and explainers are only for trials: heads averaged, fitted in closed form, or with
positions, and

    q = mean(a) I + mean(b),    a = cov(I, p) / (var(I) + eps),    b = mean(p) - a mean(I)

the guided filter (He et al. 2013) of a map p by the grey values I of the photo, with all statistics
over windows: p keeps its coarse values and takes its edges from the photo.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.config import TrainConfig
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.fold_rows import names, table_folder
from xattn.explainers import Explainer, create_explainer
from xattn.explainers.head import HeadExplainer
from xattn.heads import Head
from xattn.heads.fusion import resize
from xattn.heads.maps.evidence import Evidence, standardise
from xattn.photos.sources import open_photos
from xattn.runtime.files import write_json
from xattn.training import processes
from xattn.training.fitting import fit_job
from xattn.training.objectives.base import objective_for
from xattn.training.objectives.outcomes import (
    TINY,
    area_adjusted,
    loss_inputs,
    mask_effects,
    outcome_terms,
)
from xattn.training.outcome_fitting import OutcomesJob, Terms, table_for
from xattn.training.outcomes import HeadGuide, OutcomeBatch, Outcomes, cache_outcomes
from xattn.training.run import RunOptions
from xattn.training.run_folder import RUN_FILE

LEAST_WEIGHT = 0.1  # smallest weight of an outcome; negative weights have no solution
GREY = (0.299, 0.587, 0.114)  # weights of red, green, blue


class SigmoidEvidence(Evidence):
    """The evidence head with sigmoid(scores) as its mask, which T-TAME's objective needs."""

    def mask(self, scores: Tensor) -> Tensor:
        """sigmoid(scores)."""
        return scores.sigmoid()


class EvidenceWithPositions(Evidence):
    """The evidence head with a network that also reads the position of each cell."""

    def __init__(self, backbone: Backbone, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.options = {**self.options, "positions": True}
        first, *rest = self.network
        assert isinstance(first, nn.Conv2d)
        first = nn.Conv2d(first.in_channels + 2, first.out_channels, first.kernel_size)  # type: ignore[arg-type]
        self.network = nn.Sequential(Positions(), first, *rest)


class Positions(nn.Module):
    """Appends two channels, the row and the column of each cell in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (torch.linspace(-1, 1, int(n), device=x.device) for n in x.shape[2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(x.dtype)
        return torch.cat([x, grid.expand(len(x), -1, -1, -1)], 1)


class MeanOfHeads(Head):
    """The mean of several heads' scores, each standardised over the photo; it is not trained itself."""

    name = "mean of heads"

    def __init__(self, backbone: Backbone, heads: Sequence[Evidence]) -> None:
        super().__init__(backbone, {"explain_with": heads[0].explain_with, "heads": len(heads)})
        self.heads = nn.ModuleList(heads)
        self.summary = heads[0].summary

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        return torch.stack([standardise(head(taps, class_index)) for head in self.heads]).mean(0)

    def mask(self, scores: Tensor) -> Tensor:
        """The mask of the first head."""
        return self.heads[0].mask(scores)  # type: ignore[operator]


# ---------------------------------------------------------------------- closed form


@torch.no_grad()
def fit_in_closed_form(
    head: Evidence, batches: Iterable[tuple[Taps, OutcomeBatch, Tensor]], rounds: int = 5
) -> Tensor:
    """Set a, b and theta of ``head`` by normal equations on outcomes; it returns them, beta (2 + F,).

        (sum_i w_i s_i^2 X_i^T X_i) beta = sum_i s_i X_i^T y_i,    s_i = 1 / |X_i beta_0|

    X_i (N, 2 + F) are the effects of CAM, contrast and features under the masks, and y_i (N,) the outcomes
    of one class of one photo with norm 1, both after removing mean and area. w_i is the correlation of y_i
    with the map of beta_0, but at least 0.1. If beta = beta_0 and no w_i was raised, the gradient of the
    mean correlation is 0. The first beta_0 is CAM, and each further one is the previous solution; the one
    with the highest mean correlation is used.

    Args:
        batches: taps, outcomes and classes (B, M), the photo's own class first.
        rounds: number of times the equations are solved.
    """
    kept = [_regression(head, *batch) for batch in batches]
    x, y = (torch.cat(values) for values in zip(*kept, strict=True))
    if not len(x):
        raise ValueError("table: no outcome reacts to masks, so there is nothing to fit")
    numbers = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[0]
    best, highest = numbers, -torch.inf
    for left in range(rounds, -1, -1):
        effects = torch.einsum("d,idn->in", numbers, x)
        size = effects.norm(dim=1).clamp_min(TINY)
        found = (effects * y).sum(1) / size
        if found.mean() > highest:
            best, highest = numbers, float(found.mean())
        if left:
            weight = found.clamp_min(LEAST_WEIGHT) / size.square()
            gram = torch.einsum("i,idn,ien->de", weight, x, x).cpu()
            right = torch.einsum("i,idn,in->d", 1 / size, x, y).cpu()
            solution = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution
            numbers = solution[:, 0].to(x.device)
    for parameter, value in (
        (head.cam, best[0]),
        (head.contrast, best[1]),
        (head.features, best[2:]),
    ):
        parameter.copy_(value)
    return best


def _regression(
    head: Evidence, taps: Taps, outcomes: OutcomeBatch, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The effects (n, D, N) of D maps on N masks, and the outcomes (n, N) that react, with norm 1."""
    cam, contrast, extra = head.class_maps(taps, index)
    features = head.plain_features(taps, extra)
    _, masks, answers, counted = loss_inputs(cam, outcomes, index)
    masks, answers = masks.double(), answers.double()
    area = masks.mean((2, 3))[:, None]

    def effects(maps: Tensor) -> Tensor:
        maps = resize(maps, tuple(masks.shape[2:])).double()
        return area_adjusted(mask_effects(maps, masks), area)

    of_class = torch.stack([effects(cam), effects(contrast)], 2)
    shared = effects(features)[:, None].expand(-1, of_class.shape[1], -1, -1)
    x = torch.cat([of_class, shared], 2)
    x = torch.cat([x[:, :1], x], 1)[counted > 0]
    y = area_adjusted(answers, area)[counted > 0]
    return x, y / y.norm(dim=-1, keepdim=True).clamp_min(TINY)


# ---------------------------------------------------------------------- edges of the photo


@dataclass(kw_only=True, eq=False, repr=False)
class EdgeAwareHead(HeadExplainer):
    """A head whose scores are up-sampled to the photo's pixels by a guided filter.

    Args:
        radius: half the side of its windows, in pixels.
        eps: variance of grey values in [0, 1] below which a window counts as uniform.
    """

    radius: int = 8
    eps: float = 1e-3

    def _explanation(self, images: Tensor, taps: Taps, classes: Tensor) -> Tensor:
        assert self.head is not None
        scores = resize(self.head(taps, classes), tuple(images.shape[2:]))
        grey = torch.einsum("c,bchw->bhw", images.new_tensor(GREY), images)[:, None]
        scores = guided_filter(scores, grey, self.radius, self.eps)
        return self.head.mask(scores) if self.head.explain_with == "mask" else scores


def guided_filter(maps: Tensor, guide: Tensor, radius: int, eps: float) -> Tensor:
    """Maps (B, M, H, W) filtered by a guide (B, 1, H, W), in windows of 2 radius + 1 pixels per side, which
    are cut off at the border."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)

    at, of_guide = mean(maps), mean(guide)
    slope = (mean(maps * guide) - at * of_guide) / (mean(guide * guide) - of_guide**2 + eps)
    return mean(slope) * guide + mean(at - slope * of_guide)


SECOND = 1000  # seed of a second table; seeds of further heads are multiples of it


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """The setting of a trial: the photos to ``train`` on among all ``photos``, whose outcomes are
    in ``tables``; its own ``folder``; training ``settings`` that all trials share; and the ``split``, which
    records what it was trained on."""

    backbone: Backbone
    photos: Sequence[Path]
    train: Sequence[Path]
    folder: Path
    tables: Path
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_forward_batch: int = 16
    progress: bool = True
    split: Split = field(default_factory=lambda: Split("a trial"))

    def tables_for(self, config: TrainConfig, settings: Mapping[str, Any]) -> Path:
        """The folder of the table for all photos with these masks."""
        return table_folder(self.tables, self.backbone, config, settings)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: how its head differs from the evidence head that ``TrainConfig("outcomes")`` trains.

    ``head``, ``shown`` and ``options`` are options of the head, of the head as an explainer, and of
    ``make``. ``train`` and ``table`` are settings of training and of the table of outcomes.
    ``photos`` limits the number of training photos.
    """

    about: str
    head: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    photos: int | None = None
    terms: Terms = outcome_terms
    head_class: type[Evidence] = Evidence
    make: Callable[[Trial, TrialRun], Explainer]

    def config(self, run: TrialRun, seed: int = 0) -> TrainConfig:
        """The settings of training; ``seed`` is added to the run's seed."""
        config = TrainConfig("outcomes", **{"seed": run.seed, **run.settings, **self.train})
        return replace(config, seed=config.seed + seed)

    def untrained(self, run: TrialRun, seed: int = 0) -> Evidence:
        """The head before training."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.config(run, seed).seed)
            head = self.head_class(run.backbone, **self.head)
        return head.to(run.backbone.device)

    def chosen(self, run: TrialRun) -> list[Path]:
        """The photos that the head is trained on."""
        count = self.photos or len(run.train)
        return run.split.fit(random.Random(run.seed).sample(list(run.train), count))

    def record(self, run: TrialRun) -> dict[str, Any]:
        """The record that the results depend on, apart from the backbone and the scored photos."""
        config = asdict(self.config(run))
        del config["workers"], config["checkpoint_every"]
        record = {
            "make": self.make.__name__, "terms": self.terms.__name__,  # type: ignore[attr-defined]
            "head_class": self.head_class.__name__, "head": self.untrained(run).options,
            "config": config, "table": self.table, "shown": self.shown, "options": self.options,
            "photos": self.photos, "seed": run.seed, "train": names(run.train),
        }  # fmt: skip
        return json.loads(json.dumps(record))  # as it reads after loading

    def explainer(self, run: TrialRun, head: Any) -> Explainer:
        """``head`` as an explainer."""
        shared: dict[str, Any] = {"seed": run.seed, "max_forward_batch": run.max_forward_batch}
        return create_explainer("head", run.backbone, head.eval(), **shared, **self.shown)


# ---------------------------------------------------------------------- tables


def first_table(trial: Trial, run: TrialRun) -> Outcomes | Path:
    """The table for all photos. With several crops, it is a folder inside the run's folder, for the
    training photos only, because crops are identified by a photo's index among these."""
    config = trial.config(run)
    if config.crops > 1:
        return run.folder / "table"
    return more_outcomes(run, config, trial.table)


def more_outcomes(run: TrialRun, config: TrainConfig, settings: Mapping[str, Any]) -> Outcomes:
    """The table of all photos with ``settings``; missing parts are computed."""
    return cache_outcomes(
        run.backbone, run.photos, run.tables_for(config, settings),
        masks=config.masks, workers=config.workers, progress=run.progress, **settings,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class JoinedOutcomes(Outcomes):
    """Several tables for one crop of the same photos, joined into one with the masks of all."""

    parts: tuple[Outcomes, ...] = ()

    @classmethod
    def of(cls, *parts: Outcomes) -> JoinedOutcomes:
        """Join ``parts`` under a new key."""
        first = parts[0]
        if any(part.names != first.names for part in parts):
            raise ValueError("table: the tables to be joined have other photos; give the same ones")
        own = {item.name: getattr(first, item.name) for item in fields(Outcomes)}
        joined = [part.digest for part in parts[1:]]
        own["key"] = {**first.key, "joined": joined, "masks": sum(part.masks for part in parts)}
        return cls(**own, parts=parts)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """Like :meth:`Outcomes.batch`, with the masks of all parts."""
        first, *more = (part.batch(index, crop) for part in self.parts)
        for other in more:
            rest = None
            if first.rest is not None and other.rest is not None:
                if not torch.equal(torch.as_tensor(first.classes), torch.as_tensor(other.classes)):
                    raise ValueError("table: the tables to be joined keep other classes of a photo")
                rest = torch.cat([first.rest, other.rest[:, 1:]], 1)
            masks = torch.cat([first.masks, other.masks], 1)
            logits = torch.cat([first.logits, other.logits[:, 1:]], 1)
            first = replace(first, masks=masks, logits=logits, rest=rest)
        return first

    def subset(self, photos: Sequence[int] | Sequence[str | Path] | Tensor) -> JoinedOutcomes:
        """Like :meth:`Outcomes.subset`, for all parts."""
        return JoinedOutcomes.of(*(part.subset(photos) for part in self.parts))


# ---------------------------------------------------------------------- training


@contextmanager
def opened_job(
    trial: Trial,
    run: TrialRun,
    folder: Path,
    *,
    seed: int = 0,
    terms: Terms | None = None,
    second: Outcomes | None = None,
    job: Callable[..., OutcomesJob] = OutcomesJob,
) -> Iterator[tuple[OutcomesJob, TrainConfig, Any, RunOptions]]:
    """The training job of a head, with the other arguments of :func:`~xattn.training.fitting.fit_job`."""
    backbone, config, photos = run.backbone, trial.config(run, seed), open_photos(trial.chosen(run))
    options = RunOptions(folder, (folder / RUN_FILE).is_file(), run.progress)
    given = first_table(trial, run)
    with processes.own_accelerator(backbone.device, config.precision) as accelerator:
        objective = objective_for(config)
        with table_for(backbone, photos, config, objective, given, options, 1, None) as (
            table,
            numbers,
        ):
            if second is not None:
                table = JoinedOutcomes.of(table, second.subset(table.names))
            terms = terms or trial.terms
            made = job(backbone, photos, table, numbers, config, accelerator, terms)
            yield made, config, accelerator, options


def trained(trial: Trial, run: TrialRun, folder: Path, *, seed: int = 0, **how: Any) -> Evidence:
    """The trained head, with its run in ``folder``; ``how`` is passed to :func:`opened_job`."""
    head = trial.untrained(run, seed)
    with opened_job(trial, run, folder, seed=seed, **how) as (job, config, accelerator, options):
        fit_job(head, run.backbone, job, config, accelerator, options)
    return head


def one_head(trial: Trial, run: TrialRun) -> Explainer:
    """A head trained on one table."""
    return trial.explainer(run, trained(trial, run, run.folder / "run"))


def untrained_head(trial: Trial, run: TrialRun) -> Explainer:
    """A head before training, which equals CAM whatever its parts."""
    return trial.explainer(run, trial.untrained(run))


def mean_of_heads(trial: Trial, run: TrialRun) -> Explainer:
    """Heads trained with several seeds (``heads``), whose scores are standardised and averaged."""
    folders = [run.folder / f"run-{i}" for i in range(trial.options["heads"])]
    heads = [trained(trial, run, folder, seed=SECOND * i) for i, folder in enumerate(folders)]
    return trial.explainer(run, MeanOfHeads(run.backbone, heads))


def on_two_tables(trial: Trial, run: TrialRun) -> Explainer:
    """A head trained on two tables; the second has new masks, with the settings in ``options``."""
    settings = {**trial.options, "seed": SECOND}
    second = more_outcomes(run, trial.config(run), settings)
    return trial.explainer(run, trained(trial, run, run.folder / "run", second=second))


def on_own_masks(trial: Trial, run: TrialRun) -> Explainer:
    """A head trained on two tables; the second's masks are thresholds of a first head's scores."""
    config = trial.config(run)
    first = trained(trial, run, run.folder / "first").eval()
    second = cache_outcomes(
        run.backbone, trial.chosen(run), run.folder / "second-table",
        masks=config.masks, kinds=("evidence",), seed=SECOND, workers=config.workers,
        guide=HeadGuide(first), progress=run.progress,
    )  # fmt: skip
    return trial.explainer(run, trained(trial, run, run.folder / "run", second=second))


def edge_aware(trial: Trial, run: TrialRun) -> Explainer:
    """A head with scores upsampled to pixels by a guided filter; ``options`` are the filter's."""
    head = trained(trial, run, run.folder / "run")
    shared: dict[str, Any] = {"seed": run.seed, "max_forward_batch": run.max_forward_batch}
    return EdgeAwareHead(backbone=run.backbone, head=head, **shared, **trial.options)


def closed_form(trial: Trial, run: TrialRun) -> Explainer:
    """A head without a network, with parameters that solve normal equations on the table."""
    head = trial.untrained(run)
    with opened_job(trial, run, run.folder / "run") as (job, config, *_):
        places, size = job.batches.places, config.batch_size
        blocks = [places[i : i + size] for i in range(0, len(places), size)]
        numbers = fit_in_closed_form(head, (job.draw(block, 0) for block in blocks))
    write_json(run.folder / "numbers.json", numbers.tolist())
    return trial.explainer(run, head)
