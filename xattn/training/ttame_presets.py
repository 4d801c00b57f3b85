"""The published T-TAME settings (arXiv 2403.04523) by name: backbone, taps, head and recipe.

    xattn train IMAGENET/train --preset ttame-resnet50 --output runs/resnet50

trains as published: eight epochs over ImageNet, batches of 32, SGD with OneCycle, the exact C x C
branches and one free row a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xattn.runtime.names import did_you_mean


@dataclass(frozen=True)
class Preset:
    """A timm ``backbone`` with its ``taps``, and a ``head`` with its ``options``."""

    backbone: str
    taps: tuple[str, ...]
    mask_policy: str
    head: str = "ttame"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the head: the paper's fusion and its exact branches."""
        return {"fusion": "per_class", "branch_rank": None, "mask_policy": self.mask_policy}


PRESETS = {
    # VGG: the outputs of the last three max-pools; timm's intermediates lie before them.
    "ttame-vgg16": Preset(
        "vgg16", ("stage.2.pool", "stage.3.pool", "stage.4.pool"), "raw_normalize"
    ),
    "ttame-resnet50": Preset("resnet50", ("stage.2", "stage.3", "stage.4"), "raw_normalize"),
    "ttame-vit-b16": Preset(
        "vit_base_patch16_224", ("norm1.9", "norm1.10", "norm1.11"), "normalized"
    ),
}


def preset(name: str) -> Preset:
    """The preset called ``name``; a ``ValueError`` lists similar names if there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset: unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name]
