"""How a map was made: the record that packs and results store."""

from __future__ import annotations

from typing import Any

from xattn.backbone import Backbone, sha256
from xattn.backbone.scored import Scored, target_record
from xattn.explainers import Explainer
from xattn.runtime.version import __version__

# The definition of p for each task.
P = {
    "multiclass": "softmax",
    "binary": "softmax",
    "multilabel": "sigmoid",
    "regression": "value",
}


def provenance_of(backbone: Backbone, method: Explainer, view: str) -> dict[str, Any]:
    """The record of how maps of ``method`` are made; it contains ``target`` and ``notes`` only if there are
    any."""
    head = method.head if method.needs_head else None
    record = None
    if head is not None:
        record = {"name": head.name, "sha256": sha256(head), "explain_with": head.explain_with}
        if head.backbone_taps != list(backbone.taps):
            record["taps"] = head.backbone_taps
    notes = {"notes": list(method.notes)} if method.notes else {}
    return {
        "xattn": __version__,
        "backbone": {
            "name": backbone.name,
            "sha256": backbone.fingerprint,
            "taps": list(backbone.taps),
            "input_size": list(backbone.preprocessing.input_size),
            **backbone.conversion_record(),
            **backbone.preprocessing_record(),
        },
        "head": record,
        "explainer": method.name,
        "forward_passes": method.total_forwards,
        "seed": method.seed,
        "view": view,
        "classes": "top",
        "map": "mask" if method.is_mask else "as explained; min-max before upsampling for display",
        "probability": backbone.score if isinstance(backbone, Scored) else P[backbone.task],
        "task": backbone.task,
        **target_record(backbone),
        **notes,
        **method.facts,
    }
