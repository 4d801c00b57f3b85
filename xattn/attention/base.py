"""Base of all mechanisms (queries, keys and values in, an operator out), their registry, and the layer.

    layer = create_attention("gna", dim=384, num_heads=6, kernel=7)
    y = layer(x, grid=(32, 32), prefix=1)

A mechanism decides which A stands in Y = A V; projections, prefix tokens and recording are the same for
all. Tokens are ``prefix`` class or register tokens, then the grid in raster order.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xattn.attention.operator import Operator
from xattn.attention.record import Call, keep, own_layer, recording
from xattn.kernels.backend import choose

_REGISTRY: dict[str, type[Mechanism]] = {}


@dataclass(frozen=True)
class Entry:
    """What the registry knows about a mechanism."""

    name: str
    paper: str
    complexity: str
    """Time for N tokens of width D."""
    grid: tuple[int, ...] = (0,)
    """Numbers of grid dimensions that it works on; 0 stands for any tokens, without a grid."""
    causal: bool = False
    training_free: bool = False
    """Whether it can replace all softmax layers of a trained classifier without training and keep
    most of the accuracy, as :mod:`xattn.eval.studies.swapped_attention` measures."""


class Mechanism(nn.Module, ABC):
    """A(q, k, v) of Y = A V + (optionally) a local term.

    Args:
        dim: C, width of the tokens; ``num_heads``: H, which divides it.
        backend: of the kernels, see :func:`xattn.kernels.backend.choose`.
    """

    entry: ClassVar[Entry]

    def __init__(self, dim: int, num_heads: int, *, backend: str = "auto") -> None:
        super().__init__()
        if whole("dim", dim) % whole("num_heads", num_heads):
            raise ValueError(f"dim, num_heads: got {dim}, {num_heads}; num_heads has to divide dim")
        choose("auto" if backend == "triton" else backend, torch.device("cpu"))  # checks the name
        self.dim, self.num_heads, self.backend = dim, num_heads, backend

    @abstractmethod
    def operator(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> Operator:
        """A for q, k, v (B, H, N, D) in the order of the tokens."""

    def local(self, v: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor | None:
        """What is added to A V, (B, H, N, D); None adds nothing."""
        return None

    def maps(
        self, operator: Operator, grid: tuple[int, ...] | None, prefix: int
    ) -> dict[str, Tensor]:
        """The mechanism's own maps for an operator that it made: (B, K, h, w) by name."""
        return {}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        """Y (B, H, N, D) for q, k, v (B, H, N, D), already normalised, rotated, ...

        Args:
            grid: lengths of the token grid behind the prefix; optional for mechanisms without one.
            scale: of the scores, where it is not 1 / sqrt(D).
        """
        grid = self.check(q, k, v, grid, prefix)
        if scale is not None and not math.isclose(scale, q.shape[-1] ** -0.5):
            q = q * (scale * math.sqrt(q.shape[-1]))
        with own_layer():
            return self._run(q, k, v, grid, prefix)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> Tensor:
        operator = self.operator(q, k, v, grid, prefix)
        output = operator.matvec(v)
        if recording():
            with torch.no_grad():
                if output.requires_grad:  # the recorded operator is not part of the graph
                    q, k = q.detach(), k.detach()
                    operator = self.operator(q, k, v.detach(), grid, prefix)
                keep(Call(operator, v.detach(), output, self.maps(operator, grid, prefix)))
        local = self.local(v, grid, prefix)
        return output if local is None else output + local

    def check(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int] | None, prefix: int
    ) -> tuple[int, ...] | None:
        """The grid as a tuple; raises a ``ValueError`` that names what does not fit."""
        name, tokens = self.entry.name, q.shape[-2]
        if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(f"q, k, v: got {shapes}; {name} needs three of shape (B, H, N, D)")
        if q.shape[1] * q.shape[3] != self.dim or q.shape[1] != self.num_heads:
            raise ValueError(
                f"q: got {q.shape[1]} heads of {q.shape[3]}; {name} was made for {self.num_heads} "
                f"heads of {self.dim // self.num_heads}"
            )
        if not 0 <= prefix < tokens:
            raise ValueError(f"prefix: got {prefix} of {tokens} tokens; give 0 to {tokens - 1}")
        if grid is None:
            if 0 not in self.entry.grid:
                raise ValueError(f"grid: {name} needs the grid of the tokens, for example (14, 14)")
            return None
        grid = tuple(grid)
        if math.prod(grid) != tokens - prefix:
            raise ValueError(
                f"grid: {grid} holds {math.prod(grid)} tokens; got {tokens} with {prefix} prefix tokens"
            )
        if 0 not in self.entry.grid and len(grid) not in self.entry.grid:
            raise ValueError(
                f"grid: got {len(grid)} dimensions; {name} works on "
                f"{' or '.join(str(n) for n in self.entry.grid)}"
            )
        return grid


class Attention(nn.Module):
    """Multi-head self-attention around a mechanism: projections as in a timm ViT.

    Args:
        mechanism: what stands between the projections.
        qkv_bias, proj_bias: whether the projections have biases.
        qk_norm: layer norm of queries and keys in each head.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        dim, self.num_heads = mechanism.dim, mechanism.num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(dim // self.num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(dim // self.num_heads) if qk_norm else nn.Identity()
        self.mechanism = mechanism
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None, prefix: int = 0) -> Tensor:
        """(B, N, C) -> (B, N, C); ``grid`` and ``prefix`` as in :meth:`Mechanism.forward`."""
        if x.ndim != 3 or x.shape[2] != self.mechanism.dim:
            raise ValueError(f"x: got {tuple(x.shape)}; give (B, N, {self.mechanism.dim})")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = self.mechanism(self.q_norm(q), self.k_norm(k), v, grid, prefix)
        return self.proj(merge_heads(y))


def whole(name: str, value: Any) -> int:
    """``value`` if it is a whole number of at least 1; else a ``ValueError`` that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}; give a whole number of at least 1")
    return value


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H D)."""
    return x.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H D) -> (B, H, N, D)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


# ---------------------------------------------------------------------- registry


def register(
    name: str, *, paper: str, complexity: str, **properties: Any
) -> Callable[[type[Mechanism]], type[Mechanism]]:
    """Class decorator: make a mechanism known under ``name``; ``properties`` as in :class:`Entry`."""

    def add(cls: type[Mechanism]) -> type[Mechanism]:
        cls.entry = Entry(name, paper, complexity, **properties)
        _REGISTRY[name] = cls
        return cls

    return add


def list_attention() -> list[str]:
    """Names that :func:`create_attention` accepts."""
    return sorted(_REGISTRY)


def mechanism_class(name: str) -> type[Mechanism]:
    """The registered class; a ``ValueError`` with near matches for an unknown name."""
    if name not in _REGISTRY:
        near = difflib.get_close_matches(str(name), _REGISTRY, 3, 0.4) or list_attention()
        raise ValueError(f"name: unknown attention {name!r}; did you mean {', '.join(near)}?")
    return _REGISTRY[name]


def create_mechanism(name: str, dim: int, num_heads: int, **options: Any) -> Mechanism:
    """A mechanism alone, for q, k, v of :attr:`num_heads` heads; ``options`` are its own.

    Raises:
        ValueError: unknown name (with near matches), unknown option, or values that do not fit.
    """
    cls = mechanism_class(name)
    try:
        return cls(dim, num_heads, **options)
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"options: {name} does not take that option ({error})") from None
        raise


def create_attention(
    name: str,
    dim: int,
    num_heads: int,
    *,
    qkv_bias: bool = True,
    proj_bias: bool = True,
    qk_norm: bool = False,
    **options: Any,
) -> Attention:
    """An attention layer by the mechanism's name; arguments as in :class:`Attention`.

    Raises:
        ValueError: as in :func:`create_mechanism`.
    """
    mechanism = create_mechanism(name, dim, num_heads, **options)
    return Attention(mechanism, qkv_bias, proj_bias, qk_norm)
