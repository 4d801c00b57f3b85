"""Train heads on a table of outcomes: the choice of classes, the batches, and the training step.

Maps are computed for a photo's own class and for other classes drawn from its most probable ones; an
objective computes their loss (:mod:`xattn.training.objectives`).
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.backbone.scored import target_record
from xattn.config import TrainConfig
from xattn.heads import Head
from xattn.photos.base import Photos
from xattn.training.data import TrainImages, load_batches, steps_per_epoch
from xattn.training.objectives.base import Objective, table_settings
from xattn.training.objectives.outcomes import reacts_to_masks
from xattn.training.outcomes import FEW, OutcomeBatch, Outcomes, cache_outcomes
from xattn.training.processes import Share
from xattn.training.run import Run, RunOptions

BLOCK = 16  # photos per pass
KEPT_BYTES = 2 << 30

Place = tuple[int, int]  # (crop, number of the photo)


class TapStore:
    """Store and return taps: ``store.taps(places)`` takes places (crop, photo), where crop 0 is the
    model's evaluation crop and all others are random.

    The crops are those of :class:`~xattn.training.data.TrainImages` with the number of the crop as the
    epoch. Blocks of 16 photos pass through the network together, so stored taps do not depend on earlier
    requests; taps that do not fit into ``limit`` bytes are computed each time.

    Args:
        numbers: the photos that may be requested, in the order in which they are read.
    """

    def __init__(
        self,
        backbone: Backbone,
        photos: Photos,
        config: TrainConfig,
        numbers: Sequence[int],
        crops: int = 1,
        limit: int = KEPT_BYTES,
    ) -> None:
        self.backbone, self.photos, self.config, self.limit = backbone, photos, config, limit
        self.places = [(crop, photo) for crop in range(crops) for photo in numbers]
        self._kept: dict[Place, Taps] = {}
        self._filled = False

    def _fill(self) -> None:
        """Compute the taps that are stored, in blocks, starting from the first place."""
        self._filled = True
        size = 0
        blocks = [self.places[i : i + BLOCK] for i in range(0, len(self.places), BLOCK)]
        with closing(self._computed(blocks)) as computed:
            for block, taps in zip(blocks, computed, strict=False):
                size += sum(t.numel() * t.element_size() for t in tap_tensors(taps))
                if size > self.limit:
                    return
                self._kept.update((place, image_taps(taps, i)) for i, place in enumerate(block))

    def all(self) -> Iterator[Taps]:
        """Yield the taps of all places, in blocks."""
        for i in range(0, len(self.places), BLOCK):
            yield self.taps(self.places[i : i + BLOCK])

    def taps(self, places: Sequence[Place]) -> Taps:
        """Return the taps of ``places``, as one batch."""
        if not self._filled:
            self._fill()
        lost = [place for place in places if place not in self._kept]
        rows = {}
        if lost:
            [computed] = self._computed([lost])
            rows = {place: image_taps(computed, i) for i, place in enumerate(lost)}
        return stack_taps([self._kept.get(place) or rows[place] for place in places])

    def _computed(self, blocks: Sequence[Sequence[Place]]) -> Generator[Taps, None, None]:
        with closing(run_passes(self.backbone, self.photos, self.config, blocks)) as computed:
            for taps, unreadable in computed:
                if taps is None or unreadable:
                    reason = unreadable[0] if unreadable else "no photo"
                    raise OSError(
                        "data: an image that could be read before can no longer be read "
                        f"({reason}); restore it, then continue"
                    )
                yield taps


@torch.no_grad()
def run_passes(
    backbone: Backbone, photos: Photos, config: TrainConfig, blocks: Sequence[Sequence[Place]]
) -> Generator[tuple[Taps | None, list[str]], None, None]:
    """For each block, yield the taps of its readable photos (None if there are none), and the reasons
    why other photos could not be read."""
    reference = next(backbone.parameters(), torch.zeros((), device="cpu"))
    dtype = torch.float64 if reference.dtype == torch.float64 else torch.float32
    images = _Crops(photos, backbone.preprocessing, config.seed, max_pixels=config.max_pixels)
    keys = [list(block) for block in blocks]
    with closing(load_batches(images, keys, config.workers if len(keys) > 1 else 0)) as batches:
        for batch, unreadable in batches:
            taps = None if batch is None else backbone(batch.to(backbone.device, dtype))
            yield taps, [reason for _, reason in unreadable]


def first_taps(
    backbone: Backbone, photos: Photos, config: TrainConfig, count: int
) -> Iterator[Taps]:
    """Yield the taps of the first ``count`` photos, as evaluation crops; unreadable photos are left
    out."""
    places = [(0, photo) for photo in range(min(count, len(photos)))]
    blocks = [places[i : i + BLOCK] for i in range(0, len(places), BLOCK)]
    with closing(run_passes(backbone, photos, config, blocks)) as computed:
        yield from (taps for taps, _ in computed if taps is not None)


class _Crops(TrainImages):
    """The evaluation crop of each photo for "epoch" 0, and augmented crops for all other epochs."""

    def __getitem__(self, key: Place) -> Any:  # type: ignore[override]
        self.augment = key[0] > 0
        return super().__getitem__(key)


def tap_tensors(taps: Taps) -> list[Tensor]:
    """Return all tensors of ``taps``."""
    rest = (taps.prefix, *taps.prefixes)
    return [taps.logits, *taps.maps, *(t for t in rest if t is not None)]


def image_taps(taps: Taps, index: int) -> Taps:
    """Return one image's taps, without the batch axis."""
    return taps.each(lambda tensor: tensor[index].clone())


def stack_taps(rows: Sequence[Taps]) -> Taps:
    """Combine taps of single images into those of a batch."""
    first = rows[0]
    return Taps(
        torch.stack([r.logits for r in rows]),
        tuple(torch.stack(maps) for maps in zip(*(r.maps for r in rows), strict=True)),
        None if first.prefix is None else torch.stack([r.prefix for r in rows]),  # type: ignore[misc]
        tuple(
            None if p[0] is None else torch.stack(p)  # type: ignore[arg-type]
            for p in zip(*(r.prefixes for r in rows), strict=True)
        ),
    )


# ---------------------------------------------------------------------- training


TOP = 12  # number of a photo's most probable classes whose outcomes are learned
# In the head's record.
ABOUT = ("crops", "masks", "kinds", "fills", "sizes", "players", "seed", "precision", "guide")
NO_REACTION = "its class does not react to masks"
Terms = Callable[[Tensor, OutcomeBatch, Tensor], dict[str, Tensor]]
"""The ``"loss"`` of scores, and other values to log, as in :meth:`Objective.table_loss`."""


@contextmanager
def table_for(
    backbone: Backbone,
    photos: Photos,
    config: TrainConfig,
    objective: Objective,
    table: str | Path | Outcomes | None,
    options: RunOptions,
    ranks: int,
    say: Callable[[str], object] | None,
) -> Iterator[tuple[Outcomes, list[int]]]:
    """Yield the table of ``photos`` for ``objective`` and, for each photo of the table, its number in
    ``photos``. Missing rows of the table are computed first, see :func:`~xattn.training.fitting.fit`.

    Raises:
        ValueError: ``table`` belongs to another network, or lacks photos.
    """
    if isinstance(table, Outcomes):
        _check_network(table, backbone)
        _check_masks(table, objective, config)
        yield _part(table, photos)
        return
    with tempfile.TemporaryDirectory(prefix="xattn-outcomes-") as temporary:
        folder = _table_folder(table, options.folder, ranks) or Path(temporary) / "outcomes"
        found = cache_outcomes(
            backbone,
            photos,
            folder,
            workers=config.workers,
            max_pixels=config.max_pixels,
            progress=options.progress,
            say=say,
            **table_settings(objective, config, backbone),
        )
        yield found, found.numbers


def _table_folder(table: str | Path | None, output: Path | None, ranks: int) -> Path | None:
    """Where the table is stored; None stores it only for the duration of the run."""
    if table is None and output is None:
        if ranks > 1:
            raise ValueError(
                "table: several processes need one shared folder; give table or output"
            )
        return None
    if output is None:
        return Path(str(table))
    place = Path(os.path.abspath(output))  # "." has no name
    if table is None:
        return place.with_name(f"{place.name}-outcomes")
    if place.resolve() in (Path(table).resolve(), *Path(table).resolve().parents):
        raise ValueError(f"table: {table} is in output, the folder of the run; choose another one")
    return Path(table)


def _check_network(table: Outcomes, backbone: Backbone) -> None:
    """Raise a ``ValueError`` unless ``table`` holds the answers of ``backbone``."""
    theirs = {"target": None, **table.key, "weights": table.key["backbone"]["sha256"]}
    own = {
        "target": None,
        **target_record(backbone),
        "weights": backbone.fingerprint,
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "task": backbone.task,
    }
    for name, value in own.items():
        if theirs[name] != value:
            raise ValueError(
                f"table: its outcomes were computed for {name} {theirs[name]}, but the backbone "
                f"has {value}; compute a table for this backbone"
            )


def _check_masks(table: Outcomes, objective: Objective, config: TrainConfig) -> None:
    """Raise a ``ValueError`` unless ``table`` has the fill, sizes and cells of ``config``, if they are
    set, and masks of the kind that ``objective`` needs."""
    fill = None if config.fill is None else [config.fill]
    asked = (
        ("fill", "fills", fill),
        ("sizes", "sizes", config.sizes),
        ("cells", "players", config.cells),
    )
    for name, key, value in asked:
        if value is not None and table.key[key] != value:
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}, but the table has {table.key[key]!r}; "
                f"leave out {name}, or give a folder for another table"
            )
    sizes, needed = table.key["sizes"], objective.sizes
    plays = table.key["players"] and table.key["empty"]
    if objective.players and (not plays or sizes != needed):
        raise ValueError(
            f"table: objective {objective.name} needs masks of players with sizes={needed!r} and the empty "
            f"photo, but the table has sizes={sizes!r}, players={table.key['players']}; give a "
            "folder instead"
        )


def _part(table: Outcomes, photos: Photos) -> tuple[Outcomes, list[int]]:
    """The rows of ``photos`` in a finished table, and the photo number of each row."""
    if table.crops > 1:
        raise ValueError(
            f"table: it has {table.crops} crops, which are identified by the photos' positions "
            "in the data that it was made from; give its folder, with that data"
        )
    names = [photos.name(i) for i in range(len(photos))]
    numbers = [i for i, found in enumerate(table.find(names)) if found is not None]
    return table.subset(names), numbers


@dataclass(frozen=True)
class OutcomePlaces:
    """One process's share of a batch of ``epoch``, as places (crop, number in the table)."""

    epoch: int
    places: list[Place]
    share: Share
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    failure: OSError | None = None

    def __len__(self) -> int:
        return len(self.places)


class OutcomeBatches:
    """The batches of a run on the ``places`` of a table; their order is a pure function of (seed,
    epoch)."""

    def __init__(
        self,
        photos: Photos,
        table: Outcomes,
        places: list[Place],
        config: TrainConfig,
        rank: int,
        ranks: int,
    ) -> None:
        if len(places) < ranks:
            raise ValueError(
                f"data: got {len(places)} photos for {ranks} processes; give more photos"
            )
        self.photos, self.table, self.places, self.config = photos, table, places, config
        self.rank, self.ranks = rank, ranks
        self.per_epoch = steps_per_epoch(len(places), config.batch_size, ranks)
        self.total = self.per_epoch * config.epochs

    def describe(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the original run."""
        return {"count": len(self.photos), "table": self.table.digest}

    def from_step(
        self, step: int, stopped: Callable[[], int]
    ) -> Generator[OutcomePlaces, None, None]:
        """Yield the batches from ``step`` to the end of the last epoch."""
        size = self.config.batch_size * self.ranks
        for number in range(step, self.total):
            epoch, place = divmod(number, self.per_epoch)
            if place == 0 or number == step:
                order = list(self.places)
                random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            batch = order[place * size : (place + 1) * size]
            rows = list(range(self.rank, len(batch), self.ranks))
            yield OutcomePlaces(epoch, [batch[i] for i in rows], Share(rows, size))


class OutcomesJob:
    """A job for an objective that reads a ``table``. Row i of the table is photo number ``numbers[i]``
    of ``photos``; ``terms`` computes the loss of a batch (:meth:`Objective.table_loss`)."""

    def __init__(
        self,
        backbone: Backbone,
        photos: Photos,
        table: Outcomes,
        numbers: list[int],
        config: TrainConfig,
        accelerator: Any,
        terms: Terms,
    ) -> None:
        self.table, self.numbers, self.config, self.terms = table, numbers, config, terms
        reacting = _reacting(table, config.batch_size)
        kept = [i for i, found in enumerate(reacting) if found]
        unmoved = [name for name, found in zip(table.names, reacting, strict=True) if not found]
        self.left_out = [*table.skipped, *((name, NO_REACTION) for name in unmoved)]
        if not kept:
            raise ValueError(
                f"data: the network's outputs do not react to masks in any of the {len(table)} "
                "photos, so there is nothing to learn; check the backbone's weights"
            )
        warned = len(table) < FEW and "subset" not in table.key  # when the table was opened
        if len(kept) < FEW and not warned and accelerator.is_main_process:
            warnings.warn(
                f"table: only {len(kept)} photos of {table.folder} can be used, but a head needs "
                f"{FEW} or more to learn from",
                stacklevel=3,  # fit
            )
        rank, ranks = accelerator.process_index, accelerator.num_processes
        places = [(crop, i) for crop in range(table.crops) for i in kept]
        self.batches = OutcomeBatches(photos, table, places, config, rank, ranks)
        self.about = {"table": {name: table.key[name] for name in ABOUT}}
        self.store = TapStore(backbone, photos, config, [numbers[i] for i in kept], table.crops)

    def calibration(self, backbone: Backbone) -> Iterable[Taps]:
        """Yield the taps of all photos, in all crops."""
        return self.store.all()

    def step(
        self, run: Run[Head], backbone: Backbone, batch: OutcomePlaces, counts: list[int]
    ) -> dict[str, float]:
        """Take a step; a process without a photo takes part with a photo of weight 0."""
        weight = counts[run.rank] * run.ranks / sum(counts)
        places = batch.places or self.batches.places[:1]
        return run.take_step(self.losses(run, backbone, places, batch), weight)

    def losses(
        self, run: Run[Head], backbone: Backbone, places: list[Place], batch: OutcomePlaces
    ) -> dict[str, Tensor]:
        """Compute the loss of the photos at ``places`` of a ``batch``, and its terms."""
        taps, outcomes, index = self.draw(places, batch.epoch)
        with run.forward(batch.share):
            scores = run.head(taps, index)
            auxiliary = run.head.auxiliary_loss()
        # Outside mixed precision, because sums over cells and masks need float32.
        terms = self.terms(scores, outcomes, index)
        terms["loss"] = terms["loss"] + auxiliary
        return terms

    def draw(self, places: list[Place], epoch: int) -> tuple[Taps, OutcomeBatch, Tensor]:
        """Return the taps and outcomes of the photos at ``places``, and the classes (B, M) whose maps are
        compared."""
        taps = self.store.taps([(crop, self.numbers[i]) for crop, i in places])
        crops = torch.tensor([crop for crop, _ in places], device="cpu")
        outcomes = self.table.batch([i for _, i in places], crops).to(taps.logits.device)
        seeds = [f"{self.config.seed}/{epoch}/{crop}/{i}" for crop, i in places]
        return taps, outcomes, drawn_classes(outcomes, seeds, self.config.others)


def _reacting(table: Outcomes, batch_size: int) -> list[bool]:
    """For each photo, whether its most probable class reacts to the masks of every crop."""
    found: list[bool] = []
    for first in range(0, len(table), batch_size):
        photos = range(first, min(first + batch_size, len(table)))
        crops = [table.batch(photos, crop) for crop in range(table.crops)]
        react = [reacts_to_masks(batch.masks, batch.log_odds(batch.top(1))) for batch in crops]
        found += torch.cat(react, 1).all(1).tolist()
    return found


def drawn_classes(outcomes: OutcomeBatch, seeds: Iterable[str], others: int) -> Tensor:
    """Draw classes (B, 1 + others): the class of each photo, followed by ``others`` of its most probable
    classes.

    For a multi-label network, the first class is one of the labels with p > 0.5, if there are any.
    """
    count = min(TOP, outcomes.logits.shape[2])
    top = outcomes.top(count)
    positive = [1] * len(top)
    if outcomes.task == "multilabel":
        positive = (outcomes.logits[:, 0] > 0).sum(1).clamp(1, count).tolist()
    places = []
    for seed, labels in zip(seeds, positive, strict=True):
        draw = random.Random(seed)
        own = draw.randrange(labels)
        rest = [i for i in range(count) if i != own]
        places.append([own, *draw.sample(rest, min(others, len(rest)))])
    return top.gather(1, torch.tensor(places, device=top.device))
