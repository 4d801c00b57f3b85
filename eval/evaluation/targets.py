"""Evaluating a target that is no class: the backbone's view of it, and the explainers made for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.scored import Scored, View, is_score, scored
from xattn.eval.interfaces import Classifier, check_classes
from xattn.eval.protocol import SCORES
from xattn.explainers import Explainer

Classes = int | str | Sequence[int | str] | None


def score_of(backbone: Classifier) -> str:
    """What p, q and d are, see :class:`~xattn.eval.Protocol`: the target's choice, else the task's."""
    return backbone.score if isinstance(backbone, Scored) else SCORES[backbone.task]


def aimed(
    backbone: Classifier, explainers: Mapping[str, Explainer], classes: Classes, target: Any
) -> tuple[Any, Mapping[str, Explainer], Classes]:
    """Backbone, explainers and classes for ``target``; as they are where there is none.

    Raises:
        ValueError: ``classes`` and ``target`` together, a class of a backbone that has none, or an
            explainer that knows only classes.
    """
    if classes is not None and target is not None:
        raise ValueError("target: got one, and classes as well; give one of them")
    if target is None or not isinstance(backbone, Backbone) or not is_score(backbone, target):
        check_classes(backbone)
        named = target.tolist() if isinstance(target, Tensor) else target
        return backbone, explainers, classes if target is None else named
    view = scored(backbone, target)
    return view, made_for(view, explainers), None


def made_for(view: View, explainers: Mapping[str, Explainer]) -> dict[str, Explainer]:
    """Explainers of ``view``, from explainers of the backbone that it is a view of."""
    return {
        name: e if e.backbone is view else e.with_target(view) for name, e in explainers.items()
    }
