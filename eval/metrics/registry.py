"""Every group of metrics, and the tables by name that are made of what their files declare.

A new metric is a file that ends with its :class:`~xattn.eval.metrics.base.MetricGroup`, and a line in
:data:`FILES`. A group of your own is added by :func:`register`, or by an entry point of the group
``xattn.metrics`` that names a module which registers it, or the :class:`MetricGroup` itself. The tables
grow with every group.
"""

from __future__ import annotations

import importlib
from typing import Any

from xattn.eval.metrics.base import MaskingChoices, MetricGroup, MetricInfo, PerturbationMetric
from xattn.eval.metrics.mean_metric import MeanMetric
from xattn.registry import Registry, Table, same_class
from xattn.runtime.names import same_name

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
    "board.mosaic_contrast",
    "board.network_contrast",
    "board.gridpg",
    "board.thinned",
    "board.saco",
    "board.eraser",
    "board.information_curves",
    "board.blind",
    "board.emprt",
    "board.sensitivity_n",
    "board.mufidelity",
)
"""The files of metrics, in the order of the tables."""
BOARD = (
    *("squares", "subsets", "monotonicity", "single-deletion", "photo-gain"),
    *("class-contrast", "network-contrast", "gridpg", "road", "thinned", "blind"),
)
"""The groups of a board: ``--metrics board``."""


def register(group: MetricGroup) -> None:
    """Add a group to all tables.

    Raises:
        ValueError: the group, or one of its metrics or classes, has the name of another.
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
    """Of a metric's name, the group that measures it."""
    column = same_name(name, METRICS)
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
"""What each file declares."""
METRICS: Table[MetricInfo] = REGISTRY.table(lambda group: group.metrics)
"""Every metric by its name in a table."""
WORDS: Table[tuple[str, str]] = REGISTRY.table(lambda group: group.words)
"""Title and sentence of metrics."""
CLASSES: Table[type[MeanMetric]] = REGISTRY.table(_classes)
"""torchmetrics classes."""

for _file in FILES:
    register(importlib.import_module(f"xattn.eval.metrics.{_file}").GROUP)


def direct_groups() -> list[str]:
    """The groups that neither explain again nor need annotations or their name: ``--metrics direct``."""
    return [name for name, group in GROUPS.items() if group.direct]


def groups_without_annotations() -> list[str]:
    """The groups that need neither annotations nor their name: ``--metrics all``."""
    return [
        name
        for name, group in GROUPS.items()
        if not (group.by_name or group.metric.needs_annotation)
    ]


def groups_with_annotations() -> list[str]:
    """The groups that come with ``--annotations``."""
    return [name for name, group in GROUPS.items() if group.metric.needs_annotation]


def group_name(metric: PerturbationMetric) -> str:
    """The name of a metric's group, or of its class where it has none."""
    groups = (name for name, group in GROUPS.items() if group.metric is type(metric))
    return next(groups, type(metric).__name__)


def own_infos(metric: PerturbationMetric) -> dict[str, MetricInfo]:
    """What the columns of a metric from outside the package are, registered or not; none of xattn's own.

    Raises:
        ValueError: it has no columns, says nothing of one, or something else of a registered one.
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
                f"metrics: {type(metric).__name__} says nothing of its column {name!r}; give it info = "
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
    """A group of metrics by name.

    Args:
        protocol: where ``masking`` takes its levels, threshold and masked value from.
        mean: (3,) the data set's mean colour in [0, 1], for masked values and fills that use it.
        options: fields of the metric.

    Raises:
        ValueError: an unknown name (with near matches) or option.
    """
    cls = REGISTRY.get(name)
    if "mean" in (REGISTRY.options(name) or ()):
        options.setdefault("mean", mean)
    REGISTRY.check_options(name, options)
    if protocol is not None:
        options = {**cls.protocol_options(protocol), **options}
    return cls(**options)
