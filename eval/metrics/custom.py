"""A decorator that registers your own metric: a class, or a plain function of an image and its map.

@register_metric("in_middle", MetricInfo("share of the map in the middle", higher_is_better=True))
def in_middle(image, map):
    h, w = map.shape
    return map[h // 4 : -h // 4, w // 4 : -w // 4].sum() / map.sum()
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from xattn.eval.metrics.base import (
    Finish,
    MetricGroup,
    MetricInfo,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.mean_metric import MeanMetric
from xattn.eval.metrics.registry import register

Metric = TypeVar("Metric", bound=Callable[..., Any])

GIVEN: dict[str, Callable[[Sample], Any]] = {
    "image": lambda sample: sample.image,
    "map": lambda sample: sample.grey[0],
    "raw": lambda sample: sample.raw[0],
    "target": lambda sample: sample.target,
    "score": lambda sample: sample.score,
    "seed": lambda sample: sample.seed,
}
"""The names that a function's parameters may have, and what is passed for each; see
:func:`register_metric`."""


def register_metric(
    name: str,
    info: MetricInfo | Mapping[str, MetricInfo] | None = None,
    *,
    classes: Sequence[type[MeanMetric]] = (),
    cases: Sequence[Mapping[str, Any]] = ({},),
    words: Mapping[str, tuple[str, str]] | None = None,
) -> Callable[[Metric], Metric]:
    """Decorator that registers a :class:`~xattn.eval.metrics.PerturbationMetric` or a function as the
    metric group ``name``.

    A function must return a number. Its parameters are filled in by name: ``image`` (3, H, W) in [0, 1],
    ``map`` (H, W) min-max scaled to [0, 1], ``raw`` (H, W) with the values that the explainer returned,
    ``target`` (the explained class), ``score`` (the score of the clean image) and ``seed``.

    Args:
        name: the group's name in ``--metrics``. For a single metric, it is also the name of the column.
        info: the info of a single metric, or a dict of infos keyed by metric name; by default the metric's
            own ``info``.
        classes: torchmetrics classes that belong to the group.
        cases: sets of options with which every group is tested; the first one is fast.
        words: a dict, keyed by metric name, of a title and a sentence that the viewer shows.

    Raises:
        ValueError: if the name is taken, or a parameter of a function has an unknown name.

    Example:
        >>> from xattn.eval import MetricInfo, create_metric, register_metric
        >>> @register_metric("map_brightness", MetricInfo("map x image", higher_is_better=True))
        ... def brightness(image, map):
        ...     return float((image.mean(0) * map).mean())
        >>> create_metric("map_brightness").info["map_brightness"].higher_is_better
        True
    """

    def add(metric: Metric) -> Metric:
        is_class = isinstance(metric, type) and issubclass(metric, PerturbationMetric)
        given: Any = {name: info} if isinstance(info, MetricInfo) else info
        if not given and is_class:
            given = metric.info  # type: ignore[attr-defined]
        metrics = dict(given) if isinstance(given, Mapping) else {}
        if not metrics or not all(isinstance(one, MetricInfo) for one in metrics.values()):
            raise ValueError(
                f"info: got {info!r} for {name!r}; give MetricInfo(formula, higher_is_better), or a dict "
                "with one per metric"
            )
        if is_class:
            cls: Any = metric
            cls.info = metrics
        else:
            cls = _function_metric(name, metric, metrics)
        register(MetricGroup(name, cls, metrics, tuple(classes), tuple(cases), words or {}))
        return metric

    return add


@dataclass(frozen=True)
class FunctionMetric(PerturbationMetric):
    """Base class of the metrics that :func:`register_metric` creates from functions."""

    function: ClassVar[Callable[..., Any]]

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        yield from ()
        asked = inspect.signature(type(self).function).parameters
        value = float(type(self).function(**{p: GIVEN[p](sample) for p in asked if p in GIVEN}))
        return lambda scores: {self.columns[0]: value}


def _function_metric(
    name: str, function: Any, metrics: Mapping[str, MetricInfo]
) -> type[PerturbationMetric]:
    if not callable(function) or isinstance(function, type):
        raise ValueError(
            f"metric: got {function!r}; decorate a function, or a subclass of PerturbationMetric"
        )
    if set(metrics) != {name}:
        raise ValueError(
            f"info: got {', '.join(metrics)}; a function measures one metric, {name!r}"
        )
    parameters = inspect.signature(function).parameters.values()
    unknown = [p.name for p in parameters if p.name not in GIVEN and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"metric: {name} has the parameters {', '.join(unknown)}; a function may only have "
            f"{', '.join(GIVEN)}"
        )
    about = {
        "function": staticmethod(function),
        "info": dict(metrics),
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__doc__": function.__doc__,
    }
    return dataclass(frozen=True)(type(function.__name__, (FunctionMetric,), about))
