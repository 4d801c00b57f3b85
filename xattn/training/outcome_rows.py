"""One row of a table of outcomes: a network's logits for a photo and for the photo under masks.

A row takes two passes, of the photo alone and of all masked images together, always of the same shapes, so
no row depends on another. Where a network has more than 2,000 classes, the logits z of 256 are kept, the
highest ones on the photo, and the log-sum-exp r_j of all others, so that

    p_jk = exp z_jk / (sum_{i kept} exp z_ji + exp r_j),    r_j = log sum_{i not kept} exp z_ji

is the softmax over all classes k under mask j.

Masks come in complementary pairs on a grid of cells. A mask (H, W) keeps the pixels where it is 1; its
complement keeps the others. Training sees the share that it keeps of each of 28 x 28 cells (``cells``). All
draws are a pure function of the seed.
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
from xattn.heads import Head
from xattn.runtime.memory import out_of_memory_is
from xattn.runtime.names import counted
from xattn.runtime.option_checks import Count, Where, check_fields

CELLS = 28
Kind = Literal["squares32", "squares16", "blobs", "evidence", "superpixels"]
Fill = Literal["black", "blur", "mean"]
KINDS: tuple[Kind, ...] = ("squares32", "squares16", "blobs", "evidence")
FILLS: tuple[Fill, ...] = ("black", "blur", "mean")
LEVELS = (0.2, 0.8)  # the share that a mask keeps is drawn from here


class MaskPairs(NamedTuple):
    """``cells`` (P, 28, 28) uint8, the kept share of each cell in 255ths, and ``images`` (2 P, 3, H, W):
    the photo under each mask, then under each complement."""

    cells: Tensor
    images: Tensor


def mask_pairs(
    image: Tensor,
    evidence: Tensor,
    pairs: int,
    seed: str,
    kinds: Sequence[str] = KINDS,
    fills: Sequence[str] = FILLS,
) -> MaskPairs:
    """``pairs`` masks of an ``image`` (3, H, W) in [0, 1], their complements, and the masked images.

    Args:
        evidence: (h, w) a first guess of what the network sees; ``"evidence"`` masks are its thresholds
            under noise.
        seed: names the draws: other masks for each photo and crop.
        kinds: ``"squares32"`` and ``"squares16"`` keep squares of a 7 x 7 and a 14 x 14 grid (32 and 16 of
            224 pixels), ``"blobs"`` what is above a threshold of smooth noise, ``"superpixels"`` SLIC's;
            pair i is of kind i modulo their number.
        fills: what is seen where nothing is kept, drawn for each pair: ``"black"``, ``"blur"`` (a 14 x 14
            picture of the image) or ``"mean"`` (its mean colour).
    """
    rng = random.Random(seed)
    draw = torch.Generator().manual_seed(rng.getrandbits(63))
    size = (int(image.shape[1]), int(image.shape[2]))
    cells, images = [], []
    for i in range(pairs):
        kind = kinds[i % len(kinds)]
        if kind == "superpixels":
            mask = _superpixels(image, rng, draw)
            share = F.adaptive_avg_pool2d(mask[None, None], CELLS)[0, 0]
        else:
            share = _cells(kind, evidence, rng, draw)
            mask = F.interpolate(share[None, None], size, mode="nearest-exact")[0, 0]
        behind = background(image, rng.choice(list(fills)))
        mask = mask.to(image)
        cells.append((share * 255).round().to(torch.uint8))
        images.append((mask * image + (1 - mask) * behind, (1 - mask) * image + mask * behind))
    kept, hidden = zip(*images, strict=True)
    return MaskPairs(torch.stack(cells), torch.stack([*kept, *hidden]))


def masks_of(cells: Tensor) -> Tensor:
    """(..., P, h, w) uint8 -> all masks (..., 2 P, h, w) float32 in [0, 1], the complements last."""
    kept = cells.float() / 255
    return torch.cat([kept, 1 - kept], dim=-3)


def background(image: Tensor, fill: str) -> Tensor:
    """What a removed pixel of ``image`` (3, H, W) shows, (3, H, W)."""
    if fill == "black":
        return torch.zeros_like(image)
    if fill == "mean":
        return image.mean((1, 2), keepdim=True).expand_as(image)
    small = F.adaptive_avg_pool2d(image[None], 14)
    return F.interpolate(small, image.shape[1:], mode="bilinear", align_corners=False)[0]


def _cells(kind: str, evidence: Tensor, rng: random.Random, draw: torch.Generator) -> Tensor:
    """A mask of 28 x 28 cells, 0 or 1."""
    level = rng.uniform(*LEVELS)
    if kind in ("squares32", "squares16"):
        side = 4 if kind == "squares32" else 2
        count = CELLS // side + 1  # the grid starts anywhere
        field = torch.rand(count, count, generator=draw)
        field = field.repeat_interleave(side, 0).repeat_interleave(side, 1)
        top, left = rng.randrange(side), rng.randrange(side)
        field = field[top : top + CELLS, left : left + CELLS]
        return (field < level).float()
    if kind == "blobs":
        return _above(_smooth_noise(rng, draw), level)
    guess = F.interpolate(
        evidence[None, None].float().cpu(), (CELLS, CELLS), mode="bilinear", align_corners=False
    )[0, 0]
    noise = _smooth_noise(rng, draw) * rng.uniform(0.2, 1.0)
    return _above(_standardised(guess) + noise, level)


def _smooth_noise(rng: random.Random, draw: torch.Generator) -> Tensor:
    """Gaussian noise of 28 x 28 cells, smoothed over 2 to 5 of them, of unit variance."""
    size = rng.choice((6, 8, 10, 14))
    coarse = torch.randn(1, 1, size, size, generator=draw)
    field = F.interpolate(coarse, (CELLS, CELLS), mode="bicubic", align_corners=False)[0, 0]
    return _standardised(field)


def _standardised(field: Tensor) -> Tensor:
    return (field - field.mean()) / field.std().clamp_min(1e-12)


def _above(field: Tensor, level: float) -> Tensor:
    """1 in the ``level`` of the cells where ``field`` is highest."""
    count = max(1, min(field.numel() - 1, round(level * field.numel())))
    chosen = torch.zeros(field.numel(), device="cpu")
    chosen[field.flatten().argsort(descending=True, stable=True)[:count]] = 1
    return chosen.view_as(field)


def _superpixels(image: Tensor, rng: random.Random, draw: torch.Generator) -> Tensor:
    """Some of SLIC's superpixels, (H, W)."""
    from skimage.segmentation import slic

    pixels = image.detach().double().permute(1, 2, 0).cpu().numpy()
    labels = slic(pixels, rng.choice((30, 60, 100)), start_label=0, channel_axis=-1)
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    keep = torch.rand(int(labels.max()) + 1, generator=draw) < rng.uniform(*LEVELS)
    return keep.float()[torch.from_numpy(labels)]


# ---------------------------------------------------------------------- a row


MANY, KEPT = 2_000, 256  # of networks with more classes than that, so many are kept
EVIDENCE = "evidence"  # the kind of masks that read a first guess
Precision = Literal["no", "bf16"]


class Guide(Protocol):
    """A first guess of the evidence for a class, ``guide(taps, class_index (1, 1)) -> (1, 1, h, w)``;
    ``id`` names it in the key of a table."""

    @property
    def id(self) -> str: ...

    def __call__(self, taps: Taps, class_index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class HeadGuide:
    """The scores of a trained ``head`` as a guide, for a second table with masks from its own maps."""

    head: Head

    @property
    def id(self) -> str:
        """The head's name and the SHA-256 of its weights."""
        return f"{self.head.name} {sha256(self.head)}"

    def __call__(self, taps: Taps, class_index: Tensor, /) -> Tensor:
        if self.head.training:
            raise ValueError("guide: the head is in training mode; call head.eval() first")
        return self.head(taps, class_index)


_EVEN = "an even number of at least 2, masks come in pairs"


@dataclass(frozen=True)
class MaskSettings:
    """What is asked of each photo, see :func:`~xattn.training.outcomes.cache_outcomes`."""

    crops: Count = 1
    masks: Annotated[int, Where(lambda n: n > 0 and n % 2 == 0, _EVEN)] = 16
    kinds: Annotated[Sequence[Kind], Where(bool, f"a list of {', '.join(get_args(Kind))}")] = KINDS
    fills: Annotated[Sequence[Fill], Where(bool, f"a list of {', '.join(FILLS)}")] = FILLS
    seed: int = 0
    precision: Precision = "no"

    def __post_init__(self) -> None:
        check_fields(self)


def row_layout(masks: int, classes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of the tensors of a row: ``cells``, ``logits`` with those of the clean image first,
    and of a network with more than :data:`MANY` classes ``classes`` and ``rest``."""
    many = classes > MANY
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "cells": ((masks // 2, CELLS, CELLS), torch.uint8),
        "logits": ((1 + masks, KEPT if many else classes), torch.float16),
    }
    if many:
        layout["classes"] = ((KEPT,), torch.int32)
        layout["rest"] = ((1 + masks,), torch.float32)
    return layout


def guess_name(backbone: Backbone, guide: Guide | None, kinds: Sequence[str]) -> str | None:
    """What the ``"evidence"`` masks come from, for the key; None if there are no such masks.

    Raises:
        ValueError: there are none, but a ``guide``.
    """
    if EVIDENCE not in kinds:
        if guide is not None:
            raise ValueError(f"guide: only masks of the kind {EVIDENCE!r} read it; add it to kinds")
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
    """Computes rows. ``maker(image, seed, name)`` -> the tensors of a row by name.

    Args:
        image: (3, H, W) in [0, 1].
        seed: names the draws of the masks.
        name: of the photo, for messages.
    """

    def __init__(
        self, backbone: Backbone, settings: MaskSettings, guide: Guide | None = None
    ) -> None:
        self.backbone, self.settings, self.guide = backbone, settings, guide
        self.layout = row_layout(settings.masks, backbone.num_classes)
        self.rows = _class_rows(backbone)
        reference = next(backbone.parameters(), torch.zeros((), device="cpu"))
        self.dtype = reference.dtype

    @torch.inference_mode()
    def __call__(self, image: Tensor, seed: str, name: str) -> dict[str, Tensor]:
        """The row of one photo.

        Raises:
            ValueError: logits that float16 cannot hold. MemoryError: the masked images do not fit.
        """
        settings = self.settings
        taps: Taps = self._pass(image[None], self.backbone)
        clean = _representable(taps.logits, name)
        pairs = mask_pairs(
            image, self._guess(taps), settings.masks // 2, seed, settings.kinds, settings.fills
        )
        masked = _representable(self._pass(pairs.images, self.backbone.logits), name)
        numbers = [pairs.cells, *kept_logits(torch.cat([clean, masked]))]
        return {
            name: values.to(dtype)
            for values, (name, (_, dtype)) in zip(numbers, self.layout.items(), strict=True)
        }

    def empty(self) -> dict[str, Tensor]:
        """Zeros in place of a photo that cannot be read."""
        return {
            name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in self.layout.items()
        }

    @property
    def row_bytes(self) -> int:
        """Of one row on disk."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout.values())

    def _pass(self, images: Tensor, function: Any) -> Any:
        device = self.backbone.device
        half = self.settings.precision == "bf16"
        full = MemoryError(
            f"masks: out of memory with {len(images)} images a pass; give fewer masks"
        )
        with out_of_memory_is(full), torch.autocast(device.type, torch.bfloat16, enabled=half):
            return function(images.to(device, self.dtype))

    def _guess(self, taps: Taps) -> Tensor:
        """A first guess (h, w) of the evidence for the most probable class, standardised."""
        last = taps.maps[-1][0].float()
        if EVIDENCE not in self.settings.kinds:
            return last.new_zeros(last.shape[1:])
        top = taps.logits.argmax(1, keepdim=True)
        if self.guide is not None:
            guess = self.guide(taps.to(self.dtype), top)[0, 0].float()
        elif self.rows is not None:
            guess = torch.einsum("c,chw->hw", self.rows[int(top)].float(), last)
        else:
            guess = last.norm(dim=0)
        return (guess - guess.mean()) / guess.std(correction=0).clamp_min(1e-12)


def _representable(logits: Tensor, name: str) -> Tensor:
    """Logits in float32 on the CPU; a ``ValueError`` that names the photo if float16 cannot hold them."""
    wide = logits.float().cpu()
    if not bool((wide.abs() <= torch.finfo(torch.float16).max).all()):  # NaN is not, either
        raise ValueError(
            f"table: the logits of {name} are not finite in float16; check the backbone's weights"
        )
    return wide


def kept_logits(logits: Tensor) -> list[Tensor]:
    """Logits (1 + N, K), those of the clean image first, as they are stored.

    Those of few classes are stored as they are; of many, the logits (1 + N, T) of the classes that are
    kept, from the most probable one on, these classes (T,), and the rest (1 + N,).
    """
    if logits.shape[1] <= MANY:
        return [logits]
    order = logits[0].argsort(descending=True, stable=True)
    kept, left = order[:KEPT], order[KEPT:]
    rest = logits[:, left].double().logsumexp(1)
    return [logits[:, kept], kept, rest]


# ---------------------------------------------------------------------- the price


def cost_line(maker: RowMaker, photos: int, rows: int, ranks: int) -> str:
    """What ``rows`` missing rows of a table of ``photos`` cost ``ranks`` processes, in words; the time of
    one row is measured."""
    crops, masks = maker.settings.crops, maker.settings.masks
    whole = photos * crops
    left = "" if rows == whole else f", {rows:,} of {whole:,} rows to compute"
    return (
        f"table of outcomes: {counted(photos, 'photo')} x {counted(crops, 'crop')} x {masks:,} masks"
        f"{left} = {rows * (1 + masks):,} passes, about {_duration(rows * time_row(maker) / ranks)}, "
        f"{whole * maker.row_bytes / 1e6:,.1f} MB"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def time_row(maker: RowMaker) -> float:
    """Seconds of one row, measured on noise after one row to warm up."""
    size = (len(maker.backbone.preprocessing.mean), *maker.backbone.preprocessing.input_size)
    image = torch.rand(size, generator=torch.Generator().manual_seed(0), device="cpu")
    maker(image, "warm-up", "noise")
    started = time.perf_counter()
    maker(image, "timed", "noise")
    return time.perf_counter() - started
