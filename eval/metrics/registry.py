"""Groups of metrics by name; their files load on first use."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from xattn.eval.metrics.base import Probe
from xattn.eval.protocol import Protocol

PROBES: dict[str, tuple[str, str]] = {
    "masking": ("masking", "MaskingProbe"),
    "insertion-deletion": ("curves", "InsertionDeletionProbe"),
    "road": ("road", "RoadProbe"),
    "pixel-flipping": ("flipping", "PixelFlippingProbe"),
    "irof": ("irof", "IrofProbe"),
    "infidelity": ("infidelity", "InfidelityProbe"),
    "monotonicity": ("monotonicity", "MonotonicityProbe"),
    "complexity": ("complexity", "ComplexityProbe"),
    "localization": ("localization", "LocalizationProbe"),
    "adcc": ("adcc", "AdccProbe"),
    "sensitivity": ("sensitivity", "MaxSensitivityProbe"),
    "randomization": ("randomization", "RandomizationProbe"),
}
# torchmetrics classes, by the file they are in.
CLASSES: dict[str, str] = {
    "AverageDrop": "masking",
    "AverageDropInDeletion": "masking",
    "AverageGain": "masking",
    "IncreaseInConfidence": "masking",
    "Deletion": "curves",
    "Insertion": "curves",
    "RoadMoRF": "road",
    "RoadLeRF": "road",
    "RoadCombined": "road",
    "PixelFlipping": "flipping",
    "IROF": "irof",
    "MonotonicityCorrelation": "monotonicity",
    "Gini": "complexity",
    "Entropy": "complexity",
    "PointingGame": "localization",
    "EnergyPointingGame": "localization",
    "LocalizationIoU": "localization",
    "Coherency": "adcc",
    "Complexity": "adcc",
    "ADCC": "adcc",
    "Infidelity": "infidelity",
    "MaxSensitivity": "sensitivity",
    "RandomizationSpearman": "randomization",
    "RandomizationSSIM": "randomization",
}
DIRECT = tuple(PROBES)[:8]  # those that neither explain again nor need annotations


def create_probe(
    name: str,
    protocol: Protocol | None = None,
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
    module, class_name = PROBES[name]
    cls = getattr(importlib.import_module(f"xattn.eval.metrics.{module}"), class_name)
    known = cls.__dataclass_fields__
    if "mean" in known:
        options.setdefault("mean", mean)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"metrics: {name} takes no {', '.join(unknown)}; it has {', '.join(known)}"
        )
    if name == "masking":
        return cls.of(protocol or Protocol(), **options)  # type: ignore[no-any-return]
    return cls(**options)  # type: ignore[no-any-return]
