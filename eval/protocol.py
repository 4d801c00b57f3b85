"""The protocol with which a fidelity value was measured, identified by a short, stable id.

Two values may be compared only if their ids are equal. The id consists of a readable prefix and a hash of
the fields that change a value's meaning. The numbers of images and of invalid maps (``n``, ``n_invalid``)
and the ``seed`` of resampling and random rows are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from xattn.backbone.scored import Scored
from xattn.eval.fills import KINDS
from xattn.eval.interfaces import Classifier
from xattn.eval.metrics.registry import METRICS

# The score that p, q and d stand for, for each task of a backbone.
SCORES = {
    "multiclass": "probability",
    "multilabel": "sigmoid",
    "binary": "binary",
    "regression": "value",
}

_CHOICES = {
    "score": (*SCORES.values(), "logit"),
    "class_policy": ("predicted", "given"),
    "normalization": ("minmax", "minmax_upsampled"),
    "threshold": ("quantile", "kth"),
    "masked_value": KINDS,
    "resize": ("bilinear", "nearest"),
    "invalid": ("excluded", "chance"),
    "view": ("crop", "whole", "tensor"),
    "precision": ("float32", "bfloat16"),
}
_NOT_SEMANTIC = ("seed", "n", "n_invalid")
_MASKING = ("levels", "threshold", "masked_value", "ic_margin")  # only for AD, IC, ADD and AG


@dataclass(frozen=True)
class Protocol:
    """Every choice that a fidelity value depends on.

    Attributes:
        score: the score that p, q and d stand for, in float64. It depends on the backbone's task:
            ``"probability"`` (softmax over the classes), ``"sigmoid"`` (multi-label: sigmoid of the label's
            logit), ``"binary"`` (a single logit z: sigmoid(z) for "positive", sigmoid(-z) for "negative")
            or ``"value"`` (regression: the number itself). ``"logit"`` can be chosen for every task.
        class_policy: which class is explained: ``"predicted"`` (the top class of the clean image, which is
            also scored on all masked images) or ``"given"``.
        normalization: ``"minmax"`` scales a map to [0, 1] before it is resized, and
            ``"minmax_upsampled"`` afterwards.
        threshold: ``"quantile"`` keeps values >= the linearly interpolated (1 - level) quantile,
            ties included; ``"kth"`` keeps exactly ceil(level * HW) pixels (TAME, L-CAM).
        levels: retained fractions in (0, 1]; pixels that are kept keep their grey level.
        masked_value: what replaces masked pixels: ``"black"`` (0 before normalisation), the data
            set's ``"mean"`` colour, the blurred image (``"blur"``, or ``"rise"`` for RISE's blur),
            ``"noise"``, or an imputation by ``"inpaint"`` (Telea) or ``"road"``
            (:mod:`xattn.eval.fills.imputation`).
        ic_margin: IC counts an image if q > p + ic_margin * max(p, q), so that a rounding error is not
            counted as an increase.
        resize: how a map is resized to the image (align_corners=False).
        invalid: how constant or non-finite maps are treated. ``"excluded"`` leaves them out of the means
            and counts them. ``"chance"`` gives them the chance value of each metric that has one
            (``MetricInfo.chance``), so that no method benefits from failing to return a map.
        view: ``"crop"`` (the model's own evaluation crop), ``"whole"``, or ``"tensor"`` (prepared
            by the caller).
        precision: the precision of forward passes: ``"float32"``, or ``"bfloat16"`` autocast.
        target: a name and a hash of what was explained, if it was not a class, see
            :mod:`xattn.backbone.targets`. For such a target, ``score`` names the number that took the place
            of the probability.
        seed, n, n_invalid: facts about a single run, which are not part of the id.

    Example:
        >>> from xattn.eval import Protocol
        >>> Protocol(levels=(1.0, 0.5)).masked_value
        'black'
    """

    score: str = "probability"
    class_policy: str = "predicted"
    normalization: str = "minmax"
    threshold: str = "quantile"
    levels: tuple[float, ...] = (1.0, 0.5, 0.15)
    masked_value: str = "black"
    ic_margin: float = 1e-6
    resize: str = "bilinear"
    invalid: str = "excluded"
    view: str = "crop"
    precision: str = "float32"
    target: str = ""
    seed: int = 0
    n: int | None = None
    n_invalid: int | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; choose one of {', '.join(choices)}"
                )
        levels = tuple(float(level) for level in self.levels)
        if not levels or len(set(levels)) < len(levels) or not all(0 < v <= 1 for v in levels):
            raise ValueError(
                f"levels: got {self.levels}; give different retained fractions in (0, 1], "
                f"such as (1.0, 0.5, 0.15)"
            )
        object.__setattr__(self, "levels", levels)
        if not 0 <= self.ic_margin < 1:
            raise ValueError(f"ic_margin: got {self.ic_margin}; give a fraction in [0, 1)")

    @property
    def id(self) -> str:
        """The protocol's id, such as ``"prob-pred-black-1f2e3d4c"``."""
        return f"{self._prefix}-{_hash(self._semantics())}"

    def metric_id(
        self,
        metric: str,
        level: float | None,
        options: Mapping[str, Any] | None = None,
        formula: str | None = None,
    ) -> str:
        """The id of one column, such as ``"AD@15-prob-pred-black-1f2e3d4c"``.

        It depends on the metric's formula and on ``options``, which are all other choices that change the
        value. Without ``options``, the metric is taken to be a masking metric with this protocol's masking
        at ``level``. For a metric that is not registered, ``formula`` is required.
        """
        if formula is None and metric not in METRICS:
            raise ValueError(f"metric: got {metric!r}; choose one of {', '.join(METRICS)}")
        meaning = self._semantics()
        if options is None:
            options = {name: meaning[name] for name in _MASKING} | {"levels": [float(level or 1)]}
        meaning = {k: v for k, v in meaning.items() if k not in _MASKING}
        meaning.update(options, formula=formula or METRICS[metric].formula)
        if level is None:
            return f"{metric}-{self.score[:4]}-{self.class_policy[:4]}-{_hash(meaning)}"
        return f"{metric}@{100 * level:g}-{self._prefix}-{_hash(meaning)}"

    @property
    def explained(self) -> str:
        """A description of what the scores are computed for: the target, or the explained class."""
        return f"the target {self.target!r}" if self.target else f"the {self.class_policy} class"

    @property
    def _prefix(self) -> str:
        return f"{self.score[:4]}-{self.class_policy[:4]}-{self.masked_value}"

    def _semantics(self) -> dict[str, Any]:
        hidden = {*_NOT_SEMANTIC, "id"}
        if self.precision == "float32":  # so that ids made before this field existed stay valid
            hidden.add("precision")
        return {k: v for k, v in self.to_dict().items() if k not in hidden}

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON, without ``target`` if it is empty; see :meth:`from_dict`."""
        values = {**asdict(self), "levels": list(self.levels)}
        return {k: v for k, v in values.items() if k != "target" or v}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Protocol:
        """Create a protocol from the output of :meth:`to_dict`.

        Raises:
            ValueError: a field is unknown or invalid, or an ``"id"`` does not match the fields.
        """
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known - {"id"}
        if unknown:
            raise ValueError(
                f"protocol: got unknown fields {sorted(unknown)}; evaluate again with this version"
            )
        protocol = cls(**{k: v for k, v in data.items() if k in known})
        if data.get("id", protocol.id) != protocol.id:
            raise ValueError(
                f"protocol: the stored id {data['id']} does not match its fields ({protocol.id}); "
                f"evaluate again"
            )
        return protocol


def score_of(backbone: Classifier) -> str:
    """The ``score`` of a :class:`Protocol` for a backbone, which depends on the backbone's target or, if
    there is none, on its task."""
    return backbone.score if isinstance(backbone, Scored) else SCORES[backbone.task]


def _hash(meaning: Mapping[str, Any]) -> str:
    text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
