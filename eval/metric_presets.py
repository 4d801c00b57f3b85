"""Named presets of published and widely used metric definitions, so that results can be compared.

A preset consists of a :class:`~xattn.eval.Protocol` and its metrics:

    protocol, metrics = preset("rise", mean=backbone.preprocessing.mean)
    evaluate(backbone, explainers, images, protocol=protocol, metrics=metrics)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.metrics.registry import create_metric
from xattn.eval.protocol import Protocol
from xattn.runtime.names import did_you_mean


class Preset(NamedTuple):
    """Fields of the protocol, and a metric group with its options.

    With ``with_mean``, masked pixels become 0 after normalisation, that is, they get the mean colour."""

    protocol: Mapping[str, Any]
    group: str
    options: Mapping[str, Any]
    with_mean: bool = False


_WHOLE = {"levels": (1.0,), "ic_margin": 0.0}  # the grey map without a threshold
_RESIZED = {"normalization": "minmax_upsampled"}
PRESETS = {
    # Grey maps that keep 100, 50 or 15 % of the pixels, on black; IC without a margin.
    "ttame": Preset({"ic_margin": 0.0}, "masking", {"metrics": ("AD", "IC")}),
    # Signed ADD, on the complement of the mask.
    "lift-cam": Preset({**_WHOLE, **_RESIZED}, "masking", {"metrics": ("AD", "IC", "ADD")}),
    # AG in addition to AD and IC.
    "opti-cam": Preset({**_WHOLE, **_RESIZED}, "masking", {"metrics": ("AD", "IC", "AG")}),
    # 224 pixels per step. Deletion sets normalised pixels to 0; insertion starts from the blurred
    # normalised image, which is padded with zeros for the blur.
    "rise": Preset(
        _RESIZED,
        "insertion-deletion",
        {"step": 224, "deletion_fill": "mean", "insertion_fill": "rise"},
        True,
    ),
    # Noisy linear imputation with sigma 0.01, after removing 10, 20, 30, 40, 50, 70 and 90 % of the pixels.
    # The value is the mean probability of the class, which the authors' code prints next to the accuracy
    # that the paper reports.
    "road": Preset({}, "road", {}),
    # What torch-cam computes without ``logits_fn``: AD and IC of logits.
    "torch-cam": Preset(
        {**_WHOLE, "score": "logit", "masked_value": "mean"},
        "masking",
        {"metrics": ("AD", "IC"), "bounded": False},
        True,
    ),
    # pytorch-grad-cam does not divide the drop by p. It scales its maps to [0, 1] both before and after
    # resizing, which is the same as scaling them once, after resizing.
    "grad-cam-lib": Preset(
        {**_WHOLE, **_RESIZED, "masked_value": "mean"}, "masking", {"metrics": ("drop", "IC")}, True
    ),
}


def preset(
    name: str, mean: Sequence[float] | None = None
) -> tuple[Protocol, list[PerturbationMetric]]:
    """The protocol and the metrics of a preset; ``mean`` (3,) is the data set's mean colour in [0, 1].

    Raises:
        ValueError: the name is unknown (the message lists near matches), or the preset needs ``mean``.

    Example:
        >>> from xattn.eval import preset
        >>> protocol, metrics = preset("ttame")
        >>> protocol.levels
        (1.0, 0.5, 0.15)
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    fields, group, options, with_mean = PRESETS[name]
    if with_mean and mean is None:
        raise ValueError(
            f"mean: got None, but preset {name!r} fills masked pixels with the mean colour; "
            f"give mean=backbone.preprocessing.mean"
        )
    colour = tuple(float(v) for v in mean) if with_mean and mean is not None else None
    protocol = Protocol(**fields)
    return protocol, [create_metric(group, protocol, colour, **options)]
