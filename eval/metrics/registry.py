"""Every group of metrics, and the tables by name that are made of what their files declare.

A new metric is a file that ends with its :class:`~xattn.eval.metrics.base.MetricGroup`, and a line in
:data:`FILES`. A group of your own is added by :func:`register`.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from xattn.eval.metrics.base import MaskingChoices, MeanMetric, MetricGroup, MetricInfo, Probe

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
)
"""The files of metrics, in the order of the tables."""
GROUPS: dict[str, MetricGroup] = {}
PROBES: dict[str, type[Probe]] = {}
"""The probe of each group."""
METRICS: dict[str, MetricInfo] = {}
"""Every metric by its name in a table."""
CLASSES: dict[str, type[MeanMetric]] = {}
"""torchmetrics classes."""


def register(group: MetricGroup) -> None:
    """Add a group to all tables.

    Raises:
        ValueError: the group, or one of its metrics or classes, has the name of another.
    """
    classes = {cls.__name__: cls for cls in group.classes}
    taken = [
        *({group.name} & GROUPS.keys()),
        *(group.metrics.keys() & METRICS.keys()),
        *(classes.keys() & CLASSES.keys()),
    ]
    if taken:
        raise ValueError(f"group: {', '.join(sorted(taken))} is taken; choose another name")
    GROUPS[group.name], PROBES[group.name] = group, group.probe
    METRICS.update(group.metrics)
    CLASSES.update(classes)


for _file in FILES:
    register(importlib.import_module(f"xattn.eval.metrics.{_file}").GROUP)


def direct_groups() -> list[str]:
    """The groups that neither explain again nor need annotations: ``--metrics direct``."""
    return [name for name, group in GROUPS.items() if group.direct]


def groups_without_annotations() -> list[str]:
    """The groups that need no annotations: ``--metrics all``."""
    return [name for name, probe in PROBES.items() if not probe.needs_annotation]


def groups_with_annotations() -> list[str]:
    """The groups that come with ``--annotations``."""
    return [name for name, probe in PROBES.items() if probe.needs_annotation]


def group_name(probe: Probe) -> str:
    """The name of a probe's group, or of its class where it has none."""
    return next((n for n, cls in PROBES.items() if cls is type(probe)), type(probe).__name__)


def create_probe(
    name: str,
    protocol: MaskingChoices | None = None,
    mean: tuple[float, ...] | None = None,
    **options: Any,
) -> Probe:
    """A group of metrics by name.

    Args:
        protocol: where ``masking`` takes its levels, threshold and masked value from.
        mean: (3,) the data set's mean colour in [0, 1], for masked values and fills that use it.
        options: fields of the probe.

    Raises:
        ValueError: an unknown name (with near matches) or option.
    """
    if name not in PROBES:
        near = difflib.get_close_matches(name, PROBES, 3, 0.4) or list(PROBES)
        raise ValueError(f"metrics: unknown group {name!r}; did you mean {', '.join(near)}?")
    cls = PROBES[name]
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    if "mean" in known:
        options.setdefault("mean", mean)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"metrics: {name} takes no {', '.join(unknown)}; it has {', '.join(known)}"
        )
    if protocol is not None:
        options = {**cls.protocol_options(protocol), **options}
    return cls(**options)
