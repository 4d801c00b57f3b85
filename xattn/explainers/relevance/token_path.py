"""Token path: the evidence for a class that each patch adds to the class token, followed through the blocks
to the class's log-odds.

    map_k = sum_lh path_lh / sd(sum_lh path_lh) + CAM_k / sd(CAM_k)

path_lh is the class token's attention in head h of block l, times the derivative of the log-odds with
respect to it along the token's path through the blocks (:mod:`xattn.heads.maps.tokens`). It takes one
pass, with no backward pass through patches. The map equals that of the untrained head ``tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from xattn.backbone import Backbone, Taps
from xattn.backbone.taps import block_taps
from xattn.explainers.base import register_explainer
from xattn.explainers.cams.cam import TapsExplainer
from xattn.heads.class_reading import UnknownReading
from xattn.heads.maps.tokens import LAST, TokenPath, divide_by_deviation


@register_explainer("token_path", title="Token path", networks=("vit",), cases=({}, {"cam": False}))
@dataclass(kw_only=True, eq=False, repr=False)
class TokenPathExplainer(TapsExplainer):
    """Map of the class token's path, for timm ViTs that classify a class token.

    Args:
        cam: add the class's CAM of the last three blocks; both maps are scaled to unit standard deviation.

    Raises:
        ValueError: the network is not a timm ViT that classifies a class token.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("token_path", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    cam: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.paths = TokenPath(self.backbone)
        except UnknownReading as error:
            raise ValueError(
                f"explainer: token_path follows the class token of a ViT, which {self.backbone.name} does "
                f"not allow ({error}); use 'gradcam' or 'occlusion'"
            ) from None

    @cached_property
    def tapped(self) -> Backbone:
        """The network with taps at all blocks; it must be made while no other thread runs the network,
        because making it sets the modes of modules."""
        return self.backbone.with_taps(block_taps(self.backbone.depth))

    def _maps(self, taps: Taps, classes: Tensor) -> Tensor:
        paths, rows = self.paths.to(taps.logits.device), LAST if self.cam else 0
        path, row, _ = paths(taps, classes, self.backbone.task, rows)
        path = divide_by_deviation(path.sum((2, 3)))
        return path + divide_by_deviation(row.sum((2, 3))) if self.cam else path
