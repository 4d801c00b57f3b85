"""How trials train: what a trial is, its tables of outcomes, and the ways to an explainer.

A way is called as ``make(trial, run)`` and gives the explainer that is scored. Everything it computes lies
in folders, so a trial that was killed goes on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.fold_rows import names
from xattn.eval.studies.trial_heads import EdgeAwareHead, MeanOfHeads, fit_in_closed_form
from xattn.explainers import Explainer, create_explainer
from xattn.heads.evidence import Evidence
from xattn.photos.sources import open_photos
from xattn.runtime.files import write_json
from xattn.training import processes
from xattn.training.fitting import fit_job
from xattn.training.outcome_fitting import (
    OutcomesJob,
    Terms,
    outcome_terms,
    table_for,
)
from xattn.training.outcomes import HeadGuide, OutcomeBatch, Outcomes, cache_outcomes
from xattn.training.run import RunOptions
from xattn.training.run_folder import RUN_FILE

SECOND = 1000  # seed of a second table; those of further heads are multiples of it


@dataclass(frozen=True, kw_only=True)
class TrialRun:
    """What a trial is run on: ``train`` of all ``photos``, which have tables of outcomes in ``tables``; its
    own ``folder``; ``settings`` of training that all trials share; and the ``split``, which has what it was
    trained on."""

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
        """The folder of the table of all photos with these masks; fold_rows has the same."""
        parts = [self.backbone.name, f"{config.crops}x{config.masks}"]
        for name, value in settings.items():
            parts += [name, "+".join(value) if isinstance(value, tuple | list) else str(value)]
        return self.tables / "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: how its head differs from the evidence head that ``TrainConfig("outcomes")`` trains.

    ``head`` are options of the head, ``train`` settings of training, ``table`` those of its table of
    outcomes, ``shown`` options of the head as an explainer, ``options`` those of ``make``; ``photos``
    limits the photos that it is trained on.
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
        """The settings of training; ``seed`` is added to the run's own."""
        config = TrainConfig("outcomes", **{"seed": run.seed, **run.settings, **self.train})
        return replace(config, seed=config.seed + seed)

    def untrained(self, run: TrialRun, seed: int = 0) -> Evidence:
        """The head as training begins."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(self.config(run, seed).seed)
            head = self.head_class(run.backbone, **self.head)
        return head.to(run.backbone.device)

    def chosen(self, run: TrialRun) -> list[Path]:
        """The photos that it is trained on."""
        count = self.photos or len(run.train)
        return run.split.fit(random.Random(run.seed).sample(list(run.train), count))

    def record(self, run: TrialRun) -> dict[str, Any]:
        """What its numbers depend on, beside the backbone and what is scored."""
        config = asdict(self.config(run))
        del config["workers"], config["checkpoint_every"]
        record = {
            "make": self.make.__name__, "terms": self.terms.__name__,  # type: ignore[attr-defined]
            "head_class": self.head_class.__name__, "head": self.untrained(run).options,
            "config": config, "table": self.table, "shown": self.shown, "options": self.options,
            "photos": self.photos, "seed": run.seed, "train": names(run.train),
        }  # fmt: skip
        return json.loads(json.dumps(record))  # as it is read back

    def explainer(self, run: TrialRun, head: Any) -> Explainer:
        """``head`` as an explainer."""
        shared: dict[str, Any] = {"seed": run.seed, "max_forward_batch": run.max_forward_batch}
        return create_explainer("head", run.backbone, head.eval(), **shared, **self.shown)


# ---------------------------------------------------------------------- tables


def first_table(trial: Trial, run: TrialRun) -> Outcomes | Path:
    """The table of all photos. Of several crops it is a folder in the run's own, for the photos that are
    trained on: their crops are known by their places among these."""
    config = trial.config(run)
    if config.crops > 1:
        return run.folder / "table"
    return more_outcomes(run, config, trial.table)


def more_outcomes(run: TrialRun, config: TrainConfig, settings: Mapping[str, Any]) -> Outcomes:
    """The table of all photos with ``settings``, computed as far as it is not there."""
    return cache_outcomes(
        run.backbone, run.photos, run.tables_for(config, settings),
        masks=config.masks, workers=config.workers, progress=run.progress, **settings,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class JoinedOutcomes(Outcomes):
    """Several tables of one crop of the same photos as one, with the masks of all."""

    parts: tuple[Outcomes, ...] = ()

    @classmethod
    def of(cls, *parts: Outcomes) -> JoinedOutcomes:
        """``parts`` under a key of its own.

        Raises:
            ValueError: their photos differ.
        """
        first = parts[0]
        if any(part.names != first.names for part in parts):
            raise ValueError("table: the tables to be joined have other photos; give the same ones")
        own = {item.name: getattr(first, item.name) for item in fields(Outcomes)}
        joined = [part.digest for part in parts[1:]]
        own["key"] = {**first.key, "joined": joined, "masks": sum(part.masks for part in parts)}
        return cls(**own, parts=parts)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """As :meth:`Outcomes.batch`, with the masks of all parts."""
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
        """As :meth:`Outcomes.subset`, of all parts."""
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
    """The job of training a head, and what else :func:`~xattn.training.fitting.fit_job` asks for."""
    backbone, config, photos = run.backbone, trial.config(run, seed), open_photos(trial.chosen(run))
    options = RunOptions(folder, (folder / RUN_FILE).is_file(), run.progress)
    given = first_table(trial, run)
    with processes.own_accelerator(backbone.device, config.precision) as accelerator:
        with table_for(backbone, photos, config, given, options, 1, None) as (table, numbers):
            if second is not None:
                table = JoinedOutcomes.of(table, second.subset(table.names))
            terms = terms or trial.terms
            made = job(backbone, photos, table, numbers, config, accelerator, terms)
            yield made, config, accelerator, options


def trained(trial: Trial, run: TrialRun, folder: Path, *, seed: int = 0, **how: Any) -> Evidence:
    """The trained head; its run lies in ``folder``, and ``how`` is handed to :func:`opened_job`."""
    head = trial.untrained(run, seed)
    with opened_job(trial, run, folder, seed=seed, **how) as (job, config, accelerator, options):
        fit_job(head, run.backbone, job, config, accelerator, options)
    return head


def one_head(trial: Trial, run: TrialRun) -> Explainer:
    """A head, trained on one table."""
    return trial.explainer(run, trained(trial, run, run.folder / "run"))


def untrained_head(trial: Trial, run: TrialRun) -> Explainer:
    """A head as training begins: CAM, whatever its parts."""
    return trial.explainer(run, trial.untrained(run))


def mean_of_heads(trial: Trial, run: TrialRun) -> Explainer:
    """Heads of ``heads`` seeds, whose scores are standardised and averaged."""
    folders = [run.folder / f"run-{i}" for i in range(trial.options["heads"])]
    heads = [trained(trial, run, folder, seed=SECOND * i) for i, folder in enumerate(folders)]
    return trial.explainer(run, MeanOfHeads(run.backbone, heads))


def on_two_tables(trial: Trial, run: TrialRun) -> Explainer:
    """A head, trained on two tables: the second has fresh masks, with the settings of ``options``."""
    settings = {**trial.options, "seed": SECOND}
    second = more_outcomes(run, trial.config(run), settings)
    return trial.explainer(run, trained(trial, run, run.folder / "run", second=second))


def on_own_masks(trial: Trial, run: TrialRun) -> Explainer:
    """A head, trained on two tables: the masks of the second are thresholds of a first head's scores."""
    config = trial.config(run)
    first = trained(trial, run, run.folder / "first").eval()
    second = cache_outcomes(
        run.backbone, trial.chosen(run), run.folder / "second-table",
        masks=config.masks, kinds=("evidence",), seed=SECOND, workers=config.workers,
        guide=HeadGuide(first), progress=run.progress,
    )  # fmt: skip
    return trial.explainer(run, trained(trial, run, run.folder / "run", second=second))


def edge_aware(trial: Trial, run: TrialRun) -> Explainer:
    """A head whose scores a guided filter takes to the photo's pixels; ``options`` are the filter's."""
    head = trained(trial, run, run.folder / "run")
    shared: dict[str, Any] = {"seed": run.seed, "max_forward_batch": run.max_forward_batch}
    return EdgeAwareHead(backbone=run.backbone, head=head, **shared, **trial.options)


def closed_form(trial: Trial, run: TrialRun) -> Explainer:
    """A head without its network, whose numbers solve normal equations of the table."""
    head = trial.untrained(run)
    with opened_job(trial, run, run.folder / "run") as (job, config, *_):
        places, size = job.batches.places, config.batch_size
        blocks = [places[i : i + size] for i in range(0, len(places), size)]
        numbers = fit_in_closed_form(head, (job.drawn(block, 0) for block in blocks))
    write_json(run.folder / "numbers.json", numbers.tolist())
    return trial.explainer(run, head)
