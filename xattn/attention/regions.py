"""Regions of an image's patches: boxes, superpixels, or clusters of keys that are recruited one by one.

A region is a number for each patch, 0 to R - 1, in raster order.

    recruitment:  cost = - sum_i ln sum_b w_b N(x_i; a_b, s^2 I)  +  sum over regions of their price
    price of the region recruited beside R others = (d + 1) / 2 ln n + ln(R + 1)           in nats

One region holds all n keys at first. Each step proposes one around the keys that are explained worst, lets
all regions move (EM), and keeps it if the cost falls. So the cost falls strictly, and no more regions than
its first value over a price are recruited. Localist LLMs: arXiv 2510.17358, 2510.09338 (abstracts; the
formulas are ours). Superpixels are SLIC's, by scikit-image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 16  # principal components of keys that recruitment reads
WORST, PROPOSALS, ROUNDS = 32, 3, 8  # keys that are looked at, regions that are tried, rounds of EM
ALIKE = 1e-6  # of the largest key: keys that differ by less are alike


class Recruited(NamedTuple):
    """What :func:`recruit` found: ``regions`` (n,), each key's; ``anchors`` (R, d), their means; and
    ``costs``, in nats, with 1, 2, ... R regions."""

    regions: Tensor
    anchors: Tensor
    costs: list[float]


def box_regions(grid: Sequence[int], sides: int | Sequence[int]) -> Tensor:
    """``sides`` boxes along each dimension of a grid, as equal as can be: LongTensor (P,).

    Raises:
        ValueError: no boxes, a single one, or more than patches along a dimension.
    """
    counts = (sides,) * len(grid) if isinstance(sides, int) else tuple(sides)
    if len(counts) != len(grid) or min(counts) < 1 or math.prod(counts) < 2:
        raise ValueError(
            f"sides: got {sides} for a grid of {_by(grid)} patches; give 2 or more, so that there are "
            f"regions to choose from"
        )
    for count, length in zip(counts, grid, strict=True):
        if count > length:
            raise ValueError(
                f"sides: got {sides} for a grid of {_by(grid)} patches, which leaves regions empty; give "
                f"at most {min(grid)}"
            )
    regions = torch.zeros((), dtype=torch.long, device="cpu")
    for count, length in zip(counts, grid, strict=True):
        along = torch.arange(length, device="cpu") * count // length
        regions = regions[..., None] * count + along
    return regions.flatten()


def given_regions(numbers: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The patches' own numbers, as LongTensor (P,).

    Raises:
        ValueError: another number of patches, a single region, or a region without a patch.
    """
    if len(numbers) != math.prod(grid):
        raise ValueError(
            f"regions: got {len(numbers)} numbers for a grid of {_by(grid)} patches; give "
            f"{math.prod(grid)}, row by row"
        )
    found = torch.tensor(list(numbers), dtype=torch.long, device="cpu")
    check_regions(found)
    return found


def check_regions(regions: Tensor) -> None:
    """Raise a ``ValueError`` unless the numbers (P,) are 0 to R - 1, each with a patch, and R > 1."""
    if regions.numel() == 0 or int(regions.min()) < 0:
        raise ValueError("regions: got negative numbers or none; number the regions from 0 on")
    sizes = regions.bincount()
    if len(sizes) < 2:
        raise ValueError("regions: got one for all patches; give at least 2 to choose from")
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"regions: region {empty[0]} is empty; number the regions from 0 on without gaps"
        )


def superpixels(photo: Tensor, grid: Sequence[int], count: int) -> Tensor:
    """About ``count`` of SLIC's superpixels of a photo (C, H, W), made of whole patches: (P,)."""
    from skimage.segmentation import slic

    patches = F.adaptive_avg_pool2d(photo.detach().double(), (grid[0], grid[1])).permute(1, 2, 0)
    low, high = patches.amin(), patches.amax()
    pixels = ((patches - low) / (high - low).clamp_min(1e-12)).cpu().numpy()
    labels = torch.from_numpy(slic(pixels, count, start_label=0, channel_axis=-1)).flatten()
    return labels.unique(return_inverse=True)[1]


@torch.no_grad()
def recruited_regions(keys: Tensor, variance: float) -> Tensor:
    """Regions of one image's keys (P, C), by :func:`recruit` on their principal components: (P,).

    Args:
        variance: of a region, as a share of the keys' mean variance along these components.
    """
    x = keys.detach().double().cpu()
    x = x - x.mean(0)
    wide = x.shape[1] > x.shape[0]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = (t[..., -min(COMPONENTS, *x.shape) :] for t in (values, vectors))
    x = vectors * values.clamp_min(0).sqrt() if wide else x @ vectors
    own = float(x.square().mean())
    if own <= ALIKE**2 * float(keys.detach().double().square().mean()):
        return torch.zeros(len(x), dtype=torch.long, device=keys.device)
    return recruit(x, variance * own).regions.to(keys.device)


@torch.no_grad()
def recruit(points: Tensor, variance: float) -> Recruited:
    """Regions of points (n, d), as many as the cost of the module's heading asks for.

    Args:
        variance: s^2 of a region along each dimension. It is given, not fitted.

    Raises:
        ValueError: no points, numbers that are not finite, or a variance that is not positive.
    """
    if points.ndim != 2 or not points.numel() or not points.isfinite().all():
        raise ValueError(
            f"points: got shape {tuple(points.shape)}; give (n, d), all of it finite numbers"
        )
    if not 0 < variance < math.inf:
        raise ValueError(f"variance: got {variance}; give a positive number")
    x = points.double().cpu() / math.sqrt(variance)
    n, d = x.shape
    anchors, weights = x.mean(0)[None], x.new_zeros(1)
    lines = _log_likelihoods(x, anchors, weights)
    costs = [_cost(lines, d, variance)]
    while len(anchors) < n:
        price = (d + 1) / 2 * math.log(n) + math.log(len(anchors) + 1)
        starts = _proposals(x, lines.logsumexp(-1))
        more = torch.cat([anchors.expand(len(starts), -1, -1), starts[:, None]], 1)
        share = 1 / (len(anchors) + 1)
        logs = torch.cat([weights + math.log1p(-share), x.new_tensor([math.log(share)])])
        more, logs, tried = _em(x, more, logs.expand(len(starts), -1))
        found = [_cost(one, d, variance) for one in tried]
        best = min(range(len(found)), key=found.__getitem__)
        gain = costs[-1] - found[best] - _paid(len(anchors), n, d)
        if not gain > price:
            break
        anchors, weights, lines = more[best], logs[best], tried[best]
        costs.append(found[best] + _paid(len(anchors), n, d))
    regions = lines.argmax(-1).unique(return_inverse=True)
    return Recruited(regions[1], anchors[regions[0]] * math.sqrt(variance), costs)


def _paid(regions: int, n: int, d: int) -> float:
    """The price of all regions but the first."""
    return sum((d + 1) / 2 * math.log(n) + math.log(r + 1) for r in range(1, regions))


def _log_likelihoods(x: Tensor, anchors: Tensor, weights: Tensor) -> Tensor:
    """ln w_b - |x - a_b|^2 / 2, (..., n, R), for anchors (..., R, d) and ln w (..., R)."""
    away = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[..., None, :]
    return weights[..., None, :] - (away - 2 * x @ anchors.transpose(-2, -1)).clamp_min(0) / 2


def _cost(lines: Tensor, d: int, variance: float) -> float:
    """- the log-likelihood of all points in nats."""
    constant = d / 2 * math.log(2 * math.pi * variance)
    return float(len(lines) * constant - lines.logsumexp(-1).sum())


def _proposals(x: Tensor, explained: Tensor) -> Tensor:
    """Means of the neighbourhoods that are explained worst, (P, d)."""
    worst = explained.topk(min(WORST, len(x)), largest=False).indices
    near = torch.cdist(x[worst], x).topk(max(1, len(x) // 20), largest=False).indices
    order = explained[near].mean(1).argsort()[:: max(1, len(worst) // PROPOSALS)]
    return x[near[order[:PROPOSALS]]].mean(1)


def _em(x: Tensor, anchors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ROUNDS`` of EM from anchors (P, R, d) and ln w (P, R) on, and the points' likelihoods (P, n, R)."""
    for _ in range(ROUNDS):
        shares = _log_likelihoods(x, anchors, weights).softmax(-1)
        mass = shares.sum(-2)
        anchors = shares.transpose(-2, -1) @ x / mass.clamp_min(1e-12)[..., None]
        weights = (mass / len(x)).clamp_min(1e-300).log()
    return anchors, weights, _log_likelihoods(x, anchors, weights)


def _by(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))
