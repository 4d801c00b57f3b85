"""How heads are optimised: AdamW or SGD on a OneCycle schedule, and what a run restores of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from xattn.config import TrainConfig
from xattn.heads import Head
from xattn.training.photo_loop import PhotoLoopState


class FitState(PhotoLoopState):
    """The learning rate schedule, and the images that could not be read."""

    keys: tuple[str, ...] = ("scheduler", "skipped")

    def __init__(self, scheduler: LRScheduler, accelerator: Any) -> None:
        super().__init__(accelerator)
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        super().load_state_dict(state)

    def next_lr(self) -> float:
        """Go on to the next step's learning rate."""
        if self.scheduler.last_epoch + 1 < self.scheduler.total_steps:  # type: ignore[attr-defined]
            self.scheduler.step()
        return float(self.scheduler.get_last_lr()[0])


def one_cycle(optimizer: torch.optim.Optimizer, total: int) -> OneCycleLR:
    """A OneCycle schedule of ``total`` steps that peaks at the learning rates of ``optimizer``."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(
        optimizer, max_lr=peaks, total_steps=max(total, 2), pct_start=0.3, final_div_factor=1e4
    )
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # moves nothing; else the scheduler warns where the first batch is unreadable
    return scheduler


def head_optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay on everything but biases, BatchNorm gains included, as in T-TAME's code; the learning
    rate is that of ``config``, times what the head asks for."""
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
