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
from xattn.eval.studies.detector_families import networks_of, page_of, rows_of
from xattn.runtime.files import write_rows, write_text

TORCHVISION = ("fcn", "deeplabv3", "lraspp")
TRANSFORMERS = ("segformer", "upernet", "maskformer", "mask2former")
SMP = ("Unet", "FPN", "DeepLabV3Plus")
PAGE = "segmenters-by-family"
ABOUT = (
    "families, random weights, a class at a point of noise",
    "How networks are loaded, and what is explained:\n[segmenters.md](segmenters.md)",
)


def study(
    page: Path = Path(f"docs/{PAGE}.md"), networks: Path = Path("tests/small_segmenters.py")
) -> Iterator[str]:
    """A line for each family, and the page with its CSV."""
    rows: list[dict[str, Any]] = []
    for family, network in _segmenters(networks_of(networks)):
        view = scored(network, at_point(0, 0.5, 0.5, p="sigmoid"))
        found = list(rows_of(family, view, {"cnn", "vit"}))
        rows += found
        yield f"{family}: {sum(row['result'] != 'no' for row in found)} of {len(found)} run"
    write_rows(page.with_suffix(".csv"), rows)
    write_text(page, "\n".join(page_of(rows, "segmentation networks", PAGE, *ABOUT)) + "\n")
    yield f"page: {page}"


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
