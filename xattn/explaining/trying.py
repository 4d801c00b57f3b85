"""Find out which explainers run on a network by trying each on one picture."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from xattn.backbone import Backbone
from xattn.explainers.base import ExplainerEntry, create_explainer, explainer_class
from xattn.explainers.gradients import probe_image


class TryResult(NamedTuple):
    """The first options of an explainer that run on a network, or why none do."""

    runs: bool
    options: dict[str, Any]
    absorbed: float | None
    """For relevance methods, the share of a logit that reaches nothing."""
    reason: str
    """Why the default options do not run."""

    def __str__(self) -> str:
        if not self.runs:
            return self.reason
        given = ", ".join(f"{key}={value}" for key, value in self.options.items())
        lost = "" if self.absorbed is None else f"; {self.absorbed:.1%} of the logit is absorbed"
        return "runs" + (f" with {given}" if given else "") + lost


def try_explainer(entry: ExplainerEntry, backbone: Backbone) -> TryResult:
    """Try an explainer on a picture of noise with its defaults or, if these fail, with options from its
    cases.

    >>> import xattn
    >>> from xattn.explainers.base import EXPLAINERS
    >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=32)
    >>> print(try_explainer(EXPLAINERS.entry("attn_lrp"), net))
    runs with at=pixels; 0.0% of the logit is absorbed
    """
    if explainer_class(entry.name).needs_head:
        return TryResult(False, {}, None, "needs a trained head")
    reasons: list[str] = []
    for options in entry.cases if {} in entry.cases else ({}, *entry.cases):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # losses are part of the result
                explainer = create_explainer(entry.name, backbone, **options)
                if explainer.forwards == 1:  # others run the same passes on many pictures
                    explainer.attribute(probe_image(backbone), 0)
                measured = getattr(explainer, "measured", None)
        except (ValueError, RuntimeError) as error:
            reasons.append(" ".join(str(error).split()))
            continue
        absorbed = None if measured is None else measured.error
        return TryResult(True, dict(options), absorbed, *reasons[:1] or ("",))
    return TryResult(False, {}, None, f"no: {reasons[0]}")
