"""The masking metrics of :mod:`xattn.eval.functional` as torchmetrics classes.

Their states are sums (float64 sum, n, n_invalid), so memory is flat and processes add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from xattn.eval import functional


class _MaskingMetric(Metric):
    """``update(p, q, valid=None)`` with (B,) probabilities; ``compute()`` in percent."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    n: Tensor
    n_invalid: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_invalid", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, total: Tensor, n: Tensor, n_invalid: Tensor) -> None:
        self.total += total
        self.n += n
        self.n_invalid += n_invalid

    def compute(self) -> Tensor:
        """The mean over valid images, float64; NaN if there was none."""
        return functional._mean_compute(self.total, self.n)


class AverageDrop(_MaskingMetric):
    """AD, see :func:`xattn.eval.functional.average_drop`."""

    higher_is_better = False

    def update(self, p: Tensor, q: Tensor, valid: Tensor | None = None) -> None:
        self._add(*functional._average_drop_update(p, q, valid))


class IncreaseInConfidence(_MaskingMetric):
    """IC, see :func:`xattn.eval.functional.increase_in_confidence`."""

    higher_is_better = True

    def __init__(self, margin: float = functional.IC_MARGIN, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin

    def update(self, p: Tensor, q: Tensor, valid: Tensor | None = None) -> None:
        self._add(*functional._increase_in_confidence_update(p, q, valid, self.margin))


class AverageDropInDeletion(_MaskingMetric):
    """ADD, see :func:`xattn.eval.functional.average_drop_in_deletion`; ``q`` is d."""

    higher_is_better = True

    def update(self, p: Tensor, q: Tensor, valid: Tensor | None = None) -> None:
        self._add(*functional._average_drop_in_deletion_update(p, q, valid))


class AverageGain(_MaskingMetric):
    """AG, see :func:`xattn.eval.functional.average_gain`."""

    higher_is_better = True

    def update(self, p: Tensor, q: Tensor, valid: Tensor | None = None) -> None:
        self._add(*functional._average_gain_update(p, q, valid))
