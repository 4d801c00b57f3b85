"""Which metrics are close to a head's training, by what both of them read.

A metric declares what it reads (:class:`~xattn.eval.metrics.base.Reads`), :data:`OBJECTIVES` what training
did. Tables mark a metric as close to a head's training if both read the same score of photos whose parts
are hidden by the same masks or show the same fill.

"masking" (T-TAME, :mod:`xattn.training.objective`)
    The class stays under the map as a mask with black behind it, and the mask is small. In
    "masking-mean" the data set's mean colour is behind it, in "masking-features" it multiplies features.
"outcomes" (:mod:`xattn.training.objective`)
    Sums of the map over what masks keep go with the class's scores there. The masks
    (:mod:`xattn.training.outcome_rows`) are squares, smooth blobs, and thresholds of the head's starting
    map under noise. These are no thresholds of the head's own map, as deletion, insertion and ROAD
    take them, but similar.

A head that is best in such a metric shows that training worked, not that its maps are more faithful
than those of a method that was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xattn.eval.metrics.base import Reads
from xattn.training.outcome_rows import FILLS


class Objective(NamedTuple):
    """What training reads, in the words of :class:`~xattn.eval.metrics.base.Reads`."""

    scores: tuple[str, ...]
    masks: tuple[str, ...]
    fills: tuple[str, ...]


OBJECTIVES: Mapping[str, Objective] = {
    "masking": Objective(("class", "area"), ("the map",), ("black",)),
    "masking-mean": Objective(("class", "area"), ("the map",), ("mean",)),
    "masking-features": Objective(("class", "area"), ("the map",), ()),
    "outcomes": Objective(("class",), ("squares", "blobs", "thresholds of CAM"), FILLS),
}
"""By the name that results keep of a head, see :func:`objective_of`."""
MARK = "†"
"""What tables put beside a value in such a metric."""
LEGEND = "close to this head's training: the same score, and the same fill or masks"

_POLICIES = {"normalized": "masking-mean", "feature": "masking-features"}
_SAME = {"image-mean": "mean", "rise": "blur"}


class Shared(NamedTuple):
    """What a metric and an objective have in common."""

    score: bool
    masks: bool
    fill: bool

    @property
    def close(self) -> bool:
        """The score, and the masks or the fill."""
        return self.score and (self.masks or self.fill)


def shared(
    objective: str | None, reads: Reads | None, options: Mapping[str, Any] | None = None
) -> Shared:
    """What a metric shares with the training of a head.

    Args:
        reads: what the metric declares; None shares nothing, nor does an objective that is not known.
        options: those of the metric's column, of which ``fill`` or ``masked_value`` is the fill.

    >>> black = Reads("class", "squares", "black")
    >>> shared("masking", black)
    Shared(score=True, masks=False, fill=True)
    >>> shared("masking", black, {"fill": "noise"}).close
    False
    """
    found = OBJECTIVES.get(objective or "")
    if found is None or reads is None:
        return Shared(False, False, False)
    options = options or {}
    fill = options.get("fill", options.get("masked_value", reads.fill))
    return Shared(
        reads.score in found.scores,
        reads.masks in found.masks,
        _SAME.get(fill, fill) in found.fills,
    )


def objective_of(explainer: Any) -> str | None:
    """The objective that an explainer's head was trained with, by its own record of training.

    None for what is no head, was not trained, or was trained as a classifier, which no metric resembles.
    A record without an objective is of a time when heads of photos had but one, ``"masking"``.
    """
    if not getattr(explainer, "needs_head", False):
        return None
    head = getattr(explainer, "head", None)
    summary = getattr(head, "summary", None)
    config = summary.get("config") if isinstance(summary, Mapping) else None
    if not isinstance(config, Mapping):
        return None
    objective = config.get("objective", "masking" if "cross_entropy" in config else None)
    if objective == "masking":
        return _POLICIES.get(getattr(head, "mask_policy", ""), objective)
    return None if objective is None else str(objective)
