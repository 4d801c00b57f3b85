"""Heads trained on outcomes with random labels: a control that a sound head must beat.

    python -m xattn.eval.studies random-labels PHOTOS --head FOLDER --table FOLDER \\
        --labels classes --output runs/random-classes

The control has the options and the training of the trained head, on the same photos and masks. But
photo i gets labels of photo p(i), where p is a random cycle through all photos:

    classes     the outcomes are its own, the names of its classes are p(i)'s, rank by rank
    outcomes    the outcomes are those of p(i), which was seen under other masks

If a head is as faithful with random classes, it does not tell classes apart. With random outcomes,
nothing is left to learn but where objects usually are in photos. After Adebayo et al. 2018 (arXiv
1810.03292), section 4. The study :mod:`~xattn.eval.studies.head_sanity` compares the heads
(``--random-labels``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.study_backbone import study_backbone
from xattn.heads import Head, load_head
from xattn.heads.base import seeded_head
from xattn.photos.base import Data
from xattn.photos.sources import open_photos
from xattn.training import fit
from xattn.training.objectives.base import objective_for, table_settings
from xattn.training.outcomes import OutcomeBatch, Outcomes, cache_outcomes
from xattn.training.run_folder import RUN_FILE

Labels = Literal["classes", "outcomes"]


@dataclass(frozen=True, eq=False)
class RandomOutcomes(Outcomes):
    """A table whose batches have random ``labels``, drawn as a pure function of ``seed``."""

    labels: Labels = "classes"
    seed: int = 0

    @classmethod
    def of(cls, table: Outcomes, labels: Labels, seed: int = 0) -> RandomOutcomes:
        """``table`` with random labels, under a key of its own."""
        if len(table) < 2:
            raise ValueError(
                "table: got one photo; random labels are those of another, give two or more"
            )
        own = {field.name: getattr(table, field.name) for field in fields(Outcomes)}
        own["key"] = {**table.key, "random": [labels, seed]}
        return cls(**own, labels=labels, seed=seed)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """Like :meth:`Outcomes.batch`, with labels of other photos."""
        partner = cycle(len(self), self.seed)[np.asarray(index, dtype=np.int64)]
        own, other = super().batch(index, crop), super().batch(partner.tolist(), crop)
        if self.labels == "outcomes":
            return replace(own, logits=other.logits, classes=other.classes, rest=other.rest)
        return renamed(own, other)


def renamed(own: OutcomeBatch, other: OutcomeBatch) -> OutcomeBatch:
    """``own`` with the class names of ``other``, matched by rank of probability."""
    mine, theirs = (
        batch.logits[:, 0].argsort(dim=1, descending=True, stable=True) for batch in (own, other)
    )
    if own.classes is not None and other.classes is not None:
        names = other.classes.gather(1, theirs)
        return replace(own, classes=torch.empty_like(names).scatter_(1, mine, names))
    mine, theirs = (order[:, None].expand_as(own.logits) for order in (mine, theirs))
    logits = torch.empty_like(own.logits).scatter_(2, theirs, own.logits.gather(2, mine))
    return replace(own, logits=logits)


def cycle(count: int, seed: int) -> NDArray[np.int64]:
    """A partner other than itself for each of ``count`` photos, from one random cycle, (count,)."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def train_on_random_labels(
    trained: Head,
    backbone: Backbone,
    data: Data,
    table: str | Path,
    labels: Labels,
    output: str | Path,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Head:
    """A head with the options and the training of ``trained``, on random ``labels``.

    A killed run resumes, and a finished one is loaded.

    Args:
        data: what ``trained`` was trained on.
        table: the folder of its table of outcomes; missing parts are computed.
        output: the folder of the run; the head is saved in its subfolder ``head``.
        seed: of the labels; the order of photos and the initial weights are those of ``trained``.
    """
    settings = trained.summary.get("config", {})
    if settings.get("objective") != "outcomes" or settings.get("crops") != 1:
        raise ValueError(
            "head: it was not trained on a table of outcomes of one crop a photo; give one that was "
            "(xattn train --recipe outcomes)"
        )
    config = TrainConfig(**settings)
    photos = open_photos(data)
    say = print if progress else None
    found = cache_outcomes(
        backbone, photos, table, workers=config.workers, progress=progress, say=say,
        **table_settings(objective_for(config), config, backbone),
    )  # fmt: skip
    head = seeded_head(trained.name, backbone, config.seed, **trained.options)
    split = Split("random labels")
    fit(
        head,
        backbone,
        split.fit(photos),
        config,
        output=output,
        resume=(Path(output) / RUN_FILE).is_file(),
        progress=progress,
        table=RandomOutcomes.of(found, labels, seed),
    )
    split.write(Path(output) / "split.json")
    return head


@dataclass(frozen=True, kw_only=True)
class RandomLabels:
    """Train a head on random labels."""

    head: str  # Folder of the head that was trained on the true outcomes.
    data: tyro.conf.Positional[str]  # The photos that it was trained on.
    table: Path  # Folder of the table of outcomes that it was trained on.
    labels: Labels = "classes"  # What is random: the names of the classes, or all outcomes.
    output: Path = Path("runs/random-labels")  # Folder for the log, the checkpoints and the head.
    seed: int = 0  # Seed of the random labels.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    taps: tuple[str, ...] = ()  # See xattn train --help.
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = False
    """Memory format of the backbone; use the one with which the table was computed."""


def study(args: RandomLabels) -> Iterator[str]:
    """Train the head, or load it if it is finished, and yield the lines of the report."""
    backbone = study_backbone(args.backbone, args.weights, args.taps, args.channels_last)
    trained = load_head(args.head, backbone)
    train_on_random_labels(
        trained, backbone, args.data, args.table, args.labels, args.output, seed=args.seed
    )
    yield f"head: {args.output / 'head'}"
