"""Which explainers run on which family of networks for clips: a tiny network of each, random weights.

    python -m xattn.eval.studies clips-by-family --page docs/clips-by-family.md

Run from a checkout: the networks are those of the tests, tests/clip_networks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xattn.eval.studies.detector_families import networks_of, written

PAGE = "clips-by-family"
ABOUT = (
    "families, with random weights, for one class of a noise clip",
    "Loading networks and choosing what to explain\n"
    "is described in [clips-and-volumes.md](clips-and-volumes.md)",
)


def study(
    page: Path = Path(f"docs/{PAGE}.md"), networks: Path = Path("tests/clip_networks.py")
) -> Iterator[str]:
    """A line for each family, and the page with its CSV."""
    small = networks_of(networks)
    families = (*small.TORCHVISION, *small.TRANSFORMERS, "own")
    views = (("a module" if f == "own" else f, small.backbone(f)) for f in families)
    yield from written(page, views, {"cnn", "vit"}, "networks for clips", PAGE, *ABOUT)
