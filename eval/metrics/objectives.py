"""Which metrics are close to a head's training objective, judged by what both are computed from.

A metric declares what it reads (:class:`~xattn.eval.metrics.base.MetricInputs`), and :data:`OBJECTIVES`
lists what each kind of training reads. Tables mark a metric as close to a head's training if both use the
same score on photos, and hide parts of the photos with the same masks or replace them by the same fill.

``mask`` (:mod:`xattn.training.objectives.mask`)
    Training keeps the score of the class high on the photo masked with the map on black, and keeps the mask
    small. With "mask-mean", masked pixels get the data set's mean colour; with "mask-features", the
    features are multiplied by the mask.
``outcomes``, ``shapley``, ``labels``, ``greedy`` (a table, :mod:`xattn.training.outcome_rows`)
    For each mask, training fits the sum of the map over the parts that the mask keeps to the score of the
    class under this mask. The masks of ``outcomes`` are squares, smooth blobs, and thresholds of the head's
    initial map with noise. These thresholds are similar to, but not the same as, the thresholds of the
    head's trained map that deletion, insertion and ROAD use. The other objectives use masks of cells.
    Hidden parts are black, blurred or mean-coloured in turn; a name such as "shapley-black" fixes one of
    these.
``rank`` (:mod:`xattn.training.objectives.rank`)
    Training optimises deletion and insertion directly, with a soft order of the map's cells.
``select`` (:mod:`xattn.training.objectives.select`)
    Training draws cells with probabilities given by the map, makes all other cells black, and keeps the
    score of the class high on such photos.

If a head wins in such a metric, this shows that its training worked, not that its maps are more faithful
than the maps of a method without training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xattn.config import GAMES
from xattn.eval.metrics.base import MetricInputs
from xattn.training.outcome_rows import DROP, FILLS


class Objective(NamedTuple):
    """What training reads, described in the terms of :class:`~xattn.eval.metrics.base.MetricInputs`."""

    scores: tuple[str, ...]
    masks: tuple[str, ...]
    fills: tuple[str, ...]


_BOTH = ("class", "area")
_ON_PHOTOS = {
    "mask": Objective(_BOTH, ("the map",), ("black",)),
    "mask-mean": Objective(_BOTH, ("the map",), ("mean",)),
    "mask-features": Objective(_BOTH, ("the map",), ()),
    "rank": Objective(("class",), ("thresholds of the map",), FILLS),
    "select": Objective(("class",), ("squares",), ("black",)),
}
_ON_TABLES = {
    "outcomes": ("squares", "blobs", "thresholds of CAM"),
    **dict.fromkeys(GAMES, ("squares",)),
}
OBJECTIVES: Mapping[str, Objective] = {
    **_ON_PHOTOS,
    **{name: Objective(("class",), masks, FILLS) for name, masks in _ON_TABLES.items()},
    **{
        f"{name}-{fill}": Objective(("class",), masks, (fill,))
        for name, masks in _ON_TABLES.items()
        for fill in (*FILLS, DROP)
    },
}
"""The objectives, keyed by the name that results store for a head, see :func:`objective_of`."""
MARK = "†"
"""The mark beside a value in a table if the metric is close to the head's training."""
LEGEND = "close to this head's training: the same score, and the same fill or masks"

_POLICIES = {"normalized": "mask-mean", "feature": "mask-features"}
_SAME = {"image-mean": "mean", "rise": "blur"}


class SharedParts(NamedTuple):
    """What a metric and an objective have in common."""

    score: bool
    masks: bool
    fill: bool

    @property
    def close(self) -> bool:
        """Whether they share the score, and the masks or the fill."""
        return self.score and (self.masks or self.fill)


def find_shared(
    objective: str | None, reads: MetricInputs | None, options: Mapping[str, Any] | None = None
) -> SharedParts:
    """Return what a metric shares with the training of a head.

    Args:
        reads: what the metric declares. If it is None, or the objective is unknown, nothing is shared.
        options: the options of the metric's column; the fill is its option ``fill`` or ``masked_value``.

    >>> black = MetricInputs("class", "squares", "black")
    >>> find_shared("mask", black)
    SharedParts(score=True, masks=False, fill=True)
    >>> find_shared("mask", black, {"fill": "noise"}).close
    False
    """
    found = OBJECTIVES.get(objective or "")
    if found is None or reads is None:
        return SharedParts(False, False, False)
    options = options or {}
    fill = options.get("fill", options.get("masked_value", reads.fill))
    return SharedParts(
        reads.score in found.scores,
        reads.masks in found.masks,
        _SAME.get(fill, fill) in found.fills,
    )


def objective_of(explainer: Any) -> str | None:
    """Return the objective with which an explainer's head was trained, according to the head's own record.

    Return None if the explainer has no head, or if its head was not trained or was trained as a classifier,
    since training a classifier is close to no metric.
    """
    if not getattr(explainer, "needs_head", False):
        return None
    head = getattr(explainer, "head", None)
    summary = getattr(head, "summary", None)
    if not isinstance(summary, Mapping):
        return None
    config = summary.get("config")
    if not isinstance(config, Mapping) or not config.get("objective"):
        return None
    name = str(config["objective"]).partition(":")[0]
    if name == "mask":
        return _POLICIES.get(getattr(head, "mask_policy", ""), name)
    fills = (summary.get("table") or {}).get("fills", ())
    return f"{name}-{fills[0]}" if len(fills) == 1 else name
