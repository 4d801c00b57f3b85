"""The input of an attention mechanism: queries, keys and values, the layer's tokens, and their layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a mechanism.

    N queries attend to S keys; in self-attention S = N. With fewer key heads than query heads (Hk divides
    H), query head h reads key head h // (H // Hk). The tokens are ``prefix`` class or register tokens,
    followed by the ``grid`` in raster order.

    Example:
        >>> import torch
        >>> from xattn.attention import Inputs
        >>> q, k, v = torch.rand(3, 2, 4, 10, 8)
        >>> inputs = Inputs(q, k, v, grid=(3, 3), prefix=1)  # a class token, 3 x 3 patches
        >>> inputs.replace(causal=True).causal
        True
    """

    q: Tensor
    """(B, H, N, D), already normalised, rotated, and so on."""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    x: Tensor | None = None
    """(B, N, C), the input tokens of the layer, for gates and routers."""
    grid: tuple[int, ...] | None = None
    """Side lengths of the token grid after the prefix."""
    prefix: int = 0
    scale: float | None = None
    """Scale of the scores, 1 / sqrt(D) by default; it is never None once the record is created."""
    causal: bool = False
    """Whether token i sees only tokens 0 to i; this includes prefix tokens."""
    carried: dict[Any, Any] | None = None
    """In a converted model, what the layers of this pass store for later layers, and the model's input
    under ``"photo"`` for mechanisms that read it; otherwise None."""
    rotated: bool = False
    """Whether queries and keys have passed through the mechanism's own rotation."""

    def __post_init__(self) -> None:
        if self.scale is None:
            object.__setattr__(self, "scale", self.q.shape[-1] ** -0.5)

    def replace(self, **changes: Any) -> Inputs:
        return replace(self, **changes)

    def detach(self) -> Inputs:
        """Return a copy that is detached from the graph."""
        x = None if self.x is None else self.x.detach()
        q, k, v = self.q.detach(), self.k.detach(), self.v.detach()
        return replace(self, q=q, k=k, v=v, x=x, carried=None)

    def autocast(self) -> Inputs:
        """Return a copy in the autocast dtype if autocast is on.

        It is needed because norms return float32 on a GPU.
        """
        kind = self.q.device.type
        if self.q.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
            return self
        half = torch.get_autocast_dtype(kind)
        return replace(self, q=self.q.to(half), k=self.k.to(half), v=self.v.to(half))

    def ungrouped(self) -> Inputs:
        """Return a copy with one key head for every query head."""
        heads = self.q.shape[1]
        if self.k.shape[1] == heads:
            return self
        return replace(self, k=spread_heads(self.k, heads), v=spread_heads(self.v, heads))


def spread_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each key head for the query heads that read it: (B, Hk, S, D) -> (B, H, S, D)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """Expand (B, 1 or Hk or H, ...) to (B, 1 or H, ...); all heads share a single one."""
    return x if x.shape[1] == 1 else spread_heads(x, heads)


def on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` is on a CPU, where copies cost more than calls.

    On other devices each call launches a kernel.
    """
    return x.device.type == "cpu"


def may_read_values(x: Tensor) -> bool:
    """Return whether code may read the values of ``x`` to save work.

    On a GPU this would mean waiting, and compiled code has no values."""
    return on_cpu(x) and not torch.compiler.is_compiling()
