"""The metrics. Each family is a file with pure functions, torchmetrics classes and a metric for the engine.

The torchmetrics classes, such as ``AverageDrop`` or ``Deletion``, are attributes of this package.
"""

from __future__ import annotations

from typing import Any

from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.custom import register_metric
from xattn.eval.metrics.mean_metric import MeanMetric
from xattn.eval.metrics.measure import measure
from xattn.eval.metrics.registry import CLASSES, GROUPS, create_metric, register

__all__ = [
    "GROUPS",
    "Column",
    "Finish",
    "MeanMetric",
    "MetricGroup",
    "MetricInfo",
    "PerturbationMetric",
    "Request",
    "Sample",
    "create_metric",
    "measure",
    "register",
    "register_metric",
]


def __getattr__(name: str) -> Any:
    if name[:1].isupper() and name in CLASSES:
        return CLASSES[name]
    raise AttributeError(f"module 'xattn.eval.metrics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *CLASSES]
