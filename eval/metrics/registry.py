"""The registry of metric groups, with tables built from the groups that the metrics' files declare.

To add a metric, write a file that ends with its :class:`~xattn.eval.metrics.base.MetricGroup` and add a
line to :data:`FILES`. To add a group from your own package, call :func:`register`, or declare an entry
point in the group ``xattn.metrics`` that names the :class:`MetricGroup` or a module that registers it.
Every registered group appears in all tables.
"""

from __future__ import annotations

import importlib
from typing import Any

from xattn.eval.metrics.base import MaskingChoices, MetricGroup, MetricInfo, PerturbationMetric
from xattn.eval.metrics.mean_metric import MeanMetric
from xattn.registry import Registry, Table, same_class
from xattn.runtime.names import matching_name

FILES = (
    "masking",
    "curves",
    "road",
    "flipping",
    "irof",
    "infidelity",
    "monotonicity",
    "complexity",
    "localization",
    "adcc",
    "sensitivity",
    "randomization",
    "board.squares",
    "board.subsets",
    "board.single_deletion",
    "board.photo_gain",
    "board.class_contrast",
    "board.mosaics.mosaic_contrast",
    "board.network_contrast",
    "board.gridpg",
    "board.mosaics.disconnected",
    "board.thinned",
    "board.saco",
    "board.eraser",
    "board.information_curves",
    "board.blind",
    "board.emprt",
    "board.sensitivity_n",
    "board.mufidelity",
)
"""The files of the metrics, in the order in which tables show them."""
BOARD = (
    *("squares", "subsets", "monotonicity", "single-deletion", "photo-gain"),
    *("class-contrast", "network-contrast", "gridpg", "road", "thinned", "blind"),
)
"""The groups that a board measures (``--metrics board``)."""


def register(group: MetricGroup) -> None:
    """Add a group to all tables.

    Raises:
        ValueError: if the name of the group, or of one of its metrics or classes, is already taken.
    """
    taken: set[str] = set()
    for _, other in REGISTRY.registered().values():
        again = other.name == group.name and same_class(other.metric, group.metric)
        if not again:
            taken |= {group.name} & {other.name}
            taken |= group.metrics.keys() & other.metrics.keys()
            taken |= _classes(group).keys() & _classes(other).keys()
    if taken:
        raise ValueError(f"group: {', '.join(sorted(taken))} is taken; choose another name")
    REGISTRY.add(group.metric, group)


def _classes(group: MetricGroup) -> dict[str, type[MeanMetric]]:
    return {cls.__name__: cls for cls in group.classes}


def _adopt(name: str, value: Any) -> None:
    if not isinstance(value, MetricGroup):
        raise ValueError(f"{value!r} is neither a module nor a MetricGroup")
    register(value)


def _hint(name: str) -> str:
    """Return a hint that names the group of the metric ``name``, or "" if there is no such metric."""
    column = matching_name(name, METRICS)
    groups = [group.name for group in GROUPS.values() if column in group.metrics]
    return f"{column} is a column of the group {groups[0]}: give {groups[0]}" if groups else ""


REGISTRY: Registry[PerturbationMetric, MetricGroup] = Registry(
    "xattn.metrics",
    argument="metrics",
    noun="group",
    adopt=_adopt,
    ordered=True,
    hint=_hint,
)
GROUPS: Table[MetricGroup] = REGISTRY.table(lambda group: {group.name: group})
"""Every group, keyed by name."""
METRICS: Table[MetricInfo] = REGISTRY.table(lambda group: group.metrics)
"""Every metric, keyed by its name in tables."""
WORDS: Table[tuple[str, str]] = REGISTRY.table(lambda group: group.words)
"""The title and description of each metric."""
CLASSES: Table[type[MeanMetric]] = REGISTRY.table(_classes)
"""The torchmetrics classes, keyed by name."""

for _file in FILES:
    register(importlib.import_module(f"xattn.eval.metrics.{_file}").GROUP)


def direct_groups() -> list[str]:
    """Return the groups of ``--metrics direct``: all that need no annotations and compute no further
    explanations, except those that are measured only if they are named."""
    return [name for name, group in GROUPS.items() if group.direct]


def groups_without_annotations() -> list[str]:
    """Return the groups of ``--metrics all``: all that need no annotations, except those that are measured
    only if they are named."""
    return [
        name
        for name, group in GROUPS.items()
        if not (group.by_name or group.metric.needs_annotation)
    ]


def groups_with_annotations() -> list[str]:
    """Return the groups that ``--annotations`` adds."""
    return [name for name, group in GROUPS.items() if group.metric.needs_annotation]


def group_name(metric: PerturbationMetric) -> str:
    """Return the name of a metric's group, or of its class if it has no group."""
    groups = (name for name, group in GROUPS.items() if group.metric is type(metric))
    return next(groups, type(metric).__name__)


def own_infos(metric: PerturbationMetric) -> dict[str, MetricInfo]:
    """Return the infos for the columns of a metric from outside the package; empty for xattn's own metrics.

    Raises:
        ValueError: if the metric has no columns, a column has no info, or its info differs from the info
            registered under that name.
    """
    if not metric.columns:
        raise ValueError(
            f"metrics: {type(metric).__name__} has no columns; give it info = {{name: MetricInfo(...)}}"
        )
    found = {}
    for name in dict.fromkeys(column.metric for column in metric.columns):
        info, known = metric.info.get(name), METRICS.get(name)
        if info is None and known is None:
            raise ValueError(
                f"metrics: {type(metric).__name__} does not describe its column {name!r}; give it info = "
                f"{{{name!r}: MetricInfo(formula, higher_is_better)}}"
            )
        if info is not None and known is not None and info != known:
            raise ValueError(f"metrics: {name} is another metric's name; choose a new one")
        if known is None or not type(metric).__module__.startswith("xattn."):
            found[name] = info or METRICS[name]
    return found


def create_metric(
    name: str,
    protocol: MaskingChoices | None = None,
    mean: tuple[float, ...] | None = None,
    **options: Any,
) -> PerturbationMetric:
    """Create a group of metrics from its name.

    Args:
        protocol: the protocol from which ``masking`` takes its levels, threshold and masked value.
        mean: (3,) the data set's mean colour in [0, 1], for masked values and fills that use it.
        options: fields of the metric.

    Raises:
        ValueError: if the name (similar names are listed) or an option is unknown.

    Example:
        >>> from xattn.eval import create_metric
        >>> create_metric("masking", levels=(0.5,)).levels
        (0.5,)
    """
    cls = REGISTRY.get(name)
    if "mean" in (REGISTRY.options(name) or ()):
        options.setdefault("mean", mean)
    REGISTRY.check_options(name, options)
    if protocol is not None:
        options = {**cls.protocol_options(protocol), **options}
    return cls(**options)
