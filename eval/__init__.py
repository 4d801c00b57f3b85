"""Fidelity of explanations: metrics, protocols, sanity rows, intervals and reports.

``evaluate(backbone, {name: explainer}, images) -> Results`` is the whole job; the names below load
on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "evaluate": "evaluation.engine",
    "Results": "evaluation.results",
    "Row": "evaluation.results",
    "Difference": "evaluation.results",
    "ImageRecord": "evaluation.results",
    "MethodResult": "evaluation.results",
    "is_baseline": "evaluation.results",
    "Protocol": "protocol",
    "METRICS": "metrics.registry",
    "Annotation": "annotations",
    "Annotations": "annotations",
    "load_annotations": "annotations",
    "preset": "metric_presets",
    "Comparison": "leaderboard",
    "compare": "leaderboard",
    "Column": "metrics.base",
    "PerturbationMetric": "metrics.base",
    "Reads": "metrics.base",
    "Request": "metrics.base",
    "Sample": "metrics.base",
    "MaskingMetric": "metrics.masking",
    "measure": "metrics.measure",
    "MetricInfo": "metrics.base",
    "create_probe": "metrics.registry",
    "register_metric": "metrics.own",
    "PROBES": "metrics.registry",
    "MaskedScorer": "metrics.scorer",
    "AverageDrop": "metrics.masking",
    "AverageDropInDeletion": "metrics.masking",
    "AverageGain": "metrics.masking",
    "IncreaseInConfidence": "metrics.masking",
    "average_drop": "functional",
    "average_drop_in_deletion": "functional",
    "average_gain": "functional",
    "increase_in_confidence": "functional",
    "saliency": "functional",
    "threshold_mask": "functional",
    "mean_interval": "bootstrap",
    "paired_difference": "bootstrap",
    "randomized_backbone": "sanity",
    "randomized_explainer": "sanity",
    "sanity_rows": "sanity",
    "aggregate_ranks": "report.aggregate_ranks",
    "format_table": "report",
    "read_json": "report",
    "write_csv": "report",
    "write_json": "report",
}

__all__ = [
    "METRICS",
    "PROBES",
    "Annotation",
    "Annotations",
    "AverageDrop",
    "AverageDropInDeletion",
    "AverageGain",
    "Column",
    "Comparison",
    "Difference",
    "ImageRecord",
    "IncreaseInConfidence",
    "MaskedScorer",
    "MaskingMetric",
    "MethodResult",
    "MetricInfo",
    "PerturbationMetric",
    "Protocol",
    "Reads",
    "Request",
    "Results",
    "Row",
    "Sample",
    "aggregate_ranks",
    "average_drop",
    "average_drop_in_deletion",
    "average_gain",
    "compare",
    "create_probe",
    "evaluate",
    "format_table",
    "increase_in_confidence",
    "is_baseline",
    "load_annotations",
    "mean_interval",
    "measure",
    "paired_difference",
    "preset",
    "randomized_backbone",
    "randomized_explainer",
    "read_json",
    "register_metric",
    "saliency",
    "sanity_rows",
    "threshold_mask",
    "write_csv",
    "write_json",
]

if TYPE_CHECKING:
    from xattn.eval.annotations.objects import Annotation, Annotations, load_annotations
    from xattn.eval.bootstrap import mean_interval, paired_difference
    from xattn.eval.evaluation.engine import evaluate
    from xattn.eval.evaluation.results import (
        Difference,
        ImageRecord,
        MethodResult,
        Results,
        Row,
        is_baseline,
    )
    from xattn.eval.functional import (
        average_drop,
        average_drop_in_deletion,
        average_gain,
        increase_in_confidence,
        saliency,
        threshold_mask,
    )
    from xattn.eval.leaderboard import Comparison, compare
    from xattn.eval.metric_presets import preset
    from xattn.eval.metrics.base import (
        Column,
        MetricInfo,
        PerturbationMetric,
        Reads,
        Request,
        Sample,
    )
    from xattn.eval.metrics.masking import (
        AverageDrop,
        AverageDropInDeletion,
        AverageGain,
        IncreaseInConfidence,
        MaskingMetric,
    )
    from xattn.eval.metrics.measure import measure
    from xattn.eval.metrics.own import register_metric
    from xattn.eval.metrics.registry import METRICS, PROBES, create_probe
    from xattn.eval.metrics.scorer import MaskedScorer
    from xattn.eval.protocol import Protocol
    from xattn.eval.report.aggregate_ranks import aggregate_ranks
    from xattn.eval.report.results_files import read_json, write_csv, write_json
    from xattn.eval.report.text_tables import format_table
    from xattn.eval.sanity import randomized_backbone, randomized_explainer, sanity_rows


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'xattn.eval' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"xattn.eval.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
