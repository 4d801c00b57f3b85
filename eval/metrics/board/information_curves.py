"""Information curves: how few bytes of a photo restore the score of its class (SIC) or the prediction
(AIC)?

    area under max_{s <= t} y_s over x_t,    x_t = (b_t - b_0) / (b - b_0),    y_t = (p_t - p_0) / (p - p_0)

Image t shows the photo where the map is highest. Elsewhere, it is interpolated linearly from a random 1 %
of the pixels. b is the size of an image as lossless WebP. For SIC, p is the score of the class; for AIC, p
is 1 if the class is predicted, else 0. Kapishnikov et al. 2019, arXiv 1906.02825; their code interpolates
again at every step.
"""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.curves import is_constant

LEVELS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.13, 0.21, 0.34, 0.5, 0.75)


def information_area(sizes: Tensor, scores: Tensor) -> float:
    """Compute the area under T ``scores`` over ``sizes`` in bytes.

    Both are ordered from the blurred photo to the full photo. The area is NaN if the full photo does not
    have a higher score and a larger size than the blurred photo.

    >>> information_area(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([0.0, 1.0, 1.0]))
    0.75
    """
    (x, y), parts = (sizes.double(), scores.double()), []
    for values in (x, y):
        span = values[-1] - values[0]
        if not span > 0:
            return math.nan
        parts.append(((values - values[0]) / span).clamp(0, 1))
    x, order = parts[0].sort(stable=True)
    return float(torch.trapezoid(parts[1][order].cummax(0).values, x))


@lru_cache(maxsize=64)  # shared by all methods; the cache distinguishes tensors by identity
def interpolate_sparse(image: Tensor, share: float, seed: int) -> Tensor:
    """Interpolate a photo (3, H, W) from a random ``share`` of its pixels. Outside of their convex hull,
    the nearest of these pixels is used."""
    from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator

    height, width = image.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    count = max(4, round(share * height * width))
    order = torch.randperm(height * width, generator=generator, device="cpu")[:count].numpy()
    known = np.stack(np.divmod(order, width), 1)
    pixels = image.cpu().double().flatten(1).T.numpy()[order]
    places = np.stack(np.divmod(np.arange(height * width), width), 1)
    found = LinearNDInterpolator(known, pixels)(places)
    outside = np.isnan(found[:, 0])
    found[outside] = NearestNDInterpolator(known, pixels)(places[outside])
    return torch.from_numpy(found.T.copy()).view(image.shape).to(image)


def webp_bytes(image: Tensor) -> int:
    """Return the size in bytes of an image (3, H, W) in [0, 1] as lossless WebP."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=100)
    return stream.tell()


@dataclass(frozen=True)
class InformationCurvesMetric(PerturbationMetric):
    """SIC and AIC, with one pass per level and one for the blurred photo.

    Args:
        levels: the shares of the pixels that are shown.
        known: the share of the pixels from which the blurred photo is interpolated.
        least: photos on which the score of the class is below this number have no value.
    """

    levels: tuple[float, ...] = LEVELS
    known: float = 0.01
    least: float = 0.8

    def __post_init__(self) -> None:
        for name, values in {"levels": self.levels, "known": (self.known,)}.items():
            if not values or not all(0 < value < 1 for value in values):
                raise ValueError(f"{name}: got {values}; give shares in (0, 1)")

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        flat = sample.raw.flatten()
        if is_constant(flat) or sample.score < self.least:
            return lambda scores: dict.fromkeys(self.columns, math.nan)
        order = flat.argsort(descending=True, stable=True)
        current = interpolate_sparse(sample.image, self.known, sample.seed).flatten(1).clone()
        sizes, whole = [], sample.image.flatten(1)
        for level in (0.0, *sorted(self.levels), 1.0):
            top = order[: round(level * len(order))]
            current[:, top] = whole[:, top]
            image = current.view_as(sample.image)
            sizes.append(webp_bytes(image))
            yield Request("SIC", image)
            yield Request("AIC", image, hit=True)
        weights = torch.tensor(sizes, device="cpu")

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            return {c: information_area(weights, scores[c.metric]) for c in self.columns}

        return finish


_READS = MetricInputs("class", "thresholds of the map", "blur")
GROUP = MetricGroup(
    "information-curves",
    InformationCurvesMetric,
    {
        "SIC": MetricInfo("area under the score over the bytes shown", True, reads=_READS),
        "AIC": MetricInfo("area under hits over the bytes shown", True, reads=_READS),
    },
    words={
        "SIC": ("Score by information", "How much confidence a few bytes of the photo bring back"),
        "AIC": ("Hits by information", "Whether a few bytes of the photo bring back the class"),
    },
    cases=({"levels": (0.1, 0.5), "least": 0.0},),
    by_name=True,
)
