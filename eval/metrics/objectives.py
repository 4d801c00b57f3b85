"""Which metrics a head was trained on: those that measure what its training objective asks of a map.

"masking" (T-TAME, :mod:`xattn.training.objective`)
    The class stays under the map as a mask, and the mask is small. AD, IC, ADD, AG and drop are of the
    first, ``complexity``, the mean of the mask, is of the second, and ADCC is made of both.
"outcomes" (:mod:`xattn.training.outcomes_objective`)
    Sums of the map over what random masks keep go with the class's scores there. Infidelity and
    monotonicity, too, compare sums of the map with scores of images of which parts are gone.

A head that is best in such a metric shows that training worked, not that its maps are more faithful
than those of a method that was not trained on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINED_ON: Mapping[str, tuple[str, ...]] = {
    "masking": ("AD", "IC", "ADD", "AG", "drop", "ADCC", "complexity"),
    "outcomes": ("infidelity", "monotonicity"),
}
"""Metrics by objective, both by name."""
MARK = "†"
"""What tables put beside a value in such a metric."""
LEGEND = "a metric that this head was trained on"


def objective_of(explainer: Any) -> str | None:
    """The objective that an explainer's head was trained with, by its own record of training.

    None for what is no head, was not trained, or was trained as a classifier, which no metric resembles.
    A record without an objective is of a time when heads of photos had but one, ``"masking"``.
    """
    if not getattr(explainer, "needs_head", False):
        return None
    summary = getattr(getattr(explainer, "head", None), "summary", None)
    config = summary.get("config") if isinstance(summary, Mapping) else None
    if not isinstance(config, Mapping):
        return None
    objective = config.get("objective", "masking" if "cross_entropy" in config else None)
    return None if objective is None else str(objective)


def is_trained_on(objective: str | None, metric: str) -> bool:
    """Whether ``metric`` is one that heads of this objective are trained on.

    >>> is_trained_on("masking", "AD"), is_trained_on("outcomes", "AD"), is_trained_on(None, "AD")
    (True, False, False)
    """
    return metric in TRAINED_ON.get(objective or "", ())
