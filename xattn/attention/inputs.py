"""The input of an attention mechanism: queries, keys and values, the layer's tokens, and their layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call to a mechanism.

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
    """(B, H, N, D), after any normalisation or rotary embedding of the model."""
    k: Tensor
    """(B, Hk, S, D)"""
    v: Tensor
    """(B, Hk, S, Dv)"""
    x: Tensor | None = None
    """(B, N, C), the input tokens of the layer, for gates and routers."""
    grid: tuple[int, ...] | None = None
    """Side lengths of the token grid after the prefix."""
    prefix: int = 0
    scale: Any = None
    """Factor (float) by which scores are multiplied. None is replaced by 1 / sqrt(D) in the new record."""
    causal: bool = False
    """Whether token i sees only tokens 0 to i. This also holds for prefix tokens."""
    carried: dict[Any, Any] | None = None
    """In a converted model, the dict in which the layers of this pass store data for later layers. For
    mechanisms that read the model's input, it is stored under ``"photo"``. None in other models."""
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

        This is necessary because, on a GPU, normalisation layers return float32 under autocast.
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
    """Expand (B, 1 or Hk or H, ...) to (B, 1 or H, ...). A size of 1, shared by all heads, is kept."""
    return x if x.shape[1] == 1 else spread_heads(x, heads)


def on_cpu(x: Tensor) -> bool:
    """Return whether ``x`` is on a CPU.

    On a CPU, copying tensors costs more than calling additional functions. On other devices, every call
    launches a kernel, which costs more than a copy.
    """
    return x.device.type == "cpu"


def may_read_values(x: Tensor) -> bool:
    """Return whether code may look at the values of ``x`` in order to save work.

    On a GPU, the code would have to wait for the values, and while it is being compiled, there are none."""
    return on_cpu(x) and not torch.compiler.is_compiling()
