"""The metrics: one file a family, with pure functions, torchmetrics classes and the probe.

Classes such as ``AverageDrop`` or ``Deletion`` load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from xattn.eval.metrics.base import Column, Finish, MeanMetric, Probe, Request, Sample
from xattn.eval.metrics.measure import measure
from xattn.eval.metrics.registry import CLASSES, DIRECT, PROBES, create_probe

__all__ = [
    "DIRECT",
    "PROBES",
    "Column",
    "Finish",
    "MeanMetric",
    "Probe",
    "Request",
    "Sample",
    "create_probe",
    "measure",
]


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module 'xattn.eval.metrics' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xattn.eval.metrics.{CLASSES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *CLASSES]
