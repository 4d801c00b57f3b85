"""Which explainers run on which family of segmentation networks: a tiny network of each, random weights.

    python -m xattn.eval.studies segmenters-by-family --page docs/segmenters-by-family.md

Run from a checkout: the networks are those of the tests, tests/small_segmenters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xattn.backbone import Backbone, load_segmenter
from xattn.backbone.scored import scored
from xattn.backbone.targets import at_point
from xattn.eval.studies.detector_families import networks_of, written

TORCHVISION = ("fcn", "deeplabv3", "lraspp")
TRANSFORMERS = ("segformer", "upernet", "maskformer", "mask2former")
SMP = ("Unet", "FPN", "DeepLabV3Plus")
PAGE = "segmenters-by-family"
ABOUT = (
    "families, with random weights, for a class at a point of noise",
    "Loading networks and choosing what to explain\nis described in [segmenters.md](segmenters.md)",
)


def study(
    page: Path = Path(f"docs/{PAGE}.md"), networks: Path = Path("tests/small_segmenters.py")
) -> Iterator[str]:
    """A line for each family, and the page with its CSV."""
    point = at_point(0, 0.5, 0.5, p="sigmoid")
    views = ((f, scored(network, point)) for f, network in _segmenters(networks_of(networks)))
    yield from written(page, views, {"cnn", "vit"}, "segmentation networks", PAGE, *ABOUT)


def _segmenters(small: Any) -> Iterator[tuple[str, Backbone]]:
    shared: dict[str, Any] = {"input_size": small.SIDE, "mean": 0.5, "std": 0.5}
    for kind in TORCHVISION:
        yield kind, load_segmenter(small.torchvision_segmenter(kind), **shared)
    for kind in TRANSFORMERS:
        yield kind, load_segmenter(small.transformers_segmenter(kind), **shared)
    for kind in SMP:
        yield f"smp.{kind}", load_segmenter(small.smp_segmenter(kind), **shared)
    yield "SAM, a point", load_segmenter(small.sam(), prompt=[(0.5, 0.5)], **shared)
    yield "a module", load_segmenter(small.UNet(), **shared)

    def numbers(images: Any) -> Any:
        return images.detach().numpy()

    yield "a function of NumPy", load_segmenter(numbers, input_size=small.SIDE)
