"""Layers after the pooling, and how rows are pulled back through them: from a_k over y = f(x) to g_k over
x.

    y = W x + b:   g = a W           y = gelu(x) = Phi(x) x:   g = a Phi(x)
    y = LN(x):     g = c - mean(c),  c = a gamma / sigma(x)          y = x^(1/p):   g = a y / x

so that a . y equals g . x plus a part that does not depend on x. Phi(x), sigma(x) and y / x do depend on it
but are held constant, as in LRP's rules for gates and norms (AttnLRP, arXiv 2402.05602).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

# Rows (B or 1, M, ...) over a layer's output (B, ...) -> rows over its input.
Pull: TypeAlias = Callable[[Tensor], Tensor]
Step: TypeAlias = tuple[Tensor, Pull]


def step(layer: nn.Module, x: Tensor) -> Step:
    """Return ``layer(x)`` and its pullback, for x (B, ..., D).

    Raises:
        TypeError: not a Linear, LayerNorm, GELU, Dropout, Identity, or a Sequential of these.
    """
    if isinstance(layer, nn.Sequential):
        return chain(x, *layer)
    if isinstance(layer, nn.Identity):
        return x, lambda rows: rows
    if isinstance(layer, nn.Linear):
        weight = layer.weight
        return layer(x), lambda rows: rows @ weight
    if isinstance(layer, nn.LayerNorm):
        gain = (x.var(-1, unbiased=False, keepdim=True) + layer.eps).rsqrt()
        gain = (gain if layer.weight is None else gain * layer.weight)[:, None]

        def centre(rows: Tensor) -> Tensor:
            rows = rows * gain
            return rows - rows.mean(-1, keepdim=True)

        return layer(x), centre
    if isinstance(layer, nn.GELU):
        gate = (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))[:, None]
        return layer(x), lambda rows: rows * gate
    if isinstance(layer, nn.Dropout):
        kept = layer(torch.ones_like(x))
        return x * kept, lambda rows: rows * kept[:, None]
    raise TypeError(f"layer: {type(layer).__name__} has no pull")


def chain(x: Tensor, *layers: nn.Module) -> Step:
    """The layers applied in sequence."""
    pulls = []
    for layer in layers:
        x, pull = step(layer, x)
        pulls.append(pull)

    def back(rows: Tensor) -> Tensor:
        for pull in reversed(pulls):
            rows = pull(rows)
        return rows

    return x, back


def residual(x: Tensor, *layers: nn.Module, scale: Tensor | float = 1.0) -> Step:
    """x + scale * layers(x); ``scale`` is one number or one per channel."""
    y, pull = chain(x, *layers)
    return x + scale * y, lambda rows: rows + pull(rows * scale)


def mean(x: Tensor) -> Step:
    """The mean over queries: (B, Q, D) -> (B, D)."""
    count = x.shape[1]
    return x.mean(1), lambda rows: (rows / count)[:, :, None].expand(-1, -1, count, -1)


def root(x: Tensor, power: Tensor | float) -> Step:
    """x ** (1 / power), x > 0."""
    y = x ** (1 / power)
    gain = (y / x)[:, None]
    return y, lambda rows: rows * gain


def mlp(width: int, ratio: float = 4.0, eps: float | None = 1e-5) -> nn.Sequential:
    """A pre-norm transformer's MLP: LayerNorm, Linear to ``ratio`` times the width, GELU, Linear.

    Args:
        eps: epsilon of the norm; None omits the norm.

    Raises:
        ValueError: the ratio leaves no channels.
    """
    hidden = int(width * ratio)
    if hidden < 1:
        raise ValueError(
            f"mlp_ratio: got {ratio}; that leaves none of the {width} channels; give a larger ratio"
        )
    return nn.Sequential(
        nn.Identity() if eps is None else nn.LayerNorm(width, eps=eps),
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, width),
    )
