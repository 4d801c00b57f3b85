"""LARS: SGD whose step in each layer is in proportion to the layer's weights (arXiv 1708.03888).

    trust = eta |w| / (|g| + decay |w|),   v <- momentum v + lr trust (g + decay w),   w <- w - v

Vectors and scalars (biases, gains) get neither trust ratio nor decay: their step is plain SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    Args:
        lr: global learning rate, > 0; typically large, since ``trust`` multiplies it.
        momentum: in [0, 1).
        weight_decay: for tensors with two axes or more.
        trust: eta, the size of a step relative to the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        for name, value, good in (
            ("lr", lr, lr > 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("trust", trust, trust > 0),
        ):
            if not good:
                raise ValueError(f"{name}: got {value}; see LARS for its range")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(w)
                change = group["lr"] * _direction(w, group["weight_decay"], group["trust"])
                w.sub_(state["momentum"].mul_(group["momentum"]).add_(change))
        return loss


def _direction(w: Tensor, decay: float, trust: float) -> Tensor:
    """trust (g + decay w); the ratio is 1 where weights or gradient are 0."""
    assert w.grad is not None
    if w.ndim < 2:
        return w.grad
    size, slope = w.norm(), w.grad.norm()
    ratio = trust * size / (slope + decay * size)
    return torch.where((size > 0) & (slope > 0), ratio, 1.0) * (w.grad + decay * w)
