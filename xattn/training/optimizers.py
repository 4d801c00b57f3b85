"""Optimizers and schedules: LARS for probes, AdamW or SGD on a OneCycle schedule for heads.

    trust = eta |w| / (|g| + decay |w|),   v <- momentum v + lr trust (g + decay w),   w <- w - v

This is LARS (arXiv 1708.03888), whose step in each layer is proportional to the norm of the layer's
weights. Vectors and scalars (biases, gains) have neither a trust ratio nor decay; for them the optimizer
is plain SGD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from xattn.config import TrainConfig
from xattn.heads import Head

RISE = 0.05  # share of the steps in which a learning rate rises


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling.

    Args:
        lr: global learning rate, > 0; it is typically large, because the step is also multiplied by
            ``trust``.
        momentum: a number in [0, 1).
        weight_decay: weight decay of tensors with two axes or more.
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
    """trust (g + decay w); the ratio is 1 if weights or gradient are 0."""
    assert w.grad is not None
    if w.ndim < 2:
        return w.grad
    size, slope = w.norm(), w.grad.norm()
    ratio = trust * size / (slope + decay * size)
    return torch.where((size > 0) & (slope > 0), ratio, 1.0) * (w.grad + decay * w)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Divide the trainable parameters into optimizer groups; only parameters with two axes or more
    decay."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def share_of_peak(step: int, total: int) -> float:
    """Return the fraction of the peak learning rate at step 0, 1, ... of ``total``: a short linear rise,
    then half a cosine."""
    rise = max(1, round(RISE * total))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(step - rise, total) / max(total - rise, 1)))


def one_cycle(optimizer: torch.optim.Optimizer, total: int) -> OneCycleLR:
    """Create a OneCycle schedule of ``total`` steps that peaks at the learning rates of ``optimizer``."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(
        optimizer, max_lr=peaks, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # no change; else the scheduler warns if the first batch is unreadable
    return scheduler


def head_optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Create the optimizer of a head. Weight decay applies to everything except biases, including
    BatchNorm gains, as in T-TAME's code; the learning rate in ``config`` is multiplied by the head's
    factors."""
    members: dict[tuple[float, bool], list[Tensor]] = {(1.0, False): [], (1.0, True): []}
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            group = head.learning_rates.get(name, 1.0), name.endswith("bias")
            members.setdefault(group, []).append(parameter)
    groups = [
        {
            "params": found,
            "lr": config.lr * times,
            "weight_decay": 0.0 if bias else config.weight_decay,
        }
        for (times, bias), found in members.items()
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
