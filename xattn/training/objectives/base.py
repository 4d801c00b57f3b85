"""Objectives, which are selected by name: each defines a loss that explanation heads can be trained with.

    xattn train PHOTOS --objective shapley:link=log_odds

An objective reads one of two things. A *table* of outcomes holds the network's outputs for masked photos
(:mod:`xattn.training.outcomes`), so that a training step needs no pass through the network. *Photos* are
passed through the frozen network in each step. Any explanation head can be trained with any objective.

    @register_objective("mine")
    class Mine(Objective):
        def table_loss(self, scores, outcomes, index): return {"loss": ...}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.backbone.dropped import droppable_grid
from xattn.backbone.taps import averaged
from xattn.config import TrainConfig
from xattn.heads.fusion import resize
from xattn.kernels.softmax.reference import widen
from xattn.registry import Registry, make_adopter, with_checked_name
from xattn.runtime.distributed import gather
from xattn.training.outcome_rows import DROP, NESTED
from xattn.training.outcomes import OutcomeBatch

Terms = dict[str, Tensor]
"""Scalars: the ``"loss"`` and other values to log."""
CELLS = 7  # cells per side in a game
Link = Literal["probability", "log_odds", "logit"]


@dataclass(frozen=True)
class ObjectiveEntry:
    """The registry's entry for an objective: its name, a one-line description, and its source."""

    name: str
    title: str = ""
    paper: str = ""


@dataclass(frozen=True)
class Part:
    """The part of a batch that one of several processes computes.

    ``places`` (B,) are the positions of its images in the whole batch, ``counts`` the numbers of images of
    all processes, and ``rank`` is the number of this process. A process without images trains on a
    placeholder.
    """

    places: Tensor
    counts: Sequence[int]
    rank: int = 0

    def gather_targets(self, target: Tensor) -> tuple[Tensor, int]:
        """Return the targets of all images, process by process, and the position of this process's first
        image."""
        if len(self.counts) == 1:
            return target, 0
        own = target[: self.counts[self.rank]]
        everyone = torch.cat([t.to(target.device) for t in gather(own.cpu())])
        return everyone, sum(self.counts[: self.rank]) if len(own) else 0


@dataclass(frozen=True)
class Step:
    """A step on photos: ``images`` (B, 3, H, W) in [0, 1]; ``part`` is their place in a batch that several
    processes share, by default the whole batch; ``progress`` is the fraction of steps completed; ``seed``
    determines the random draws."""

    head: Any
    backbone: Backbone
    images: Tensor
    config: TrainConfig
    part: Part = None  # type: ignore[assignment]
    progress: float = 0.0
    seed: str = ""

    def __post_init__(self) -> None:
        if self.part is None:
            count = len(self.images)
            part = Part(torch.arange(count, device=self.images.device), [count])
            object.__setattr__(self, "part", part)

    def draws(self) -> list[torch.Generator]:
        """Return a random generator for each image, which depends on its position in the whole batch and
        not on the process."""
        seeds = [random.Random(f"{self.seed}/{place}") for place in self.part.places.tolist()]
        return [torch.Generator().manual_seed(seed.getrandbits(63)) for seed in seeds]


class Objective:
    """Base class of all objectives. A subclass defines either :meth:`table_loss` or :meth:`on_photos`, and
    its ``reads`` states which one.

    With ``players``, the objective needs masks of the cells of a fixed grid (the players of a game), with a
    single fill, and the network's output for the empty photo; ``sizes`` is the default distribution of mask
    sizes.

    Example:
        >>> from xattn.training.objectives.base import create_objective
        >>> create_objective("outcomes").reads
        'table'
    """

    name: ClassVar[str]
    reads: Literal["table", "photos"] = "table"
    players: ClassVar[bool] = False
    sizes: ClassVar[str] = "even"

    def table_loss(self, scores: Tensor, outcomes: OutcomeBatch, index: Tensor) -> Terms:
        """Compute the loss of maps.

        Args:
            scores: the maps (B, M, h, w) of the classes ``index`` (B, M), with each photo's own class
                first.
            outcomes: the network's outputs for B photos under N masks each.
        """
        raise NotImplementedError

    def on_photos(self, step: Step) -> Terms:
        """Compute the loss of a batch of photos; gradients reach only the head."""
        raise NotImplementedError


def register_objective(name: str, **about: Any) -> Callable[[type[Objective]], type[Objective]]:
    """Register an objective for :func:`create_objective` under ``name``, and check its options against the
    annotations of its constructor; this is a class decorator.

    Args:
        about: further fields of :class:`ObjectiveEntry`.

    Example:
        >>> from xattn.training import Objective, register_objective
        >>> from xattn.training.objectives.base import OBJECTIVES
        >>> @register_objective("nothing_again", title="no loss at all")
        ... class Nothing(Objective):
        ...     def table_loss(self, scores, outcomes, index):
        ...         return {"loss": scores.sum() * 0}
        >>> "nothing_again" in OBJECTIVES.names()
        True
    """
    return OBJECTIVES.register(ObjectiveEntry(name, **about))


def table_settings(objective: Objective, config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """Return the mask settings (:class:`~xattn.training.outcome_rows.MaskSettings`) of the table for
    ``objective``.

    The players are the cells of a 7 x 7 grid, or the patches if patches are dropped.

    Raises:
        ValueError: the network does not support the fill.
    """
    sizes = objective.sizes if objective.players else config.sizes or objective.sizes
    fill = config.fill
    settings: dict[str, Any] = {
        "crops": config.crops, "masks": config.masks, "seed": config.seed, "sizes": sizes,
        "precision": "bf16" if config.precision == "bf16" else "no",
    }  # fmt: skip
    if fill is not None or objective.players:
        settings["fills"] = [fill or "black"]
    if objective.players:
        side = config.cells or (droppable_grid(backbone)[0] if fill == DROP else CELLS)
        settings.update(players=side, empty=True)
        if sizes in NESTED:
            settings["masks"] = 2 * (side**2 - 1)
    return settings


OBJECTIVES: Registry[Objective, ObjectiveEntry] = Registry(
    "xattn.objectives",
    base=Objective,
    homes=("xattn.training.objectives",),
    argument="objective",
    noun="objective",
    adopt=make_adopter(Objective, register_objective),
    mark=with_checked_name,
)

list_objectives = OBJECTIVES.names
create_objective = OBJECTIVES.create


def objective_for(config: TrainConfig) -> Objective:
    """Create the objective of ``config``, with its options.

    Raises:
        ValueError: the name (the message gives near matches) or an option is unknown.
    """
    name, options = parse_mechanism(config.objective)
    return create_objective(name, **options)


# ---------------------------------------------------------------------- maps as games


def resample_to_cells(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resample maps (B, M, h, w) or (B, M, t, h, w) to ``size`` cells: finer maps are averaged, coarser
    ones interpolated linearly."""
    finer = any(have > want for have, want in zip(maps.shape[2:], size, strict=True))
    return averaged(maps, size) if finer else resize(maps, size)


def masks_as_game(
    scores: Tensor, outcomes: OutcomeBatch, index: Tensor, link: Link
) -> tuple[Tensor, ...]:
    """Return the quantities of a photo's masks as a game of d players: phi (B, M, d), the masks s (B, N,
    d), the values v(s) (B, M, N), and the values (B, M) of the empty set, v(0), and of the full set, v(1).

    For scores S, phi = S / d, so that the sums of maps with values near 1 have the same order of magnitude
    as v.
    """
    masks = widen(outcomes.masks)
    maps = resample_to_cells(widen(scores), tuple(masks.shape[2:])).flatten(2)
    ends = outcomes.ends.values(index, link).to(maps.dtype)
    values = outcomes.values(index, link).to(maps.dtype)
    return maps / maps.shape[2], masks.flatten(2).to(maps.dtype), values, ends[..., 0], ends[..., 1]
