"""Training heads: on photos (``fit``) and on cached features (``probe``), with runs that resume exactly."""

from xattn.config import TrainConfig
from xattn.training.fitting import FitResult, fit
from xattn.training.objective import area, masked_logits, objective, variation

__all__ = ["FitResult", "TrainConfig", "area", "fit", "masked_logits", "objective", "variation"]
