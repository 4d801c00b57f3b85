"""Compute one row of a table of outcomes: a network's logits for a photo and for the photo under masks.

A row takes two passes, one of the photo and one of all its masked images together; the passes always have
the same shapes, so no row depends on another. If a network has more than 2,000 classes, only the 256
logits z that are highest on the photo are stored, together with the log-sum-exp r_j of all others, so that

    p_jk = exp z_jk / (sum_{i kept} exp z_ji + exp r_j),    r_j = log sum_{i not kept} exp z_ji

is the softmax over all classes k under mask j.

Masks come in complementary pairs on a grid of cells. A mask (H, W), or (T, H, W) of a clip, keeps the
pixels where it is 1; its complement keeps all other pixels. In training, a mask is represented by the share
of each of 28 x 28 cells that it keeps (``cells``); for a clip there is a cell for each frame, or 28 if it
has more. If the objective is a game, its players are used instead: cells of a coarser grid that a mask
keeps or removes as a whole. All draws are a pure function of the seed.

For a network that reads a class token, patches can be dropped instead of filled (``fills=["drop"]``): only
the remaining tokens pass through the network, so a pass is cheaper if fewer of them remain. Masks then
consist of patches. All masks in a group of four pairs keep the same number of patches, and every mask
keeps at least one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone, Taps, sha256
from xattn.backbone.dropped import apply_by_set_size, droppable_grid, logits_of_patches
from xattn.backbone.taps import averaged, resized
from xattn.config import Fill
from xattn.heads import Head
from xattn.runtime.memory import raise_on_out_of_memory
from xattn.runtime.names import count_phrase
from xattn.runtime.option_checks import Condition, Count, Whole, check_fields

CELLS = 28
Kind = Literal["squares32", "squares16", "blobs", "evidence", "superpixels", "cells"]
Sizes = Literal["even", "shapley", "curve", "half", "walk", "greedy"]
KINDS: tuple[Kind, ...] = ("squares32", "squares16", "blobs", "evidence")
FILLS: tuple[Fill, ...] = ("black", "blur", "mean")
DROP: Fill = "drop"
LEVELS = (0.2, 0.8)  # range of the share that a mask keeps
EDGES = (0.02, 0.15)  # range for "curve": the first of a pair keeps this share, the second the rest
ALIKE = 4  # number of successive pairs of dropped patches that keep equally many
NESTED: tuple[Sizes, ...] = ("walk", "greedy")


def size_weights(sizes: str, players: int) -> Tensor:
    """Return the probability that a mask keeps m = 1 .. d - 1 of d ``players``, (d - 1,) float64, with sum
    1.

    >>> size_weights("shapley", 4)  # as 1 / (m (d - m))
    tensor([0.3636, 0.2727, 0.3636], dtype=torch.float64)

    With ``"half"``, each player is kept with probability 1/2, but a mask never keeps none or all of them.
    """
    kept = torch.arange(1, players, dtype=torch.float64, device="cpu")
    if sizes == "shapley":
        weights = 1 / (kept * (players - kept))
        return weights / weights.sum()
    return (-torch.lgamma(kept + 1) - torch.lgamma(players - kept + 1)).softmax(0)


class MaskPairs(NamedTuple):
    """``cells`` (P, g, g), or (P, t, g, g) of a clip, uint8: the kept share of each cell in units of 1/255;
    and ``images`` (2 P, 3, H, W): the photo under each mask, then under each complement."""

    cells: Tensor
    images: Tensor


def mask_pairs(
    image: Tensor,
    evidence: Tensor,
    pairs: int,
    seed: str,
    kinds: Sequence[str] = KINDS,
    fills: Sequence[str] = FILLS,
    sizes: str = "even",
    grid: tuple[int, ...] = (CELLS, CELLS),
) -> MaskPairs:
    """Create ``pairs`` masks of an ``image`` (3, H, W) in [0, 1], their complements, and the masked
    images. In a clip (3, T, H, W), squares, blobs and superpixels also extend in time.

    Args:
        evidence: a first guess (h, w) of the evidence that the network uses; ``"evidence"`` masks are
            obtained by adding noise to it and thresholding.
        seed: determines the draws; masks differ for each photo and crop.
        kinds: ``"squares32"`` and ``"squares16"`` keep squares of a 7 x 7 and a 14 x 14 grid (32 and 16 of
            224 pixels), ``"blobs"`` keeps the region where smooth noise exceeds a threshold,
            ``"superpixels"`` keeps superpixels of SLIC, and ``"cells"`` keeps any cells of ``grid``; pair
            i has kind i modulo the number of kinds.
        fills: what replaces the removed parts, drawn for each pair: ``"black"``, ``"blur"`` (the image
            reduced to 14 x 14, frame by frame) or ``"mean"`` (its mean colour).
        sizes: how much masks keep: ``"even"`` keeps a share of .2 to .8; ``"curve"`` keeps .02 to .15, and
            the complement the rest; for ``"shapley"`` and ``"half"``, see :func:`size_weights`; ``"walk"``
            keeps the first cells of a single order of all cells.
        grid: the cells of masks; squares need 28 x 28, or (t, 28, 28) of a clip.
    """
    rng = random.Random(seed)
    draw = torch.Generator().manual_seed(rng.getrandbits(63))
    size = tuple(image.shape[1:])
    sampler = _Masks(evidence, rng, draw, sizes, grid)
    cells, images = [], []
    for i in range(pairs):
        kind = kinds[i % len(kinds)]
        if kind == "superpixels":
            mask = _superpixels(image, rng, draw)
            share = averaged(mask[None, None], grid)[0, 0]
        else:
            share = sampler.cells(kind, sampler.level())
            mask = F.interpolate(share[None, None], size, mode="nearest-exact")[0, 0]
        behind = replacement_pixels(image, rng.choice(list(fills)))
        mask = mask.to(image)
        cells.append((share * 255).round().to(torch.uint8))
        images.append((mask * image + (1 - mask) * behind, (1 - mask) * image + mask * behind))
    kept, hidden = zip(*images, strict=True)
    return MaskPairs(torch.stack(cells), torch.stack([*kept, *hidden]))


def patch_masks(
    evidence: Tensor,
    pairs: int,
    seed: str,
    kinds: Sequence[str],
    sizes: str,
    grid: tuple[int, ...],
) -> Tensor:
    """Create ``pairs`` masks of the patches of ``grid``, (P, h, w) of 0 and 1; the masks in a group of
    four keep the same number of patches, unless they are the beginnings of an order."""
    rng = random.Random(seed)
    sampler = _Masks(evidence, rng, torch.Generator().manual_seed(rng.getrandbits(63)), sizes, grid)
    alike = 1 if sizes in NESTED else ALIKE
    levels = [sampler.level() for _ in range(-(-pairs // alike))]
    return torch.stack(
        [sampler.cells(kinds[i % len(kinds)], levels[i // alike]) for i in range(pairs)]
    )


def log_odds(logits: Tensor, index: Tensor, task: str) -> Tensor:
    """Compute log p / (1 - p) of classes ``index`` (..., M) from ``logits`` (..., K), (..., M): z_k minus
    the log-sum-exp of all other logits, or z_k (multilabel)."""
    chosen = logits.gather(-1, index)
    if task == "multilabel":
        return chosen
    others = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
    others = others.scatter(-1, index.unsqueeze(-1), -torch.inf)
    return chosen - others.logsumexp(-1)


def masks_of(cells: Tensor) -> Tensor:
    """Convert (B, P, h, w) uint8 to all masks (B, 2 P, h, w), float32 in [0, 1], with the complements
    last."""
    kept = cells.float() / 255
    return torch.cat([kept, 1 - kept], dim=1)


def replacement_pixels(image: Tensor, fill: str) -> Tensor:
    """Return the pixels (3, H, W) that replace removed pixels of ``image`` (3, H, W), or (3, T, H, W) of a
    clip."""
    if fill == "black":
        return torch.zeros_like(image)
    if fill == "mean":
        return image.mean(tuple(range(1, image.ndim)), keepdim=True).expand_as(image)
    planes = image.flatten(0, -3)[None]
    return resized(averaged(planes, (14, 14)), image.shape[-2:]).view_as(image)


class _Masks:
    """Draws masks of the cells of ``grid``, 0 or 1, for one photo or clip; ``evidence`` (h, w) or (t, h, w)
    is a guess of what matters."""

    def __init__(
        self,
        evidence: Tensor,
        rng: random.Random,
        draw: torch.Generator,
        sizes: str,
        grid: tuple[int, ...],
    ) -> None:
        self.evidence, self.rng, self.draw = evidence, rng, draw
        self.sizes, self.grid = sizes, grid
        self.players = math.prod(grid)
        self.walk = iter(range(1, self.players))
        self.order: Tensor | None = None

    def level(self) -> float:
        """Draw the share that a mask keeps."""
        if self.sizes == "even":
            return self.rng.uniform(*LEVELS)
        if self.sizes == "curve":
            return self.rng.uniform(*EDGES)
        if self.sizes == "walk":
            return next(self.walk) / self.players
        weights = size_weights(self.sizes, self.players)
        return (1 + int(weights.multinomial(1, generator=self.draw))) / self.players

    def cells(self, kind: str, level: float) -> Tensor:
        """A mask that keeps the share ``level``."""
        if kind in ("squares32", "squares16"):
            return self._squares(4 if kind == "squares32" else 2, level)
        if kind == "cells":
            return self._any_cells(level)
        if kind == "blobs":
            return _above(self._smooth_noise(), level)
        guess = resized(self.evidence[None, None].float().cpu(), self.grid)[0, 0]
        noise = self._smooth_noise() * self.rng.uniform(0.2, 1.0)
        return _above(_standardised(guess) + noise, level)

    def _squares(self, side: int, level: float) -> Tensor:
        sides = self._scaled(side)
        counts = [(n + own - 2) // own + 1 for n, own in zip(self.grid, sides, strict=True)]
        field = torch.rand(counts, generator=self.draw)
        for axis, own in enumerate(sides):  # the squares may start anywhere
            start = self.rng.randrange(own)
            field = field.repeat_interleave(own, axis).narrow(axis, start, self.grid[axis])
        kept = (field < level).float()
        mixed = 0 < kept.sum() < kept.numel()
        # For other sizes an empty or full mask is common, so keep the share to the nearest cell.
        return kept if mixed or self.sizes == "even" else _above(-field, level)

    def _any_cells(self, level: float) -> Tensor:
        """Random cells, with each set of that size equally likely; for "walk" the first cells of one
        order."""
        if self.order is None or self.sizes != "walk":
            self.order = torch.randperm(self.players, generator=self.draw, device="cpu")
        mask = torch.zeros(self.players, device="cpu")
        mask[self.order[: min(max(1, round(level * self.players)), self.players - 1)]] = 1
        return mask.view(self.grid)

    def _smooth_noise(self) -> Tensor:
        """Gaussian noise on the grid's cells, smoothed over 2 to 5 of 28, with unit variance."""
        size = self._scaled(self.rng.choice((6, 8, 10, 14)))
        coarse, mode = torch.randn(1, 1, *size, generator=self.draw), "bicubic"
        mode = mode if len(size) == 2 else "trilinear"
        field = F.interpolate(coarse, self.grid, mode=mode, align_corners=False)[0, 0]
        return _standardised(field)

    def _scaled(self, side: int) -> list[int]:
        """``side`` of 28 cells in space, and the same share of the cells in time."""
        return [*(max(1, round(side * n / CELLS)) for n in self.grid[:-2]), side, side]


def _standardised(field: Tensor) -> Tensor:
    return (field - field.mean()) / field.std().clamp_min(1e-12)


def _above(field: Tensor, level: float) -> Tensor:
    """1 in the share ``level`` of the cells where ``field`` is highest."""
    count = max(1, min(field.numel() - 1, round(level * field.numel())))
    chosen = torch.zeros(field.numel(), device="cpu")
    chosen[field.flatten().argsort(descending=True, stable=True)[:count]] = 1
    return chosen.view_as(field)


def _superpixels(image: Tensor, rng: random.Random, draw: torch.Generator) -> Tensor:
    """Some of SLIC's superpixels, (H, W), or supervoxels, (T, H, W)."""
    from skimage.segmentation import slic

    pixels = image.detach().double().movedim(0, -1).cpu().numpy()
    labels = slic(pixels, rng.choice((30, 60, 100)), start_label=0, channel_axis=-1)
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    keep = torch.rand(int(labels.max()) + 1, generator=draw) < rng.uniform(*LEVELS)
    return keep.float()[torch.from_numpy(labels)]


# ---------------------------------------------------------------------- a row


SEARCHED = 64  # images per pass of a search
MANY, KEPT = 2_000, 256  # networks with more than MANY classes store KEPT logits
EVIDENCE: Kind = "evidence"  # the kind of masks that use a first guess
Precision = Literal["no", "bf16"]


class Guide(Protocol):
    """A first guess of the evidence for a class, ``guide(taps, class_index (1, 1)) -> (1, 1, h, w)``;
    ``id`` identifies it in the key of a table."""

    @property
    def id(self) -> str: ...

    def __call__(self, taps: Taps, class_index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class HeadGuide:
    """Use the scores of a trained ``head`` as a guide, for a second table with masks from the head's
    maps."""

    head: Head

    @property
    def id(self) -> str:
        """The head's name and the SHA-256 of its weights."""
        return f"{self.head.name} {sha256(self.head)}"

    def __call__(self, taps: Taps, class_index: Tensor, /) -> Tensor:
        if self.head.training:
            raise ValueError("guide: the head is in training mode; call head.eval() first")
        self.head.check_taps(taps)
        return self.head(taps, class_index)


_EVEN = "an even number of at least 2, since masks come in pairs"


@dataclass(frozen=True)
class MaskSettings:
    """The settings for the masks of each photo.

    Args:
        crops: number of crops of every photo. The first is the evaluation crop; the others are random
            crops and flips, which are pure functions of (seed, crop, index).
        masks: number of masks of every crop; half of them are the complements of the others.
        kinds, fills: see :func:`mask_pairs`; ``fills=["drop"]`` drops patches of a ViT from its sequence,
            and has its own kinds.
        seed: masks are a pure function of (seed, crop, index).
        precision: ``"bf16"`` computes the passes in mixed precision.
        sizes: how much masks keep, see :func:`size_weights`; ``"walk"`` keeps the first players of a
            random order, ``"greedy"`` the first players of an order that a search finds.
        players: number of cells per side that masks keep or remove as a whole; 0 for masks of many kinds.
        empty: whether the table includes the photo with nothing kept.
    """

    crops: Count = 1
    masks: Annotated[int, Condition(lambda n: n > 0 and n % 2 == 0, _EVEN)] = 16
    kinds: Annotated[Sequence[Kind], Condition(bool, f"a list of {', '.join(get_args(Kind))}")] = (
        KINDS
    )
    fills: Annotated[Sequence[Fill], Condition(bool, f"a list of {', '.join(get_args(Fill))}")] = (
        FILLS
    )
    seed: int = 0
    precision: Precision = "no"
    sizes: Sizes = "even"
    players: Whole = 0
    empty: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if DROP in self.fills and (len(self.fills) > 1 or self.precision != "no"):
            raise ValueError(
                f"fills: got {', '.join(self.fills)} with precision={self.precision!r}; drop "
                "cannot be combined with other fills or lower precision; leave these out"
            )
        if self.empty and len(self.fills) > 1:
            raise ValueError(
                f"fills: got {', '.join(self.fills)}; the empty photo needs a single fill; give one"
            )
        if self.players == 1:
            raise ValueError("cells: got 1 per side, but a game needs players; give at least 2")
        count = 2 * (self.players**2 - 1)
        if self.sizes in NESTED and (not self.players or self.masks != count):
            raise ValueError(
                f"masks: got {self.masks}, but {self.sizes} needs one mask for each beginning of "
                f"an order and one for its complement; give {count}"
            )

    @property
    def kinds_of_masks(self) -> Sequence[Kind]:
        """The kinds of masks: ``kinds`` or, for players or dropped patches, the kinds that suit such
        cells."""
        if self.players:
            return ("cells",)
        if DROP in self.fills:
            return ("cells", "blobs", EVIDENCE)
        return self.kinds


def row_layout(
    settings: MaskSettings, grid: tuple[int, ...], classes: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shape and dtype of the tensors of a row: ``cells``; ``logits``, starting with the clean
    image and ending with the empty photo if that is included; and, for a network with more than
    :data:`MANY` classes, ``classes`` and ``rest``."""
    many, images = classes > MANY, 1 + settings.masks + settings.empty
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "cells": ((settings.masks // 2, *grid), torch.uint8),
        "logits": ((images, KEPT if many else classes), torch.float16),
    }
    if many:
        layout["classes"] = ((KEPT,), torch.int32)
        layout["rest"] = ((images,), torch.float32)
    return layout


def grid_of(backbone: Backbone, settings: MaskSettings) -> tuple[int, ...]:
    """Return the cells of a table's masks.

    Raises:
        ValueError: the network does not support dropping patches or, if it reads clips, players; or the
            cells do not fit its patch grid.
    """
    players = (settings.players, settings.players)
    time = [min(CELLS, n) for n in backbone.preprocessing.places[:-2]]
    if time and settings.players:
        raise ValueError(
            f"objective: games have the cells of photos as players, but {backbone.name} reads clips; use "
            f"'outcomes'"
        )
    if DROP not in settings.fills:
        return players if settings.players else (*time, CELLS, CELLS)
    patches = droppable_grid(backbone)
    if settings.players and players != patches:
        height, width = patches
        raise ValueError(
            f"cells: got {settings.players} per side, but {backbone.name} has {height} x {width} "
            f"patches; give {height}"
        )
    return patches


def guess_name(backbone: Backbone, guide: Guide | None, kinds: Sequence[str]) -> str | None:
    """Return the source of ``"evidence"`` masks, which is part of the key; None if there are no such
    masks.

    Raises:
        ValueError: a ``guide`` is given, but there are no such masks.
    """
    if EVIDENCE not in kinds:
        if guide is not None:
            raise ValueError(f"guide: only masks of the kind {EVIDENCE!r} use it; add it to kinds")
        return None
    if guide is not None:
        return guide.id
    of = "norm" if _class_rows(backbone) is None else "classifier's row"
    return f"{of} on {backbone.taps[-1]}"


def _class_rows(backbone: Backbone) -> Tensor | None:
    """The classifier's rows (K, C), if they fit the last tap."""
    weight = backbone.classifier_weight
    fits = weight is not None and weight.shape == (backbone.num_classes, backbone.channels[-1])
    return weight if fits else None


class RowMaker:
    """Compute rows of a table. ``maker(image, seed, name)`` returns the tensors of a row by name.

    Args:
        image: tensor (3, H, W) in [0, 1], or (3, T, H, W) for a clip.
        seed: determines the draws of the masks.
        name: name of the photo, which messages use.
    """

    def __init__(
        self, backbone: Backbone, settings: MaskSettings, guide: Guide | None = None
    ) -> None:
        if settings.sizes == "greedy" and backbone.task == "multilabel":
            raise ValueError(
                "objective: greedy follows the log-odds of one class among others, but "
                f"{backbone.name} has task='multilabel'; train with another objective"
            )
        self.backbone, self.settings, self.guide = backbone, settings, guide
        self.grid = grid_of(backbone, settings)
        self.layout = row_layout(settings, self.grid, backbone.num_classes)
        self.rows = _class_rows(backbone)
        reference = next(backbone.parameters(), torch.zeros((), device="cpu"))
        self.dtype = reference.dtype

    @torch.inference_mode()
    def __call__(self, image: Tensor, seed: str, name: str) -> dict[str, Tensor]:
        """The row of one photo.

        Raises:
            ValueError: logits that float16 cannot represent. MemoryError: the masked images do not fit.
        """
        taps: Taps = self._pass(image[None], self.backbone)
        clean = _representable(taps.logits, name)
        cells, masked = self._answers(image, taps, seed)
        numbers = [cells, *kept_logits(torch.cat([clean, _representable(masked, name)]))]
        return {
            name: values.to(dtype)
            for values, (name, (_, dtype)) in zip(numbers, self.layout.items(), strict=True)
        }

    def _answers(self, image: Tensor, taps: Taps, seed: str) -> tuple[Tensor, Tensor]:
        """Cells (P, g, g) uint8 of the masks, and logits (2 P, K) of the photo under them, then of the
        empty photo if that is included."""
        asked, kinds = self.settings, self.settings.kinds_of_masks
        pairs, guess = asked.masks // 2, self._guess(taps)
        if asked.sizes == "greedy":
            return self._searched(image, taps.logits.argmax(1, keepdim=True))
        if DROP not in asked.fills:
            drawn = mask_pairs(
                image, guess, pairs, seed, kinds, asked.fills, asked.sizes, self.grid
            )
            images = drawn.images
            if asked.empty:
                images = torch.cat([images, replacement_pixels(image, asked.fills[0])[None]])
            return drawn.cells, self._pass(images, self.backbone.logits)
        masks = patch_masks(guess, pairs, seed, kinds, asked.sizes, self.grid)
        nothing = [torch.zeros_like(masks[0])] * asked.empty
        return (masks * 255).to(torch.uint8), self._dropped(image, [*masks, *(1 - masks), *nothing])

    def _dropped(self, image: Tensor, masks: Sequence[Tensor]) -> Tensor:
        """Logits of the photo with only the patches that each of ``masks`` keeps; masks that keep the
        same number share a pass."""

        def answers(index: Tensor) -> Tensor:
            index = index.to(self.backbone.device)
            return self._pass(image[None], lambda x: logits_of_patches(self.backbone, x, index))

        return apply_by_set_size([mask.flatten().nonzero()[:, 0] for mask in masks], answers)

    def _searched(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Like :meth:`_answers`, for the order in which each next cell is the one that adds most to the
        log-odds of the class ``target`` (1, 1)."""
        players = math.prod(self.grid)
        order: list[int] = []
        while len(order) < players - 1:
            left = [i for i in range(players) if i not in order]
            masks = torch.zeros(len(left), players, device="cpu")
            masks[:, order] = 1
            masks[torch.arange(len(left)), left] = 1
            logits = self._under(image, masks, empty=False).double()
            odds = log_odds(logits, target.to(logits.device).expand(len(left), -1), "multiclass")
            order.append(left[int(odds.argmax())])
        masks = torch.zeros(players - 1, players, device="cpu")
        for i, cell in enumerate(order):
            masks[i:, cell] = 1
        cells = (masks.view(-1, *self.grid) * 255).to(torch.uint8)
        return cells, self._under(image, torch.cat([masks, 1 - masks]), self.settings.empty)

    def _under(self, image: Tensor, masks: Tensor, empty: bool) -> Tensor:
        """Logits of the photo under ``masks`` (N, d), and of the ``empty`` photo."""
        fill, masks = self.settings.fills[0], masks.view(-1, *self.grid)
        if empty:
            masks = torch.cat([masks, torch.zeros_like(masks[:1])])
        if fill == DROP:
            return self._dropped(image, list(masks))
        kept = F.interpolate(masks[:, None], image.shape[1:], mode="nearest-exact").to(image)
        behind = replacement_pixels(image, fill)
        return torch.cat(
            [
                self._pass(m * image + (1 - m) * behind, self.backbone.logits)
                for m in kept.split(SEARCHED)
            ]
        )

    def empty(self) -> dict[str, Tensor]:
        """Return a row of zeros, which takes the place of a photo that cannot be read."""
        return {
            name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self.layout.items()
        }

    @property
    def passes(self) -> int:
        """The number of passes for one row; a pass with dropped patches counts as a full one."""
        players = math.prod(self.grid)
        searched = players * (players + 1) // 2 - 1 if self.settings.sizes == "greedy" else 0
        return 1 + self.settings.masks + self.settings.empty + searched

    @property
    def row_bytes(self) -> int:
        """Size of one row on disk."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout.values())

    def _pass(self, images: Tensor, function: Any) -> Any:
        device = self.backbone.device
        half = self.settings.precision == "bf16"
        full = MemoryError(
            f"masks: out of memory with {len(images)} images per pass; use fewer masks"
        )
        with (
            raise_on_out_of_memory(full),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            return function(images.to(device, self.dtype))

    def _guess(self, taps: Taps) -> Tensor:
        """A first guess (h, w) or (t, h, w) of the evidence for the most probable class, standardised."""
        last = taps.maps[-1][0].float()
        if EVIDENCE not in self.settings.kinds_of_masks:
            return last.new_zeros(last.shape[1:])
        top = taps.logits.argmax(1, keepdim=True)
        if self.guide is not None:
            guess = self.guide(taps.to(self.dtype), top)[0, 0].float()
        elif self.rows is not None:
            guess = torch.einsum("c,c...->...", self.rows[int(top)].float(), last)
        else:
            guess = last.norm(dim=0)
        return (guess - guess.mean()) / guess.std(correction=0).clamp_min(1e-12)


def _representable(logits: Tensor, name: str) -> Tensor:
    """Logits in float32 on the CPU; a ``ValueError`` that names the photo if float16 cannot represent
    them."""
    wide = logits.float().cpu()
    if not bool((wide.abs() <= torch.finfo(torch.float16).max).all()):  # NaN is not, either
        raise ValueError(
            f"table: the logits of {name} are not finite in float16; check the backbone's weights"
        )
    return wide


def kept_logits(logits: Tensor) -> list[Tensor]:
    """Return logits (1 + N, K), clean image first, in the form in which they are stored.

    If there are few classes, all logits are stored; otherwise, the logits (1 + N, T) of selected classes,
    most probable first, are stored together with these classes (T,) and the rest (1 + N,).
    """
    if logits.shape[1] <= MANY:
        return [logits]
    order = logits[0].argsort(descending=True, stable=True)
    kept, left = order[:KEPT], order[KEPT:]
    rest = logits[:, left].double().logsumexp(1)
    return [logits[:, kept], kept, rest]


# ---------------------------------------------------------------------- cost


def cost_line(maker: RowMaker, photos: int, rows: int, ranks: int) -> str:
    """Return a line that states the cost of computing ``rows`` missing rows of a table of ``photos`` with
    ``ranks`` processes; the time for one row is measured."""
    crops, masks = maker.settings.crops, maker.settings.masks
    whole = photos * crops
    left = "" if rows == whole else f", {rows:,} of {whole:,} rows to compute"
    return (
        f"table of outcomes: {count_phrase(photos, 'photo')} x {count_phrase(crops, 'crop')} "
        f"x {masks:,} masks"
        f"{left} = {rows * maker.passes:,} passes, about {_duration(rows * time_row(maker) / ranks)}, "
        f"{whole * maker.row_bytes / 1e6:,.1f} MB"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def time_row(maker: RowMaker) -> float:
    """Measure the seconds per row, on noise after one row to warm up."""
    size = (len(maker.backbone.preprocessing.mean), *maker.backbone.preprocessing.places)
    image = torch.rand(size, generator=torch.Generator().manual_seed(0), device="cpu")
    maker(image, "warm-up", "noise")
    started = time.perf_counter()
    maker(image, "timed", "noise")
    return time.perf_counter() - started
