"""ComRoPE rotates queries and keys by learned matrices that commute; LieRE uses matrices that do not.

    R(p) = exp(sum_a p_a A_a),   A_a skew-symmetric, made of blocks of b channels

    comrope, form "ap":  A_a = S_j in every n-th block j = a, a + n, ..., else 0     (axis partition)
    comrope, form "ld":  A_a = w_aj S_j in all blocks j                              (linear dependence)
    liere:             A_a = S_aj, separate for each axis

with S = P - P^T and P learned for each head, w shared by the heads. R(p)^T R(p') = R(p' - p) for all p and
p' if and only if the A_a commute: this holds for ComRoPE but not for LieRE. Blocks that commute share a
basis in which all of them rotate pairs of channels, S = Q L Q^T. After training, Q can therefore be folded
into the projections, see :func:`~xattn.attention.folded`; the rotation that remains costs as much as rotary
embedding. In training the exponential is computed directly, because the basis has no stable gradient where
rotation rates are nearly equal.

Yu et al. 2025, arXiv 2506.03737; LieRE: Ostmeier et al. 2024, arXiv 2406.10322.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from xattn.attention.positions import GridRotation, register_rotation, turn_pairs

EQUAL = 1e-9  # rotation rates below this share of the largest count as 0


class BlockRotation(GridRotation):
    """Base class of rotations by matrices in blocks of ``block`` channels."""

    def __init__(
        self, width: int, axes: int, block: int, num_heads: int, span: float | None, jitter: float
    ) -> None:
        if block < 2 or block % 2 or width % block:
            raise ValueError(
                f"block: got {block} for heads of {width} channels; give an even number that divides "
                f"their width"
            )
        super().__init__(width, axes, num_heads, span, jitter)
        self.block, self.blocks = block, width // block

    @abstractmethod
    def generators(self) -> Tensor:
        """Compute A (n, G, m, b, b), skew-symmetric, for m blocks of each of G heads."""

    def matrices(self, positions: Tensor) -> Tensor:
        """Compute R (G, m, N, b, b) at positions (N, n)."""
        a = self.generators().to(positions.dtype)
        return torch.matrix_exp(torch.einsum("ta,agmij->gmtij", positions, a).contiguous())

    def rotations(self, positions: Tensor) -> Tensor:
        return self.matrices(positions)

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (self.blocks, self.block))
        return torch.einsum("gmtij,bgrtmj->bgrtmi", turns, blocks).flatten(-2)

    def prior(self, positions: Tensor) -> Tensor:
        """Compute trace R(p) / D (G, N), the mean of x . R(p) x over unit vectors x.

        It measures how well a query still matches an identical key at a displacement p; it is 1 at p = 0.
        """
        return self.matrices(positions).diagonal(0, -2, -1).sum((1, -1)) / self.width

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}"


def skew(p: Tensor) -> Tensor:
    """Compute P - P^T."""
    return p - p.transpose(-2, -1)


@register_rotation(
    "comrope",
    paper="arXiv 2506.03737",
    cases=(
        {"form": "ap", "block": 4},
        {"form": "ld", "block": 8, "span": None, "init_std": 0.1},
        {"form": "ld", "block": 2},
    ),
)
class ComRope(BlockRotation):
    """Rotations by commuting matrices, ComRoPE-AP and ComRoPE-LD.

    Args:
        width, axes, num_heads, jitter: see :class:`~xattn.attention.positions.GridRotation`.
        form: "ap": each block rotates along one axis, so the number of axes must divide the number of
            blocks; "ld": each block rotates along a learned direction.
        block: b, an even number that must divide the width of a head.
        init_std: the initial standard deviation of P. With 0, nothing is rotated at first, which suits a
            network that was trained without rotations; training then moves P away from 0.
        span: see ``GridRotation``. In the paper, positions are fractions of the image, which corresponds to
            a span of 1.
    """

    direction: Tensor

    def __init__(
        self,
        width: int,
        axes: int = 2,
        form: Literal["ap", "ld"] = "ld",
        block: int = 8,
        init_std: float = 1.0,
        span: float | None = 1.0,
        jitter: float = 0.0,
        *,
        num_heads: int = 1,
    ) -> None:
        super().__init__(width, axes, block, num_heads, span, jitter)
        if form == "ap" and self.blocks % axes:
            raise ValueError(
                f"block: got {self.blocks} blocks of {block} channels; with form 'ap' the {axes} axes must "
                f"divide the number of blocks; give another block or form 'ld'"
            )
        self.form, self.std = form, _checked_std(init_std)
        self.raw = nn.Parameter(torch.randn(num_heads, self.blocks, block, block) * self.std)
        if form == "ld":
            self.direction = nn.Parameter(torch.randn(axes, self.blocks))
        else:
            turns = torch.eye(axes).repeat(1, self.blocks // axes)
            self.register_buffer("direction", turns, persistent=False)

    def generators(self) -> Tensor:
        return self.direction[:, None, :, None, None] * skew(self.raw)

    def rotations(self, positions: Tensor) -> Tensor:
        """Compute R (G, m, N, b, b) as the product of exp(p_a A_a).

        This is possible because the A_a commute, and cheap because a grid has few values of p_a."""
        few = positions.device.type == "cpu" and not torch.compiler.is_compiling()
        if not few or positions.requires_grad:
            return self.matrices(positions)
        s, parts = skew(self.raw).to(positions.dtype), []
        for axis in range(self.axes):
            own = slice(axis, None, self.axes) if self.form == "ap" else slice(None)
            values, where = positions[:, axis].unique(return_inverse=True)
            weight = self.direction[axis, own].to(positions.dtype)
            a = (weight[:, None, None] * s[:, own])[:, :, None]
            parts.append(torch.matrix_exp(a * values[:, None, None])[:, :, where])
        if self.form == "ap":
            return torch.stack(parts, 2).flatten(1, 2)
        whole = parts[0]
        for part in parts[1:]:
            whole = whole @ part
        return whole

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, FoldedRotation]:
        """Compute Q (G, D, D), and the rotation that has the same effect on Q^T q and Q^T k."""
        basis, rates = _pairs_of(skew(self.raw.detach().double().cpu()))
        rates = rates[..., None] * self.direction.double().cpu().T[:, None]  # (G, m, b / 2, n)
        rotation = FoldedRotation(
            self.width, self.axes, self.num_heads, self.span, rates.flatten(1, 2)
        )
        q = torch.stack([torch.block_diag(*blocks) for blocks in basis])
        return q, rotation.to(self.raw)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}"


@register_rotation(
    "liere",
    paper="arXiv 2406.10322",
    relative=False,
    cases=({"block": 4}, {"block": 8, "span": None, "init_std": 0.1}),
)
class LieRe(BlockRotation):
    """LieRE: skew-symmetric matrices that are learned for each axis.

    They do not commute, so scores depend on absolute positions, and nothing can be folded. The arguments
    are those of :class:`ComRope`.
    """

    def __init__(
        self,
        width: int,
        axes: int = 2,
        block: int = 8,
        init_std: float = 1.0,
        span: float | None = 1.0,
        jitter: float = 0.0,
        *,
        num_heads: int = 1,
    ) -> None:
        super().__init__(width, axes, block, num_heads, span, jitter)
        std = _checked_std(init_std)
        self.raw = nn.Parameter(torch.randn(axes, num_heads, self.blocks, block, block) * std)

    def generators(self) -> Tensor:
        return skew(self.raw)


class FoldedRotation(GridRotation):
    """What remains of a :class:`ComRope` once its basis is folded into the projections.

    Channel pair m rotates by the angle f_m . p. It is for inference only and has no trainable parameters.

    Args:
        rates: f (G, D / 2, n).
    """

    rates: Tensor

    def __init__(
        self, width: int, axes: int, num_heads: int, span: float | None, rates: Tensor
    ) -> None:
        super().__init__(width, axes, num_heads, span)
        self.register_buffer("rates", rates)

    def rotations(self, positions: Tensor) -> Tensor:
        return torch.einsum("ta,gfa->gtf", positions, self.rates.to(positions.dtype))

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        return turn_pairs(x, turns[:, None])


def _checked_std(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"init_std: got {value}; give a number of at least 0, such as 1")
    return value


def _pairs_of(s: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose skew-symmetric S (G, m, b, b) as S = Q L Q^T.

    Return an orthogonal Q of the same shape and rates l >= 0, (G, m, b / 2). L rotates channels 2 m and
    2 m + 1 at the rate l_m.
    """
    basis, rates = torch.empty_like(s), s.new_zeros(*s.shape[:-2], s.shape[-1] // 2)
    for head, block in product(range(s.shape[0]), range(s.shape[1])):
        basis[head, block], rates[head, block] = _pairs_of_one(s[head, block])
    return basis, rates


def _pairs_of_one(s: Tensor) -> tuple[Tensor, Tensor]:
    # -i S u = l u for u = x + i y means S y = l x and S x = -l y.
    size = len(s)
    values, vectors = torch.linalg.eigh(-1j * s)
    turning = values > EQUAL * values.abs().max().clamp_min(torch.finfo(s.dtype).tiny)
    u = vectors[:, turning] * 2**0.5
    found = torch.stack([u.imag, u.real], -1).flatten(-2)
    # For channels that do not rotate, any basis orthogonal to the others will do.
    rest = torch.linalg.svd(found, full_matrices=True)[0][:, found.shape[1] :]
    rates = torch.cat([values[turning], s.new_zeros((size - found.shape[1]) // 2)])
    return torch.cat([found, rest], -1), rates
