"""Positions of tokens on their grid, and named rotations of queries and keys by these positions.

    layer = create_attention("softmax", dim=384, num_heads=6, rotate="axial")
    convert(model, "gna", options={"kernel": 7, "rotate": "comrope:form=ap"})

A rotation multiplies q_i by R(p_i) and k_j by R(p_j), with R(0) = 1. If R(p)^T R(p') = R(p' - p),
scores depend only on differences of positions.

    axial:  pair m of axis a rotates by the angle p_a base^(-m / M), m = 0 .. M - 1, M = D / (2 n)

arXiv 2104.09864 (one axis, base 10000), arXiv 2403.13298 (axes of images, base 100).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from xattn.attention.inputs import Inputs, spread_heads
from xattn.attention.model.spec import parse_named
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen
from xattn.registry import Registry, with_entry


def positions(grid: Sequence[int], prefix: int, like: Tensor) -> Tensor:
    """Coordinates (N, n) of the tokens on their grid, 0 at prefix tokens; at least float32, in which
    whole numbers are exact, on the device of ``like``."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [torch.arange(length, device=like.device, dtype=dtype) for length in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return torch.cat([places.new_zeros(prefix, len(grid)), places])


def check_grid(
    name: str, fitting: Sequence[int], grid: tuple[int, ...] | None, prefix: int, tokens: int
) -> None:
    """Raise a ``ValueError`` unless ``prefix`` and ``grid`` match the number of tokens. ``name`` supports
    grids with the numbers of dimensions in ``fitting``; 0 means no grid."""
    if isinstance(prefix, float) or not 0 <= prefix < tokens:
        raise ValueError(f"prefix: got {prefix} of {tokens} tokens; give 0 to {tokens - 1}")
    if grid is None:
        if 0 not in fitting:
            raise ValueError(f"grid: {name} needs the grid of the tokens, for example (14, 14)")
        return
    if any(isinstance(length, float) or length < 1 for length in grid):
        raise ValueError(f"grid: got {grid}; give whole lengths of at least 1")
    if math.prod(grid) != tokens - prefix:
        raise ValueError(
            f"grid: {grid} holds {math.prod(grid)} tokens; got {tokens} with {prefix} prefix tokens"
        )
    if 0 not in fitting and len(grid) not in fitting:
        raise ValueError(
            f"grid: got {len(grid)} dimensions; {name} works on {' or '.join(map(str, fitting))}"
        )


class Rotation(nn.Module, ABC):
    """The type of ``rotate`` in :class:`~xattn.attention.Attention`; its parameters are trained with
    the layer. A token at position 0, such as a prefix token, is left unchanged.

    Example:
        >>> import torch
        >>> from xattn.attention import create_rotation
        >>> rotate = create_rotation("axial", width=8)
        >>> q, k = torch.rand(2, 1, 2, 9, 8)
        >>> turned, _ = rotate(q, k, rotate.places((3, 3), 0, q))
        >>> torch.allclose(turned.norm(dim=-1), q.norm(dim=-1))  # lengths stay
        True
    """

    def places(self, grid: Sequence[int], prefix: int, like: Tensor) -> Tensor:
        """The positions (N, n) to pass to :meth:`forward` for the tokens of a grid."""
        return positions(grid, prefix, like)

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, with unchanged shapes and dtypes.

        Args:
            q: (B, H, N, D); ``k``: (B, Hk, N, D).
            positions: (N, n), coordinates on the grid.
        """


class GridRotation(Rotation):
    """Base of the named rotations: token layout and checks.

    Args:
        width: D of a head.
        axes: n, dimensions of the grid.
        num_heads: G, the number of separate rotations; must divide the heads of queries and of keys, and
            one rotation serves consecutive heads.
        span: every grid has this length along each axis, whatever its number of tokens, with the prefix
            tokens at 0 in its middle; None counts tokens from 0, where the prefix tokens are as well.
        jitter: in training, tokens are moved by a normal distribution with this standard deviation in half
            tokens, at most by half a token; the same for all images of a call.

    Example:
        >>> from xattn.attention import GridRotation, create_rotation
        >>> rotate = create_rotation("axial", width=8)
        >>> isinstance(rotate, GridRotation), rotate.axes
        (True, 2)
    """

    entry: ClassVar[RotationEntry]

    def __init__(
        self,
        width: int,
        axes: int = 2,
        num_heads: int = 1,
        span: float | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        for name, count in (("width", width), ("axes", axes), ("num_heads", num_heads)):
            if count < 1:
                raise ValueError(f"{name}: got {count}; give a whole number of at least 1")
        if span is not None and not 0 < span < float("inf"):
            raise ValueError(f"span: got {span}; give a positive number, or None to count tokens")
        if not 0 <= jitter < float("inf"):
            raise ValueError(f"jitter: got {jitter}; give a number of at least 0")
        self.width, self.axes, self.num_heads = width, axes, num_heads
        self.span, self.jitter = span, jitter

    def places(self, grid: Sequence[int], prefix: int, like: Tensor) -> Tensor:
        found = positions(grid, prefix, like)
        axes = list(found[prefix:].unbind(1))
        steps = [1.0 if self.span is None else self.span / length for length in grid]
        if self.span is not None:
            half = self.span / 2
            axes = [(x + 0.5) * step - half for x, step in zip(axes, steps, strict=True)]
        if self.training and self.jitter:
            moved = (torch.randn_like(found[prefix:]) * (self.jitter / 2)).clamp(-0.5, 0.5)
            axes = [x + y * step for x, y, step in zip(axes, moved.unbind(1), steps, strict=True)]
        return torch.cat([found[:prefix], torch.stack(axes, 1)])

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As in :class:`Rotation`; computed in float32 at least.

        Raises:
            ValueError: shapes that do not fit, or positions outside the grid if there is a ``span``.
        """
        self._check(q, k, positions)
        with without_autocast(q):
            turn = self.rotations(positions.to(torch.promote_types(positions.dtype, q.dtype)))
            return self._rotated(q, turn), self._rotated(k, turn)

    @abstractmethod
    def rotations(self, positions: Tensor) -> Tensor:
        """The input of :meth:`rotate` for the positions (N, n), (1 or G, ...)."""

    @abstractmethod
    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotate x (B, G, r, N, D), with r heads for each rotation."""

    def _rotated(self, x: Tensor, turns: Tensor) -> Tensor:
        heads = x.to(torch.promote_types(x.dtype, turns.dtype)).unflatten(1, (self.num_heads, -1))
        return self.rotate(heads, turns).flatten(1, 2).to(x.dtype)

    def _check(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        if positions.ndim != 2 or positions.shape[1] != self.axes:
            raise ValueError(
                f"positions: got shape {tuple(positions.shape)}; give (N, {self.axes}), or make the "
                f"rotation with axes={positions.shape[-1]}"
            )
        for name, x in (("q", q), ("k", k)):
            if x.shape[-2:] != (len(positions), self.width):
                raise ValueError(
                    f"{name}: got {x.shape[-2]} tokens of width {x.shape[-1]}; the rotation has "
                    f"{len(positions)} positions and width {self.width}"
                )
            if x.shape[1] % self.num_heads:
                raise ValueError(
                    f"{name}: got {x.shape[1]} heads; the rotation has num_heads={self.num_heads}, which "
                    f"has to divide them"
                )
        if self.span is None or positions.device.type != "cpu" or torch.compiler.is_compiling():
            return
        farthest = float(positions.detach().abs().max())
        if not farthest <= self.span / 2 * (1 + 1e-6):
            raise ValueError(
                f"positions: got {farthest:.4g}, outside of the grid, which spans {-self.span / 2:g} to "
                f"{self.span / 2:g}; give rotation.places(grid, prefix, q), or span=None to count tokens"
            )

    def extra_repr(self) -> str:
        return f"{self.width}, axes={self.axes}, num_heads={self.num_heads}, span={self.span}"


@dataclass(frozen=True)
class RotationEntry:
    """The registry's entry for a rotation."""

    name: str
    paper: str
    relative: bool = True
    """Whether R(p)^T R(p') = R(p' - p), so that scores depend only on differences of positions."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options used in tests, for heads of 16 channels on a two-dimensional grid."""


ROTATIONS: Registry[GridRotation, RotationEntry] = Registry(
    "xattn.rotations",
    homes=("xattn.attention",),
    argument="rotate",
    noun="rotation",
    options_argument="rotate",
    given=("width", "num_heads"),
    mark=with_entry,
)
Made = TypeVar("Made", bound=GridRotation)


def register_rotation(
    name: str, *, paper: str, **properties: Any
) -> Callable[[type[Made]], type[Made]]:
    """Class decorator: register a rotation under ``name``; ``properties`` as in :class:`RotationEntry`.

    Its constructor takes ``width``, the number of axes as ``axes``, and ``num_heads``, like
    :class:`GridRotation`.

    Raises:
        ValueError: another rotation has this name.

    Example:
        >>> from xattn.attention import AxialRotation, list_rotations, register_rotation
        >>> @register_rotation("axial_again", paper="none")
        ... class MyRotation(AxialRotation):
        ...     pass
        >>> "axial_again" in list_rotations()
        True
    """
    return ROTATIONS.register(RotationEntry(name, paper, **properties))


list_rotations = ROTATIONS.names


def create_rotation(text: str, width: int, num_heads: int = 1, **options: Any) -> GridRotation:
    """The rotation ``NAME[:option=value,...]``, such as ``"comrope:form=ap,block=4"``, for ``num_heads``
    heads of ``width`` channels; ``options`` are added to those in the text.

    Raises:
        ValueError: unknown name (with near matches), unknown option, or values that do not fit.

    Example:
        >>> from xattn.attention import create_rotation
        >>> create_rotation("axial", width=8).axes
        2
    """
    name, own = parse_named(text, "rotate")
    options = {**own, **options}
    ROTATIONS.check_options(name, options)
    return ROTATIONS.get(name)(width, num_heads=num_heads, **options)


def rotate_inputs(rotate: Rotation, inputs: Inputs) -> Inputs:
    """``inputs`` with rotated queries and keys, with the tokens in a row if there is no grid; inputs that
    are already rotated are unchanged.

    Raises:
        ValueError: keys of other tokens, no grid, or a grid with a wrong number of dimensions.
    """
    if inputs.rotated:
        return inputs
    tokens = inputs.q.shape[2]
    if inputs.k.shape[2] != tokens:
        raise ValueError(
            f"k: got {inputs.k.shape[2]} keys for {tokens} queries; to rotate by places they have to be "
            f"the same tokens"
        )
    if inputs.k.shape[1] % getattr(rotate, "num_heads", 1):
        inputs = inputs.ungrouped()
    grid = inputs.grid
    if grid is None and getattr(rotate, "axes", None) == 1:
        grid = (tokens - inputs.prefix,)
    if grid is None:
        raise ValueError("grid: rotated queries and keys need the grid of the tokens")
    q, k = rotate(inputs.q, inputs.k, rotate.places(grid, inputs.prefix, inputs.q))
    return inputs.replace(q=q, k=k, rotated=True)


def mean_tokens(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The mean query and key of the patches, (B, H, 1, D) and (B, Hk, 1, D), detached from the graph."""
    q, k = (x.detach()[:, :, inputs.prefix :].mean(2, keepdim=True) for x in (inputs.q, inputs.k))
    return q, k


def prior_map(rotate: Rotation, means: tuple[Tensor, Tensor], inputs: Inputs) -> Tensor:
    """What the middle patch attends to by position alone, (B, H, h, w): all patches get the mean query and
    key of :func:`mean_tokens`, before rotation."""
    grid = inputs.grid
    assert grid is not None
    count = math.prod(grid)
    heads = means[0].shape[1]
    q, k = (spread_heads(x, heads).expand(-1, -1, count, -1) for x in means)
    q, k = rotate(q, k, rotate.places(grid, 0, q))
    middle = (grid[0] - 1) // 2 * grid[1] + (grid[1] - 1) // 2
    scores = inputs.scale * q[:, :, middle, None] @ k.transpose(-2, -1)
    return widen(scores[:, :, 0]).softmax(-1).unflatten(-1, grid)


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Channels 2 m and 2 m + 1 of x (..., N, D) rotated in their plane by angles (..., N, D / 2)."""
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


@register_rotation(
    "axial",
    paper="arXiv 2403.13298",
    cases=({}, {"base": 10.0, "span": 7.0}),
)
class AxialRotation(GridRotation):
    """Rotary embedding with an equal share of the channels for each axis of the grid.

    Args:
        width: D of a head; a multiple of 2 n.
        axes: n, dimensions of the grid.
        base: the slowest pair of channels rotates by about 1 / base per token.
        span, jitter: see :class:`GridRotation`; with ``span`` 14 a grid of any size rotates like one with
            14 tokens per side.
        num_heads: as in :class:`GridRotation`; all heads rotate alike.

    Example:
        >>> import torch
        >>> from xattn.attention import AxialRotation
        >>> rotate = AxialRotation(width=8)
        >>> rotate.places((3, 3), 1, torch.rand(1)).shape  # a class token, then 3 x 3 patches
        torch.Size([10, 2])
    """

    def __init__(
        self,
        width: int,
        axes: int = 2,
        base: float = 100.0,
        span: float | None = None,
        jitter: float = 0.0,
        *,
        num_heads: int = 1,
    ) -> None:
        if axes < 1 or width < 1 or width % (2 * axes):
            raise ValueError(
                f"width, axes: got {width}, {axes}; twice the number of axes has to divide the width "
                f"of a head"
            )
        if not 1 <= base < float("inf"):
            raise ValueError(f"base: got {base}; give a number of at least 1, such as 100")
        super().__init__(width, axes, 1, span, jitter)
        self.base = base

    def angles(self, positions: Tensor) -> Tensor:
        """(N, D / 2) for positions (N, n): the angle of each pair of channels."""
        pairs = self.width // (2 * self.axes)
        exponent = torch.arange(pairs, device=positions.device, dtype=positions.dtype) / pairs
        return (positions[..., None] * self.base**-exponent).flatten(1)

    def rotations(self, positions: Tensor) -> Tensor:
        return self.angles(positions)

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        return turn_pairs(x, turns)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base:g}"
