"""IROF: area over the relative score as superpixels are removed, starting with the most relevant.

    IROF = 1 - AUC(f(x_t) / f(x)),    t = 0..R

x_t is x without the t most relevant of its R superpixels (SLIC). They are ranked by the mean of the raw map
and replaced by the image's mean colour (Rieger and Hansen 2020, arXiv 2003.08747).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
from xattn.eval.metrics.curves import (
    auc,
    check_count,
    check_curve,
    check_fill,
    fill_options,
    is_constant,
    removals,
)
from xattn.eval.metrics.flipping import pixel_flipping_auc, rank_regions, with_clean
from xattn.eval.metrics.mean_metric import MeanMetric

IMAGE_MEAN = "image-mean"
# The engine explains a chunk of images with one method after the other, so the cache has to hold a whole
# chunk. An entry takes 200 kB at 224 pixels.
_KEPT = 128
_segments: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()


def irof_values(scores: Tensor) -> Tensor:
    """Compute IROF (...) float64, at most 1, of curves (..., R + 1) that start with the clean score.

    Higher is better. The value is 0 if the score does not change, and negative if it rises. It is NaN if
    the clean score is not positive, because a ratio to it would be meaningless.
    """
    return 1 - auc(_relative(scores))


def irof_area(scores: Tensor) -> Tensor:
    """Compute the value of Quantus 0.6, (...): R minus the area under s_1 / s_0, ..., s_R / s_0, by the
    trapezoidal rule with unit spacing.

    It grows with the number of superpixels, to about R times :func:`irof_values`. Quantus segments the
    network's input, with the same parameters as the defaults here. The "mean" of Quantus is a single grey
    level, the mean of the whole batch, which changes as superpixels are replaced. ``perturb_baseline=0.0``
    is ``fill="black"``. The default replacement of Quantus rejects colour images, so a replacement has to
    be passed. In a batch, an image with fewer superpixels than others gets a different value than it would
    get alone.
    """
    relative = _relative(scores)
    return relative.shape[-1] - 1 - pixel_flipping_auc(relative)


def _relative(scores: Tensor) -> Tensor:
    s = check_curve(scores)
    clean = s[..., :1]
    return s / torch.where(clean > 0, clean, math.nan)


@dataclass(frozen=True)
class IrofMetric(PerturbationMetric):
    """IROF, with one forward pass per superpixel. SLIC finds about ``n_segments`` superpixels.

    The value is NaN for a constant map, which has no order, and for an image with a single superpixel.

    Args:
        n_segments, compactness, sigma: parameters of ``skimage.segmentation.slic``, which receives the RGB
            image in [0, 1] and converts it to Lab. Its other parameters are scikit-image's defaults.
        fill: ``"image-mean"``, the image's own mean colour, or one of the fills of
            :class:`~xattn.eval.metrics.curves.InsertionDeletionMetric`.
        mean: (3,) the colour for ``fill="mean"``, raw pixels in [0, 1].
    """

    n_segments: int = 100
    compactness: float = 10.0
    sigma: float = 0.0
    fill: str = IMAGE_MEAN
    mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_count("n_segments", self.n_segments)
        if self.n_segments < 2:
            raise ValueError(
                "n_segments: got 1; give at least 2, because a single superpixel has no order"
            )
        if not 0 < self.compactness < math.inf:
            raise ValueError(f"compactness: got {self.compactness}; give a number above 0")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(
                f"sigma: got {self.sigma}; give a width in pixels, or 0 for no smoothing"
            )
        if self.fill != IMAGE_MEAN:
            check_fill("fill", self.fill, self.mean)

    def column_options(self, column: Column) -> dict[str, Any]:
        slic = {name: getattr(self, name) for name in ("n_segments", "compactness", "sigma")}
        return {**slic, **fill_options(self.fill, self.mean)}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        regions: list[Tensor] = []
        if not is_constant(sample.raw):
            labels = superpixels(sample.image, self.n_segments, self.compactness, self.sigma)
            regions = rank_regions(labels, sample.raw)
        if len(regions) < 2:
            return lambda scores: {Column("IROF"): math.nan}
        kind, mean = self.fill, self.mean
        if kind == IMAGE_MEAN:
            kind, mean = "mean", tuple(sample.image.double().mean((1, 2)).tolist())
        images = removals(sample.image, regions, kind, mean=mean, seed=sample.seed)
        for t, image in enumerate(images, start=1):
            yield Request("IROF", image, shared=t == len(regions))

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            return {Column("IROF"): float(irof_values(with_clean(sample.score, scores["IROF"])))}

        return finish


class IROF(MeanMetric):
    """Mean IROF. ``update(scores, valid=None)`` takes curves (B, R + 1), with the clean score first.

    Images differ in R. Instead of padding their curves, update with one image at a time.
    """

    metric = "IROF"
    higher_is_better = True
    values = irof_values


def superpixels(
    image: Tensor, n_segments: int = 100, compactness: float = 10.0, sigma: float = 0.0
) -> Tensor:
    """Compute the SLIC labels 0..R-1, (H, W) int32 on CPU, of an image (3, H, W) in [0, 1].

    The labels of recent images are cached under a hash of their pixels, so all methods share a
    segmentation.
    """
    from skimage.segmentation import slic

    pixels = image.detach().double().permute(1, 2, 0).contiguous().cpu().numpy()
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
    key = (digest, pixels.shape, n_segments, compactness, sigma)
    if key in _segments:
        _segments.move_to_end(key)
        return _segments[key]
    found = slic(pixels, n_segments, compactness, sigma=sigma, start_label=0, channel_axis=-1)
    labels = torch.from_numpy(found).unique(return_inverse=True)[1].int()
    _segments[key] = labels
    if len(_segments) > _KEPT:
        _segments.popitem(last=False)
    return labels


GROUP = MetricGroup(
    "irof",
    IrofMetric,
    {
        "IROF": MetricInfo(
            "1 - area under f(x_t) / f(x), superpixels removed by rank",
            True,
            -math.inf,
            reads=MetricInputs("class", "superpixels", IMAGE_MEAN),
        ),
    },
    words={
        "IROF": (
            "Removal of superpixels",
            "How fast confidence falls while superpixels are removed, the most important first",
        ),
    },
    classes=(IROF,),
    cases=({"n_segments": 8},),
)
