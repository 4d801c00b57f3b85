"""Positions of tokens on their grid, and named rotations of queries and keys by these positions.

    layer = create_attention("softmax", dim=384, num_heads=6, rotate="axial")
    convert(model, "gna", options={"kernel": 7, "rotate": "comrope:form=ap"})

A rotation multiplies q_i by R(p_i) and k_j by R(p_j), with R(0) = 1. If R(p)^T R(p') = R(p' - p),
scores depend only on the differences between positions.

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
    """Return the coordinates (N, n) of the tokens on their grid, with 0 for prefix tokens.

    They are on the device of ``like`` and at least float32, in which whole numbers are exact.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [torch.arange(length, device=like.device, dtype=dtype) for length in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return torch.cat([places.new_zeros(prefix, len(grid)), places])


def check_grid(
    name: str, fitting: Sequence[int], grid: tuple[int, ...] | None, prefix: int, tokens: int
) -> None:
    """Raise a ``ValueError`` unless ``prefix`` and ``grid`` match the number of tokens and the mechanism
    ``name`` supports the grid. ``fitting`` lists the numbers of dimensions that the mechanism supports; 0
    means that it needs no grid and accepts any grid."""
    if isinstance(prefix, float) or not 0 <= prefix < tokens:
        raise ValueError(f"prefix: got {prefix} of {tokens} tokens; give 0 to {tokens - 1}")
    if grid is None:
        if 0 not in fitting:
            raise ValueError(f"grid: {name} needs the grid of the tokens, for example (14, 14)")
        return
    if any(isinstance(length, float) or length < 1 for length in grid):
        raise ValueError(f"grid: got {grid}; give whole numbers of at least 1")
    if math.prod(grid) != tokens - prefix:
        raise ValueError(
            f"grid: {grid} holds {math.prod(grid)} tokens; got {tokens} with {prefix} prefix tokens"
        )
    if 0 not in fitting and len(grid) not in fitting:
        raise ValueError(
            f"grid: got {len(grid)} dimensions; {name} supports {' or '.join(map(str, fitting))}"
        )


class Rotation(nn.Module, ABC):
    """Base class of rotations, the type of ``rotate`` in :class:`~xattn.attention.Attention`.

    The parameters of a rotation are trained with the layer. Tokens at position 0, such as prefix tokens,
    are left unchanged.

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
        """Return the positions (N, n) of the tokens of a grid, as :meth:`forward` needs them."""
        return positions(grid, prefix, like)

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotated queries and keys, with unchanged shapes and dtypes.

        Args:
            q: (B, H, N, D); ``k``: (B, Hk, N, D).
            positions: (N, n), coordinates on the grid.
        """


class GridRotation(Rotation):
    """Base class of the named rotations, which computes the positions of tokens and checks arguments.

    Args:
        width: D, the width of a head.
        axes: n, the number of dimensions of the grid.
        num_heads: G, the number of separate rotations. It must divide the numbers of query heads and of key
            heads; consecutive heads share a rotation.
        span: the length of the grid along each axis, whatever its number of tokens. Position 0 is then in
            the middle of the grid. With None, positions are token numbers, counted from 0. In both cases
            prefix tokens are at 0.
        jitter: the standard deviation, in half tokens, of the normally distributed shifts by which tokens
            are moved in training. No shift exceeds half a token, and all images of a call get the same
            shifts.

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
        """Rotate queries and keys as described in :class:`Rotation`, computing in float32 at least.

        Raises:
            ValueError: if the shapes do not fit, or if there is a ``span`` and a position is outside of it.
        """
        self._check(q, k, positions)
        with without_autocast(q):
            turn = self.rotations(positions.to(torch.promote_types(positions.dtype, q.dtype)))
            return self._rotated(q, turn), self._rotated(k, turn)

    @abstractmethod
    def rotations(self, positions: Tensor) -> Tensor:
        """Compute the ``turns`` that :meth:`rotate` needs from the positions (N, n)."""

    @abstractmethod
    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        """Rotate x (B, G, r, N, D), in which r heads share each rotation, by the ``turns``."""

    def _rotated(self, x: Tensor, turns: Tensor) -> Tensor:
        heads = x.to(torch.promote_types(x.dtype, turns.dtype)).unflatten(1, (self.num_heads, -1))
        return self.rotate(heads, turns).flatten(1, 2).to(x.dtype)

    def _check(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        if positions.ndim != 2 or positions.shape[1] != self.axes:
            raise ValueError(
                f"positions: got shape {tuple(positions.shape)}; give (N, {self.axes}), or create the "
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
                    f"has to divide their number"
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
    """Whether R(p)^T R(p') = R(p' - p), so that scores depend only on the differences between positions."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Sets of options used in tests, for heads of 16 channels on a two-dimensional grid."""


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
    """Register the decorated class as a rotation under ``name``.

    The constructor of the class must take ``width``, ``axes`` (the number of axes) and ``num_heads``, like
    :class:`GridRotation`. ``properties`` are the other fields of :class:`RotationEntry`.

    Raises:
        ValueError: if another rotation has this name.

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
    """Create a rotation for ``num_heads`` heads of ``width`` channels.

    ``text`` is ``NAME[:option=value,...]``, such as ``"comrope:form=ap,block=4"``. ``options`` are added to
    the options in the text and replace those of the same name.

    Raises:
        ValueError: if the name is unknown (similar names are listed), an option is unknown, or a value does
            not fit.

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
    """Return ``inputs`` with rotated queries and keys. Inputs that are already rotated are left unchanged.

    If there is no grid, a rotation with one axis uses the positions of the tokens in the sequence.

    Raises:
        ValueError: if the numbers of queries and keys differ, there is no grid, or the grid has the wrong
            number of dimensions.
    """
    if inputs.rotated:
        return inputs
    tokens = inputs.q.shape[2]
    if inputs.k.shape[2] != tokens:
        raise ValueError(
            f"k: got {inputs.k.shape[2]} keys for {tokens} queries; a rotation needs queries and keys of "
            f"the same tokens"
        )
    if inputs.k.shape[1] % getattr(rotate, "num_heads", 1):
        inputs = inputs.ungrouped()
    grid = inputs.grid
    if grid is None and getattr(rotate, "axes", None) == 1:
        grid = (tokens - inputs.prefix,)
    if grid is None:
        raise ValueError("grid: got None; give the grid of the tokens, which the rotation needs")
    q, k = rotate(inputs.q, inputs.k, rotate.places(grid, inputs.prefix, inputs.q))
    return inputs.replace(q=q, k=k, rotated=True)


def mean_tokens(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the mean query (B, H, 1, D) and the mean key (B, Hk, 1, D) of the patches, detached from the
    graph."""
    q, k = (x.detach()[:, :, inputs.prefix :].mean(2, keepdim=True) for x in (inputs.q, inputs.k))
    return q, k


def prior_map(rotate: Rotation, means: tuple[Tensor, Tensor], inputs: Inputs) -> Tensor:
    """Compute what the middle patch would attend to by position alone, (B, H, h, w).

    For this, every patch gets the mean query and the mean key of :func:`mean_tokens`, which are then
    rotated.
    """
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
    """Rotate channels 2 m and 2 m + 1 of x (..., N, D) in their plane by angles (..., N, D / 2)."""
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
        width: D, the width of a head; a multiple of 2 n.
        axes: n, the number of dimensions of the grid.
        base: the slowest pair of channels rotates by about 1 / base per token.
        span, jitter: see :class:`GridRotation`. With ``span=14``, a grid of any size is rotated like one
            with 14 tokens per side.
        num_heads: accepted, as in :class:`GridRotation`, but unused: all heads have the same rotation.

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
        """Compute the angle of each pair of channels, (N, D / 2), at positions (N, n)."""
        pairs = self.width // (2 * self.axes)
        exponent = torch.arange(pairs, device=positions.device, dtype=positions.dtype) / pairs
        return (positions[..., None] * self.base**-exponent).flatten(1)

    def rotations(self, positions: Tensor) -> Tensor:
        return self.angles(positions)

    def rotate(self, x: Tensor, turns: Tensor) -> Tensor:
        return turn_pairs(x, turns)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base:g}"
