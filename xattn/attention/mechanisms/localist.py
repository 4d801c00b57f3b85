"""The localist dial concentrates softmax attention on regions of the photo, without training.

    A = softmax(q k^T / sqrt(D) + beta c)
    c_nj = cos(q_n, a_b) for a patch j of region b, 0 for a prefix token j
    a_b = mean key of region b - mean key of all patches

With beta = 0, attention is as trained. The larger beta is, the more of each row's attention goes to the
region whose anchor is nearest to the row's query. With a ``target``, c is 1 for the patches of that region
and 0 elsewhere, for all queries, which answers "What if the model looked there?". beta c is added by
appending R columns to q and k, so the layer still makes a single call of fused attention and stores no
N x N matrix. The idea is from "Localist LLMs", arXiv 2510.17358 and 2510.09338, of which we know only the
abstracts; the formulas are ours.

The regions of an image's patches are boxes, superpixels computed with SLIC from scikit-image, or clusters
of keys that are recruited one by one. Each patch has a region number from 0 to R - 1; the patches are in
raster order. Recruitment minimises a cost:

    cost = - sum_i ln sum_b w_b N(x_i; a_b, s^2 I)  +  sum over regions of their price
    price of a region that is added to R others = (d + 1) / 2 ln n + ln(R + 1)           in nats

At first, one region holds all n keys. Each step proposes another region around the keys that are explained
worst, lets all regions move (EM), and keeps the new region if the cost falls. The cost therefore decreases
with every region that is kept, and the number of recruited regions is at most the initial cost divided by
the price of one region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, Size, check_whole, register_attention
from xattn.attention.inputs import Inputs, may_read_values
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.plans import cache_plan
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen

COMPONENTS = 16  # number of principal components of keys used for recruitment
WORST, PROPOSALS, ROUNDS = 32, 3, 8  # worst keys inspected, regions tried, rounds of EM
ALIKE = 1e-6  # keys that differ by less than this share of the largest key count as equal


class Recruitment(NamedTuple):
    """The result of :func:`recruit`: ``regions`` (n,), the region of each key; ``anchors`` (R, d), the
    means of the regions; and ``costs``, in nats, with 1, 2, ..., R regions."""

    regions: Tensor
    anchors: Tensor
    costs: list[float]


def box_regions(grid: Sequence[int], sides: int | Sequence[int]) -> Tensor:
    """Divide a grid into boxes of nearly equal size, ``sides`` along each dimension.

    Returns:
        The region of each patch, LongTensor (P,).

    Raises:
        ValueError: if there are fewer than two boxes, or more boxes than patches along a dimension.
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


def check_region_numbers(numbers: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Convert the region numbers given for the patches to a LongTensor (P,).

    Raises:
        ValueError: if their number is not that of the patches, there is only one region, or a region has no
            patch.
    """
    if len(numbers) != math.prod(grid):
        raise ValueError(
            f"regions: got {len(numbers)} numbers for a grid of {_by(grid)} patches; give "
            f"{math.prod(grid)}, row by row"
        )
    found = torch.tensor(list(numbers), dtype=torch.long, device="cpu")
    check_regions(found)
    return found


@cache_plan
def region_membership(grid: tuple[int, ...], regions: int | tuple[int, ...]) -> Tensor:
    """Return a matrix (1, P, R) that is 1 where a patch belongs to a region.

    Args:
        regions: the number of boxes along each side, or the region number of each patch.
    """
    if isinstance(regions, int):
        found = box_regions(grid, regions)
    else:
        found = check_region_numbers(regions, grid)
    return F.one_hot(found).float()[None]


def check_regions(regions: Tensor) -> None:
    """Raise a ``ValueError`` unless the numbers in ``regions`` (P,) are exactly 0 to R - 1 for some R >
    1."""
    if regions.numel() == 0 or int(regions.min()) < 0:
        raise ValueError("regions: got negative numbers or none; number the regions 0, 1, ...")
    sizes = regions.bincount()
    if len(sizes) < 2:
        raise ValueError("regions: got one region for all patches; give at least 2")
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"regions: region {empty[0]} is empty; number the regions from 0 without gaps"
        )


def superpixels(photo: Tensor, grid: Sequence[int], count: int) -> Tensor:
    """Compute about ``count`` SLIC superpixels of a photo (C, H, W); return the superpixel of each patch,
    (P,)."""
    from skimage.segmentation import slic

    patches = F.adaptive_avg_pool2d(photo.detach().double(), (grid[0], grid[1])).permute(1, 2, 0)
    low, high = patches.amin(), patches.amax()
    pixels = ((patches - low) / (high - low).clamp_min(1e-12)).cpu().numpy()
    labels = torch.from_numpy(slic(pixels, count, start_label=0, channel_axis=-1)).flatten()
    return labels.unique(return_inverse=True)[1]


@torch.no_grad()
def recruited_regions(keys: Tensor, variance: float) -> Tensor:
    """Find regions of one image's keys (P, C) by :func:`recruit` on their principal components.

    Args:
        variance: the variance of a region, as a share of the keys' mean variance along these components.

    Returns:
        The region of each key, (P,).
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
def recruit(points: Tensor, variance: float) -> Recruitment:
    """Divide points (n, d) into regions, which are added while the cost in the module docstring decreases.

    Args:
        variance: s^2 of a region along each dimension. It is fixed, not fitted.

    Raises:
        ValueError: if there are no points, numbers are not finite, or the variance is not positive.
    """
    if points.ndim != 2 or not points.numel() or not points.isfinite().all():
        raise ValueError(
            f"points: got shape {tuple(points.shape)}; give (n, d), with only finite numbers"
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
    return Recruitment(regions[1], anchors[regions[0]] * math.sqrt(variance), costs)


def _paid(regions: int, n: int, d: int) -> float:
    """Return the price of all regions except the first."""
    return sum((d + 1) / 2 * math.log(n) + math.log(r + 1) for r in range(1, regions))


def _log_likelihoods(x: Tensor, anchors: Tensor, weights: Tensor) -> Tensor:
    """Compute ln w_b - |x - a_b|^2 / 2, (..., n, R), for anchors (..., R, d) and ln w (..., R)."""
    away = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1)[..., None, :]
    return weights[..., None, :] - (away - 2 * x @ anchors.transpose(-2, -1)).clamp_min(0) / 2


def _cost(lines: Tensor, d: int, variance: float) -> float:
    """Return the negative log-likelihood of all points, in nats."""
    constant = d / 2 * math.log(2 * math.pi * variance)
    return float(len(lines) * constant - lines.logsumexp(-1).sum())


def _proposals(x: Tensor, explained: Tensor) -> Tensor:
    """Return the means of the neighbourhoods that are explained worst, (P, d)."""
    worst = explained.topk(min(WORST, len(x)), largest=False).indices
    near = torch.cdist(x[worst], x).topk(max(1, len(x) // 20), largest=False).indices
    order = explained[near].mean(1).argsort()[:: max(1, len(worst) // PROPOSALS)]
    return x[near[order[:PROPOSALS]]].mean(1)


def _em(x: Tensor, anchors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``ROUNDS`` rounds of EM starting from anchors (P, R, d) and ln w (P, R).

    Returns:
        The new anchors and ln w, and the log-likelihoods (P, n, R).
    """
    for _ in range(ROUNDS):
        shares = _log_likelihoods(x, anchors, weights).softmax(-1)
        mass = shares.sum(-2)
        anchors = shares.transpose(-2, -1) @ x / mass.clamp_min(1e-12)[..., None]
        weights = (mass / len(x)).clamp_min(1e-300).log()
    return anchors, weights, _log_likelihoods(x, anchors, weights)


def _by(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


KINDS = ("quadrants", "grid", "slic", "recruited")


@register_attention(
    "localist",
    paper="arXiv 2510.17358",
    complexity="N^2 D",
    grid=(1, 2, 3),
    training_free=True,
    cases=(
        {"beta": 3.0},
        {"beta": 0.0},
        {"beta": 2.0, "regions": "grid", "sides": 3, "target": 4},
        {"beta": 8.0, "regions": "recruited"},
    ),
    bench=({}, {"regions": "grid"}),
    size=Size(
        "beta",
        "Localist dial",
        "Dial, beta",
        (0, 1, 2, 4, 8, 16, 32, 64),
        16,
        "steps",
        regions=("top left", "top right", "bottom left", "bottom right"),
    ),
    studies={
        "swap": ({"share": -1 / 4},),
        "attention-maps": {
            "options": {"regions": "recruited"},
            "depth": 1.0,
            "legends": {"region": ("first", "last", "region", "turbo")},
        },
    },
)
class Localist(Mechanism):
    """Softmax attention with a dial that turns it from distributed to local.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        beta: the setting of the dial, 0 or more.
        regions: "quadrants", which divide each dimension of the grid in half; "grid", ``sides`` boxes along
            each dimension; "slic", superpixels of the photo, which is available only in a converted model;
            "recruited", clusters of the image's keys; or a region number for each patch, row by row.
        target: the region to which all queries are steered; by default, each query is steered to the region
            nearest to it.
        sides: the number of boxes along each dimension, for "grid".
        segments: the approximate number of superpixels, for "slic".
        variance: the variance of a recruited region, as a share of the variance of the keys. A smaller
            value recruits more regions.

    Raises:
        ValueError: if ``regions`` is unknown, or a number is out of range. Calling the mechanism also
            raises a ``ValueError`` if the regions do not fit the grid, ``target`` does not exist, or the
            photo is missing.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        beta: float = 16.0,
        regions: str | Sequence[int] = "quadrants",
        target: int | None = None,
        sides: int = 4,
        segments: int = 12,
        variance: float = 0.7,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta: got {beta}; give 0 (as trained) or a larger number")
        if isinstance(regions, str) and regions not in KINDS:
            raise ValueError(
                f"regions: got {regions!r}; choose {', '.join(KINDS)}, or give a number for each patch"
            )
        if target is not None and target < 0:
            raise ValueError(f"target: got {target}; give the number of a region: 0, 1, ...")
        if not 0 < variance < math.inf:
            raise ValueError(f"variance: got {variance}; give a positive share, such as 0.7")
        self.beta, self.target, self.variance = float(beta), target, variance
        self.kind = regions if isinstance(regions, str) else "given"
        self.numbers = None if isinstance(regions, str) else list(regions)
        self.sides, self.segments = check_whole("sides", sides), check_whole("segments", segments)
        self.reads = ("photo",) if regions == "slic" else ()

    @classmethod
    def default_blocks(cls, count: int) -> range:
        """Return the last quarter of the blocks."""
        return range(count)[-max(1, round(count / 4)) :]

    def operator(self, inputs: Inputs) -> SoftmaxOperator:
        members = self.membership(inputs)
        q, k = inputs.q, inputs.k
        if self.beta:
            q, k = self._with_columns(inputs, members)
        operator = SoftmaxOperator(q, k, inputs.scale, backend=self.backend)
        operator.context = members
        return operator

    def membership(self, inputs: Inputs) -> Tensor:
        """Return a matrix that is 1 where a patch belongs to a region, (B or 1, P, R), in the dtype of the
        scores.

        Raises:
            ValueError: if the regions do not fit the grid, or the target does not exist.
        """
        found = self._members(inputs)
        if self.target is not None:
            fewest = found.shape[-1]
            if may_read_values(found):
                fewest = int(found.any(1).sum(-1).min())
            if self.target >= fewest:
                raise ValueError(
                    f"target: got {self.target}; give 0 to {fewest - 1}, since there are {fewest} regions"
                )
        return found

    def _members(self, inputs: Inputs) -> Tensor:
        grid, like = inputs.grid, widen(inputs.k)
        assert grid is not None
        if self.kind == "slic":
            return F.one_hot(self._superpixels(inputs)).to(like)
        if self.kind == "recruited":
            keys = inputs.k[:, :, inputs.prefix :].transpose(1, 2).flatten(2)
            regions = torch.stack([recruited_regions(one, self.variance) for one in keys])
            return F.one_hot(regions).to(like)
        given: int | tuple[int, ...] = 2 if self.kind == "quadrants" else self.sides
        given = given if self.numbers is None else tuple(self.numbers)
        return region_membership(grid, given, device=like.device).to(like.dtype)

    def _superpixels(self, inputs: Inputs) -> Tensor:
        carried, grid = inputs.carried, inputs.grid
        photo = None if carried is None else carried.get("photo")
        if carried is None or photo is None or len(photo) != len(inputs.q):
            raise ValueError(
                "regions: 'slic' reads the photo, which is available only in a converted model; give "
                "'recruited', or a number for each patch"
            )
        if grid is None or len(grid) != 2:
            raise ValueError(f"regions: got a grid of {grid}; 'slic' needs rows and columns")
        key = "localist", grid, self.segments
        if key not in carried:
            carried[key] = torch.stack([superpixels(x, grid, self.segments) for x in photo])
        return carried[key]  # type: ignore[no-any-return]

    def cosines(self, inputs: Inputs, members: Tensor) -> Tensor:
        """Compute c for each query and region, (B, H, N, R).

        Raises:
            ValueError: if all keys of the call are equal, because regions then do not differ.
        """
        q, k = widen(inputs.q), widen(inputs.k)
        if self.target is not None:
            steered = torch.arange(members.shape[-1], device=q.device) == self.target
            return steered.to(q).expand(*q.shape[:3], -1)
        keys = k[:, :, inputs.prefix :]
        centred = keys - keys.mean(2, keepdim=True)
        least = ALIKE * keys.detach().abs().amax((2, 3), keepdim=True)
        if may_read_values(centred) and bool((centred.detach().abs() <= least).all()):
            raise ValueError(
                "k: the keys of all patches are alike, so no region has a direction; give other "
                "photos, a target, or beta=0"
            )
        sums = members.transpose(-2, -1)[:, None] @ centred
        anchors = sums / members.sum(1)[:, None, :, None].clamp_min(1)
        return _directions(q, 0 * least) @ _directions(anchors, least).transpose(-2, -1)

    def _with_columns(self, inputs: Inputs, members: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, H, N, D + R) whose products, multiplied by the scale, are the scores
        of A."""
        q, k, scale = inputs.q, inputs.k, inputs.scale
        if not scale:
            raise ValueError("scale: got 0; give the scale of the scores, 1 / sqrt(D) by default")
        with without_autocast(q):
            # The factor is split between queries and keys, for the sake of half precision.
            share = math.sqrt(self.beta / abs(scale))
            left = math.copysign(share, scale) * self.cosines(inputs, members)
            right = share * _of_tokens(members, k)
            return torch.cat([q, left.to(q.dtype)], -1), torch.cat([k, right.to(k.dtype)], -1)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``region``, the number of each patch's region; ``mass``, the share of all queries'
        attention that a patch's region gets; and ``leading``, the largest share of a patch's own attention
        that goes to a single region. ``mass`` and ``leading`` are per head."""
        if inputs.grid is None or len(inputs.grid) != 2:
            return {}
        assert isinstance(operator, SoftmaxOperator)
        regions = operator.context.argmax(-1).expand(len(inputs.q), -1)
        mass = region_masses(operator)
        of_patch = regions[:, None].expand(-1, mass.shape[1], -1)
        found = {
            "region": regions[:, None].to(mass.dtype),
            "mass": mass.mean(2).gather(2, of_patch),
            "leading": mass[:, :, inputs.prefix :].amax(-1),
        }
        return {name: x.unflatten(-1, inputs.grid) for name, x in found.items()}


def region_masses(operator: SoftmaxOperator) -> Tensor:
    """Compute each query's attention to each region under the dial's ``operator``, (B, H, N, R). The
    attention that is missing from a sum of 1 goes to prefix tokens."""
    of_tokens = _of_tokens(operator.context, operator.k)
    return operator.matvec(of_tokens.to(operator.q.dtype).contiguous())


def _of_tokens(members: Tensor, k: Tensor) -> Tensor:
    """Extend ``members`` (B or 1, P, R) to all tokens of all heads of k, (B, H, N, R). The prefix tokens
    come first and belong to no region."""
    prefix = k.shape[2] - members.shape[1]
    return F.pad(members, (0, 0, prefix, 0))[:, None].expand(*k.shape[:3], -1)


def _directions(x: Tensor, least: Tensor) -> Tensor:
    """Scale x (..., D) to length 1; return 0, without a gradient, where x is no longer than ``least``."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    long = length > least
    return torch.where(long, x / torch.where(long, length, 1.0), 0.0)
