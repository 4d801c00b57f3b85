"""The localist dial: softmax attention that draws together on one region of the photo, without training.

    A = softmax(q k^T / sqrt(D) + beta c)
    c_nj = cos(q_n, a_b) for a patch j of region b, 0 for a prefix token j
    a_b = mean key of region b - mean key of all patches

beta 0 is the attention that was trained; the larger beta, the more of each row lies in the region whose
anchor its query is nearest to. With a ``target``, c is 1 for the patches of that region and 0 elsewhere,
for all queries: "what if it looked there". beta c is R more columns of q and k, so it stays one call of
fused attention, and no N x N numbers are stored.

Localist LLMs: arXiv 2510.17358, 2510.09338 (abstracts; the formulas are ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Kept, Mechanism, Size, register_attention, whole
from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.regions import (
    ALIKE,
    box_regions,
    given_regions,
    recruited_regions,
    superpixels,
)
from xattn.kernels.backend import own_precision
from xattn.kernels.softmax.reference import widen

KINDS = ("quadrants", "grid", "slic", "recruited")


@register_attention(
    "localist",
    paper="arXiv 2510.17358",
    complexity="N^2 D",
    grid=(1, 2, 3),
    training_free=True,
    last=1 / 4,
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
        dial=True,
        targets=("top left", "top right", "bottom left", "bottom right"),
    ),
)
class Localist(Mechanism):
    """Softmax attention with a dial from distributed to local.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        beta: the dial, from 0 on.
        regions: "quadrants", halves along each dimension of the grid; "grid", ``sides`` boxes along each;
            "slic", superpixels of the photo, which a converted model's pass has; "recruited", clusters of
            the image's keys; or a number for each patch, row by row.
        target: the region that all queries are steered to; by default each goes to its own.
        sides: see ``regions``. segments: about how many superpixels there are.
        variance: of a recruited region, as a share of the keys' own; smaller, more are recruited.
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
            raise ValueError(f"beta: got {beta}; give a number from 0, as trained, on")
        if isinstance(regions, str) and regions not in KINDS:
            raise ValueError(
                f"regions: got {regions!r}; choose {', '.join(KINDS)}, or give a number for each patch"
            )
        if target is not None and target < 0:
            raise ValueError(f"target: got {target}; give the number of a region, from 0 on")
        if not 0 < variance < math.inf:
            raise ValueError(f"variance: got {variance}; give a positive share, such as 0.7")
        self.beta, self.target, self.variance = float(beta), target, variance
        self.kind = regions if isinstance(regions, str) else "given"
        self.numbers = None if isinstance(regions, str) else list(regions)
        self.sides, self.segments = whole("sides", sides), whole("segments", segments)
        self.reads_photo = regions == "slic"
        self._kept = Kept()

    def operator(self, inputs: Inputs) -> SoftmaxOperator:
        members = self.members(inputs)
        q, k = inputs.q, inputs.k
        if self.beta:
            q, k = self._with_columns(inputs, members)
        operator = SoftmaxOperator(q, k, inputs.scale, backend=self.backend)
        operator.context = members
        return operator

    def members(self, inputs: Inputs) -> Tensor:
        """1 where a patch is of a region, (B or 1, P, R), in the dtype of the scores.

        Raises:
            ValueError: regions that do not fit the grid, or a target that is not among them.
        """
        found = self._members(inputs)
        if self.target is not None:
            fewest = found.shape[-1]
            if not torch.compiler.is_compiling():
                fewest = int(found.any(1).sum(-1).min())
            if self.target >= fewest:
                raise ValueError(
                    f"target: got {self.target}; there are {fewest} regions, give 0 to {fewest - 1}"
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
        key = grid, str(like.device)
        if key not in self._kept:
            sides = 2 if self.kind == "quadrants" else self.sides
            given = self.numbers
            regions = box_regions(grid, sides) if given is None else given_regions(given, grid)
            self._kept[key] = regions.to(like.device)[None], int(regions.max()) + 1
        return F.one_hot(*self._kept[key]).to(like)

    def _superpixels(self, inputs: Inputs) -> Tensor:
        carried, grid = inputs.carried, inputs.grid
        photo = None if carried is None else carried.get("photo")
        if carried is None or photo is None or len(photo) != len(inputs.q):
            raise ValueError(
                "regions: 'slic' reads the photo, which only a pass of a converted model has; give "
                "'recruited', or a number for each patch"
            )
        if grid is None or len(grid) != 2:
            raise ValueError(f"regions: got a grid of {grid}; 'slic' needs rows and columns")
        key = "localist", grid, self.segments
        if key not in carried:
            carried[key] = torch.stack([superpixels(x, grid, self.segments) for x in photo])
        return carried[key]  # type: ignore[no-any-return]

    def cosines(self, inputs: Inputs, members: Tensor) -> Tensor:
        """c of each query and region, (B, H, N, R).

        Raises:
            ValueError: all keys of the call are alike, so that no region differs from another.
        """
        q, k = widen(inputs.q), widen(inputs.k)
        if self.target is not None:
            steered = torch.arange(members.shape[-1], device=q.device) == self.target
            return steered.to(q).expand(*q.shape[:3], -1)
        keys = k[:, :, inputs.prefix :]
        centred = keys - keys.mean(2, keepdim=True)
        least = ALIKE * keys.detach().abs().amax((2, 3), keepdim=True)
        if not torch.compiler.is_compiling() and bool((centred.detach().abs() <= least).all()):
            raise ValueError(
                "k: the keys of all patches are alike, so that no region has a direction; give other "
                "photos, a target, or beta=0"
            )
        sums = members.transpose(-2, -1)[:, None] @ centred
        anchors = sums / members.sum(1)[:, None, :, None].clamp_min(1)
        return _directions(q, 0 * least) @ _directions(anchors, least).transpose(-2, -1)

    def _with_columns(self, inputs: Inputs, members: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, N, D + R), whose products are those of A's scores over the scale."""
        q, k, scale = inputs.q, inputs.k, inputs.scale
        if not scale:
            raise ValueError("scale: got 0; give the scale of the scores, 1 / sqrt(D) by default")
        with own_precision(q):
            share = math.sqrt(self.beta / abs(scale))  # on both sides, for half precision
            left = math.copysign(share, scale) * self.cosines(inputs, members)
            right = share * _of_tokens(members, k)
            return torch.cat([q, left.to(q.dtype)], -1), torch.cat([k, right.to(k.dtype)], -1)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``region``: the number of each patch's region; ``mass``: what a patch's region gets from all
        queries together, for each head, 1 being all; ``leading``: the share of a patch's own row that
        lies in the region that gets most of it, for each head."""
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
    """What each query of a dial's operator gives to each region, (B, H, N, R); prefix tokens get what is
    left of 1."""
    of_tokens = _of_tokens(operator.context, operator.k)
    return operator.matvec(of_tokens.to(operator.q.dtype).contiguous())


def _of_tokens(members: Tensor, k: Tensor) -> Tensor:
    """``members`` (B or 1, P, R) for all tokens of all heads of k, (B, H, N, R): prefix tokens, which are
    first, are of no region."""
    prefix = k.shape[2] - members.shape[1]
    return F.pad(members, (0, 0, prefix, 0))[:, None].expand(*k.shape[:3], -1)


def _directions(x: Tensor, least: Tensor) -> Tensor:
    """x (..., D) scaled to length 1; 0, without a gradient, where it is no longer than ``least``."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    long = length > least
    return torch.where(long, x / torch.where(long, length, 1.0), 0.0)
