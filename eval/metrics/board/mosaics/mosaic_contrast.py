"""Class contrast on mosaics of 2 x 2 photos, for the classes of the first two photos.

Both classes are visible side by side, so a faithful map should distinguish them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xattn.eval import functional
from xattn.eval.metrics.base import MetricGroup, MetricInfo, MetricInputs, Sample
from xattn.eval.metrics.board.class_contrast import ContrastMetric
from xattn.eval.metrics.board.gridpg import MosaicOptions


@dataclass(frozen=True)
class MosaicContrastMetric(MosaicOptions, ContrastMetric):
    """Class contrast of the classes of the first two photos, on the mosaic."""

    compares: ClassVar[str] = "mosaic"

    def value(self, sample: Sample) -> float:
        mosaic = self.mosaic_of(sample)
        raw = functional.upsample(
            sample.cohort.of_mosaic(mosaic)[:2].float(),
            mosaic.table.image.shape[-2:],
            sample.resize,
        )
        return self.of_classes(mosaic.table, (raw[0], raw[1]), mosaic.classes[:2])


GROUP = MetricGroup.single(
    MosaicContrastMetric,
    "class-contrast-mosaic",
    MetricInfo(
        "how much better maps of two classes of a mosaic fit their own outcomes than each other's",
        True,
        -2,
        2,
        reads=MetricInputs("class", "squares", "mean"),
        chance=0,
    ),
    "Class contrast on mosaics",
    "How much better the maps of two photos' classes go with their own class, side by side",
    cases=({"fill": "black", "confidence": 0.2},),
    by_name=True,
)
