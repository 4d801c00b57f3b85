"""Training a head: the objective, deterministic data, checkpoints and the loop."""

from xattn.config import TrainConfig
from xattn.training.fitting import FitResult, fit
from xattn.training.objective import area, masked_logits, objective, variation

__all__ = ["FitResult", "TrainConfig", "area", "fit", "masked_logits", "objective", "variation"]
