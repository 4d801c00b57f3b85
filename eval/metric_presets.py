"""Published and widespread definitions by name, so that a number can be compared with theirs.

A preset is a :class:`~xattn.eval.Protocol` and the probes that go with it:

    protocol, probes = preset("rise", mean=backbone.preprocessing.mean)
    evaluate(backbone, explainers, images, protocol=protocol, metrics=probes)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xattn.eval.evaluation.engine import evaluate
from xattn.eval.interfaces import Classifier, Explainer
from xattn.eval.metrics.base import PerturbationMetric
from xattn.eval.metrics.registry import create_probe
from xattn.eval.protocol import Protocol
from xattn.runtime.names import did_you_mean

Mean = tuple[float, ...] | None


def preset(
    name: str, mean: Sequence[float] | None = None
) -> tuple[Protocol, list[PerturbationMetric]]:
    """Protocol and probes of a preset; ``mean`` (3,) is the data set's mean colour in [0, 1].

    Raises:
        ValueError: unknown name (with near matches), or a preset that needs ``mean`` without it.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    if mean is None and name in ("rise", "torch-cam", "grad-cam-lib"):
        raise ValueError(
            f"mean: None; preset {name!r} masks normalised images with 0, which is the mean colour: "
            f"give mean=backbone.preprocessing.mean"
        )
    return PRESETS[name](None if mean is None else tuple(float(v) for v in mean))


def _ttame(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """Black behind grey maps at 100, 50 and 15 %, IC strict."""
    protocol = Protocol(ic_margin=0.0)
    return protocol, [create_probe("masking", protocol, metrics=("AD", "IC"))]


def _lift_cam(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """Grey maps at full level only; ADD on the complement, signed."""
    protocol = Protocol(levels=(1.0,), ic_margin=0.0, normalization="minmax_upsampled")
    return protocol, [create_probe("masking", protocol, metrics=("AD", "IC", "ADD"))]


def _opti_cam(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """Grey maps at full level only; AG beside AD and IC."""
    protocol = Protocol(levels=(1.0,), ic_margin=0.0, normalization="minmax_upsampled")
    return protocol, [create_probe("masking", protocol, metrics=("AD", "IC", "AG"))]


def _rise(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """224 pixels a step; deletion to 0 after normalisation, insertion onto the normalised image,
    padded with zeros and blurred."""
    probe = create_probe(
        "insertion-deletion", None, mean, step=224, deletion_fill="mean", insertion_fill="rise"
    )
    return Protocol(normalization="minmax_upsampled"), [probe]


def _road(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """Noisy linear imputation at 10, 20, 30, 40, 50, 70 and 90 %, sigma 0.01; the class's mean
    probability, which the authors' program gives beside the accuracy that the paper reports."""
    return Protocol(), [create_probe("road")]


def _torch_cam(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """What torch-cam computes without ``logits_fn``: AD and IC of logits, mean colour behind."""
    protocol = Protocol(score="logit", levels=(1.0,), masked_value="mean", ic_margin=0.0)
    return protocol, [create_probe("masking", protocol, mean, metrics=("AD", "IC"), bounded=False)]


def _grad_cam_lib(mean: Mean) -> tuple[Protocol, list[PerturbationMetric]]:
    """pytorch-grad-cam's: the drop is not divided by p; mean colour behind. It scales its maps to
    [0, 1] before and after resizing, which is the same as after it."""
    protocol = Protocol(
        levels=(1.0,), masked_value="mean", ic_margin=0.0, normalization="minmax_upsampled"
    )
    return protocol, [create_probe("masking", protocol, mean, metrics=("drop", "IC"))]


PRESETS: dict[str, Callable[[Mean], tuple[Protocol, list[PerturbationMetric]]]] = {
    "ttame": _ttame,
    "lift-cam": _lift_cam,
    "opti-cam": _opti_cam,
    "rise": _rise,
    "road": _road,
    "torch-cam": _torch_cam,
    "grad-cam-lib": _grad_cam_lib,
}


def preset_table(backbone: Classifier, explainers: Mapping[str, Explainer], images: Any) -> str:
    """The same maps under every preset, as a Markdown table: one row a preset and column.

    Args:
        backbone, explainers, images: as in :func:`xattn.eval.evaluate`.
    """
    names = list(explainers)
    lines = [f"| preset | metric | {' | '.join(names)} | id |"]
    lines.append(f"| :-- | :-- |{' --: |' * len(names)} :-- |")
    for name in PRESETS:
        protocol, probes = preset(name, backbone.preprocessing.mean)
        results = evaluate(
            backbone,
            explainers,
            images,
            protocol=protocol,
            metrics=probes,
            max_forward_batch=16,
            progress=False,
        )
        for column in results.columns:
            digits = results.info(column.metric).digits
            means = [f"{results.mean(method, *column):.{digits}f}" for method in names]
            cells = [name, column.key, *means, f"`{results.metric_id(column)}`"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
