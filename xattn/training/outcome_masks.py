"""Masks whose outcomes heads are trained on: complementary pairs on a grid of cells, and what hides behind.

A mask (H, W) keeps the pixels where it is 1; its complement keeps the others. Training sees it as the
share of each of 28 x 28 cells that it keeps (``cells``). All draws are a pure function of the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 28
KINDS = ("squares32", "squares16", "blobs", "evidence")
FILLS = ("black", "blur", "mean")
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
    if fill != "blur":
        raise ValueError(f"fills: got {fill!r}; choose among {', '.join(FILLS)}")
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
    if kind != "evidence":
        raise ValueError(f"kinds: got {kind!r}; choose among {', '.join((*KINDS, 'superpixels'))}")
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
