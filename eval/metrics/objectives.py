"""Which metrics are close to a head's training, by what both of them read.

A metric declares what it reads (:class:`~xattn.eval.metrics.base.Reads`), :data:`OBJECTIVES` what training
did. Tables mark a metric as close to a head's training if both read the same score of photos whose parts
are hidden by the same masks or show the same fill.

``mask`` (:mod:`xattn.training.objectives.mask`)
    The class stays under the map as a mask with black behind it, and the mask is small. In
    "mask-mean" the data set's mean colour is behind it, in "mask-features" it multiplies features.
``outcomes``, ``shapley``, ``labels``, ``greedy`` (a table, :mod:`xattn.training.outcome_rows`)
    Sums of the map over what masks keep go with the class's scores there. The masks of outcomes are
    squares, smooth blobs, and thresholds of the head's starting map under noise, which are no
    thresholds of the head's own map, as deletion, insertion and ROAD take them, but similar; those of
    the others are cells. What is hidden is black, blurred or mean in turn, or as in "shapley-black".
``rank`` (:mod:`xattn.training.objectives.rank`)
    Deletion and insertion themselves, of a soft order of the map's cells.
``select`` (:mod:`xattn.training.objectives.select`)
    The class stays under masks of cells that are drawn by the map, with black in place of the others.

A head that is best in such a metric shows that training worked, not that its maps are more faithful
than those of a method that was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xattn.config import GAMES
from xattn.eval.metrics.base import Reads
from xattn.training.outcome_rows import DROP, FILLS


class Objective(NamedTuple):
    """What training reads, in the words of :class:`~xattn.eval.metrics.base.Reads`."""

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
"""By the name that results keep of a head, see :func:`objective_of`."""
MARK = "†"
"""What tables put beside a value in such a metric."""
LEGEND = "close to this head's training: the same score, and the same fill or masks"

_POLICIES = {"normalized": "mask-mean", "feature": "mask-features"}
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
    >>> shared("mask", black)
    Shared(score=True, masks=False, fill=True)
    >>> shared("mask", black, {"fill": "noise"}).close
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
