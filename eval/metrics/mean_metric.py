"""Metrics as torchmetrics classes. They are updated with scores or, if they have the network, with images
and maps.

    metric = AverageDrop()                    metric = AverageDrop(backbone)
    metric.update(p, q)                       metric.update(images, maps, target)

Both average the same per-image values. With a backbone these are the values of :func:`xattn.eval.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from xattn.eval import functional
from xattn.eval.metrics.base import Column, MetricGroup, PerturbationMetric
from xattn.eval.metrics.measure import measure
from xattn.photos.arrays import input_batch


class MeanMetric(Metric):
    """A mean of per-image values.

    The states are sums (float64 total, n, n_invalid), so memory use is constant and the states of
    several processes can be added up. The backbone is not part of the state: it is neither moved nor
    saved with the metric, but it is pickled with it.

    Args:
        backbone: a :class:`~xattn.Backbone`, or a function (b, 3, H, W) -> logits. With a backbone,
            ``update`` takes images (B, 3, H, W) in [0, 1], raw maps (B, 1, h, w) or (B, h, w), and the
            explained class: one for all images, or a LongTensor (B,). Without a backbone, ``update`` takes
            scores, as described in the docstring of each class.
        measured_by: the metric that computes the values; by default that of the group, with default
            options.
        explainer: an explainer, or a function (images, target) -> maps, for metrics that need further
            explanations.
        randomized: a function (stage, images, target) -> maps on randomised networks, for metrics that need
            them, see :class:`xattn.eval.sanity.Cascade`.
        is_mask: whether maps are masks in [0, 1], which are used without min-max scaling.
        kwargs: arguments of ``torchmetrics.Metric``.

    Class attributes: ``metric`` names one of the columns that the metric group reports; ``values`` is the
    function that computes per-image values from the arguments of ``update``; ``group`` is set by
    :class:`~xattn.eval.metrics.MetricGroup`.

    Raises:
        ValueError: if the metric needs annotations, or needs an explainer or randomised networks that are
            not given.
    """

    is_differentiable = False
    full_state_update = False
    metric: ClassVar[str] = ""
    group: ClassVar[MetricGroup | None] = None
    values: ClassVar[Callable[..., Tensor]]
    total: Tensor
    n: Tensor
    n_invalid: Tensor

    def __init__(
        self,
        backbone: Any = None,
        *,
        measured_by: PerturbationMetric | None = None,
        explainer: Any = None,
        randomized: Callable[[int | str, Tensor, Tensor], Tensor] | None = None,
        is_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "total", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum"
        )
        self.add_state("n", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state(
            "n_invalid", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum"
        )
        self._network = (backbone,)  # a tuple, because a submodule would be moved and saved
        self._explain = (getattr(explainer, "attribute", explainer),)
        self._randomized, self._is_mask = randomized, is_mask
        if backbone is not None:
            self._check_backbone(backbone)
            self._measured_by = measured_by or self._default_metric()
            self._check_needs()
        # From this signature, a MetricCollection knows which arguments to pass to this metric.
        self._update_signature = self._of_scores() if backbone is None else signature(self._measure)

    def _of_scores(self) -> Signature:
        """Return the signature of ``update`` without a backbone: scores or maps, then ``valid``."""
        own = type(self)._values is not MeanMetric._values
        given = signature(self._values if own else type(self).values).parameters.values()
        scores = [p for p in given if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
        valid = Parameter("valid", Parameter.POSITIONAL_OR_KEYWORD, default=None)
        return Signature([*scores, valid])

    def _check_backbone(self, backbone: Any) -> None:
        if self.group is None:
            raise ValueError(
                f"backbone: {type(self).__name__} belongs to no MetricGroup, so it cannot measure "
                "by itself; create it without a backbone, and pass scores to update(...)"
            )
        if not callable(getattr(backbone, "logits", backbone)):
            raise ValueError(
                f"backbone: got a {type(backbone).__name__}; give a Backbone, or a function of images "
                f"(b, 3, H, W) that returns logits"
            )

    def _default_metric(self) -> PerturbationMetric:
        """Return the group's metric with its default options."""
        assert self.group is not None
        return self.group.metric(**self._colour(self.group.metric))

    def _colour(self, metric: type[PerturbationMetric]) -> dict[str, Any]:
        """Return the data set's mean colour as an option, if the metric has such an option."""
        preprocessing = getattr(self._network[0], "preprocessing", None)
        taken = is_dataclass(metric) and any(f.name == "mean" for f in fields(metric))
        return {"mean": tuple(preprocessing.mean)} if preprocessing and taken else {}

    def _check_needs(self) -> None:
        name, metric = type(self).__name__, self._measured_by
        if metric.needs_annotation:
            raise ValueError(
                f"backbone: {name} needs only maps and objects; create it without a backbone, and call "
                "update(maps, masks)"
            )
        if metric.explains_randomized and self._randomized is None:
            raise ValueError(
                f"randomized: {name} needs maps of randomised networks; give "
                f"randomized=Cascade(backbone).method('gradcam'), with the name of your explainer"
            )
        if metric.explains_again and not metric.explains_randomized and self._explain[0] is None:
            raise ValueError(
                f"explainer: {name} explains again; give {name}(backbone, explainer=explainer)"
            )

    @property
    def _column(self) -> Column:
        columns = [
            c for c in self._measured_by.columns if not self.metric or c.metric == self.metric
        ]
        if not columns:
            found = ", ".join(c.key for c in self._measured_by.columns)
            raise ValueError(
                f"measured_by: it measures {found}, not {self.metric}; give a different metric"
            )
        return columns[0]

    def update(self, *given: Any, **named: Any) -> None:
        """Add images, maps and the explained class. Without a backbone, add scores or maps as described in
        the docstring of the class, and ``valid`` (B,) bool or None."""
        if self._network[0] is None:
            bound = self._update_signature.bind(*given, **named)
            valid = bound.arguments.pop("valid", None)
            self._add(self._values(**bound.arguments), valid)
        elif len(given) + len(named) == 3:
            self._measure(*given, **named)
        else:
            raise ValueError(
                f"images, maps, target: got {len(given) + len(named)} arguments; "
                f"{type(self).__name__}(backbone) takes update(images, maps, target)"
            )

    def _values(self, *given: Any, **named: Any) -> Tensor:
        """Compute per-image values (B,)."""
        return type(self).values(*given, **named)

    def _measure(self, images: Any, maps: Tensor, target: Tensor | int) -> None:
        backbone = self._network[0]
        mean = getattr(backbone, "mean", None)
        channels = mean.shape[1] if isinstance(mean, Tensor) and mean.ndim == 4 else 3
        images = input_batch(images, channels, "images")
        maps = maps[:, None] if maps.ndim == 3 else maps
        if maps.ndim != 4 or maps.shape[1] != 1 or len(maps) != len(images):
            raise ValueError(
                f"maps: got shape {tuple(maps.shape)} for {len(images)} images; give (B, 1, h, w)"
            )
        values = measure(
            self._measured_by,
            backbone,
            images,
            maps,
            target,
            first=int(self.n + self.n_invalid),
            is_mask=self._is_mask,
            explain=self._explain[0],
            explain_randomized=self._randomized,
        )
        self._add(values[self._column].to(self.total.device))

    def _add(self, values: Tensor, valid: Tensor | None = None) -> None:
        """Add per-image values (B,). A value is invalid if it is NaN, or if ``valid`` (B,) bool is
        False."""
        total, n, n_invalid = functional.mean_update(values, valid)
        self.total += total
        self.n += n
        self.n_invalid += n_invalid

    def compute(self) -> Tensor:
        """Return the mean over valid images, float64; NaN if there are none."""
        return functional.mean_compute(self.total, self.n)
