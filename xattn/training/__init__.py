"""Train heads on photos (``fit``) and on cached features (``probe``). A resumed run gives the same result
as an uninterrupted one."""

from xattn.config import TrainConfig
from xattn.training.fitting import FitResult, fit
from xattn.training.objectives.base import (
    Objective,
    create_objective,
    list_objectives,
    register_objective,
)

__all__ = [
    "FitResult",
    "Objective",
    "TrainConfig",
    "create_objective",
    "fit",
    "list_objectives",
    "register_objective",
]
