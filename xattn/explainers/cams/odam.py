"""ODAM: a map of one detection, computed from the gradient of its score at each position.

    S = sum over levels of up( ReLU( sum_c G(dy / df_c) f_c ) )

Zhao and Chan, ICLR 2023, arXiv 2304.06354. y is the log-odds of the candidate that became the detection, f
(C, h, w) a feature map that the heads read, and G a Gaussian over positions. Cells of coarser levels count
in proportion to their area.

The forward pass up to the feature maps runs once, without a graph; only the heads keep a graph. Each
detection takes one backward pass through the heads that found it: those of its level or, in a detector with
proposals, those that read its proposal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.detection.candidates import Candidates, log_odds
from xattn.detection.detector import require_detections
from xattn.explainers.base import Explainer, register_explainer
from xattn.runtime.option_checks import NotNegative


@register_explainer("odam", title="ODAM", networks=("detector",))
@dataclass(kw_only=True, eq=False, repr=False)
class Odam(Explainer):
    """ODAM, for a view whose classes are detections (:class:`~xattn.detection.Detections`).

    Args:
        sigma: standard deviation of the Gaussian in cells of the feature map; 0 omits it.

    Raises:
        ValueError: a backbone without detections, or a detector without feature maps.

    Example:
        >>> import numpy as np, torch, xattn
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> size = {"min_size": 64, "max_size": 64}
        >>> net = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, **size)
        >>> _ = net.head.classification_head.cls_logits.bias.data.fill_(2.0)  # it detects
        >>> detector = xattn.load_detector(net, class_names=["none", "cat", "dog"])
        >>> photo = np.zeros((64, 64, 3), np.uint8)
        >>> [one] = xattn.explain_detections(photo, detector, "odam", most=1)
        >>> one.map.ndim
        2
    """

    per_class = True

    sigma: NotNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.network = require_detections(self.backbone, self.name).base.model
        if not len(self.network.points):
            raise ValueError(
                f"explainer: 'odam' reads feature maps, but {self.backbone.name} provides none; use "
                f"'d_rise' or 'occlusion'"
            )

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._class_maps(images, target[:, None])

    def _class_maps(self, images: Tensor, classes: Tensor) -> Tensor:
        return self._explained(images, classes)[1]

    def _attribute_classes(self, images: Tensor, choose: Any) -> tuple[Tensor, Tensor, Tensor]:
        chosen: list[Tensor] = []

        def once(logits: Tensor) -> Tensor:
            chosen.append(self._chosen(choose, logits))
            return chosen[0]

        logits, maps = self._explained(images, once)
        return logits, chosen[0], maps

    def _explained(self, images: Tensor, classes: Any) -> tuple[Tensor, Tensor]:
        """Logits (b, K) and maps (b, M, H, W) of ``classes`` (b, M), or of those chosen from the logits."""
        view = require_detections(self.backbone, self.name)
        with torch.enable_grad(), _leaves(self.network) as leaves:
            # In a two-stage detector the chosen candidates are computed again, from the maps.
            with torch.set_grad_enabled(not self.network.proposes):
                parts, _ = self.network.parts(view.base.normalize(images))
            with torch.no_grad():
                logits = view.answer(torch.cat([part.pack() for part in parts], 1))
            if callable(classes):
                classes = classes(logits)
            maps = [self._one(parts, leaves, column, images) for column in classes.unbind(1)]
        return logits, torch.stack(maps, 1)

    def _one(
        self, parts: list[Candidates], leaves: list[Tensor], target: Tensor, images: Tensor
    ) -> Tensor:
        """Maps (b, H, W) of one detection per image."""
        view = require_detections(self.backbone, self.name)
        total: Any = 0.0
        for i, number in enumerate(target.tolist()):
            own = [Candidates(*(t[i : i + 1] for t in part)) for part in parts]
            with torch.no_grad():
                values = [view.scores(part, [number])[0, :, 0] for part in own]
            level = max(range(len(own)), key=lambda n: float(values[n].max()))
            at = int(values[level].argmax())
            one = self.network.again(leaves, i, at)
            if one is None:
                one = Candidates(*(t[:, at : at + 1] for t in own[level]))
            total = total + log_odds(view.scores(one, [number])).sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        size = images.shape[-2:]
        finest = max(leaf.shape[2] * leaf.shape[3] for leaf in leaves)
        out = images.new_zeros(len(images), *size)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is None:
                continue
            value = torch.relu((_smooth(gradient, self.sigma) * leaf).sum(1, keepdim=True)).detach()
            up = F.interpolate(value, size, mode="bilinear", align_corners=False)[:, 0]
            out += up * (leaf.shape[2] * leaf.shape[3] / finest)
        return out


@contextmanager
def _leaves(network: Any) -> Iterator[list[Tensor]]:
    """The feature maps of the pass run inside this context; the graph begins at them."""
    leaves: list[Tensor] = []

    def begin(module: Any, inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    handles = [point.register_forward_hook(begin) for point in network.points]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def _smooth(maps: Tensor, sigma: float) -> Tensor:
    """(B, C, h, w) smoothed with a Gaussian of ``sigma`` cells, renormalised at the border."""
    if not sigma:
        return maps
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    weights, ones = kernel / kernel.sum(), torch.ones_like(maps[:1, :1])

    def blurred(m: Tensor) -> Tensor:
        channels = m.shape[1]
        rows = weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
        m = F.conv2d(m, rows, padding=(reach, 0), groups=channels)
        return F.conv2d(m, rows.transpose(2, 3), padding=(0, reach), groups=channels)

    return blurred(maps) / blurred(ones)
