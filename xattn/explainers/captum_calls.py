"""What Captum asks of an attribution method, so that it takes an explainer of xattn as it is.

    NoiseTunnel(explainer).attribute(images, nt_samples=8, stdevs=0.1, target=281)
    sensitivity_max(explainer.attribute, images, target=281)
    infidelity(backbone.logits, noise, images, explainer.attribute_inputs(images, 281), target=281)

``NoiseTunnel`` calls ``attribute.__wrapped__``, and its metrics give a tuple and expect one. Both add noise
to images, so there alone pixels may leave [0, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Attribute = Callable[..., Tensor]


class CaptumMethod:
    """Mixin of explainers: the attributes of ``captum.attr.Attribution``."""

    backbone: Any
    multiplies_by_inputs = False
    is_delta_supported = False

    @property
    def forward_func(self) -> Callable[[Tensor], Tensor]:
        """Logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        return self.backbone.logits  # type: ignore[no-any-return]

    def has_convergence_delta(self) -> bool:
        """False: no explainer says how far its sum is from the score."""
        return False

    def attribute_inputs(self, inputs: Tensor, target: Tensor | int) -> Tensor:
        """Maps in the shape of the inputs (B, C, H, W), as ``captum.metrics.infidelity`` wants them:
        resized bilinearly, a C-th for each channel."""
        maps = self.attribute(inputs, target)  # type: ignore[attr-defined]
        maps = F.interpolate(maps, inputs.shape[-2:], mode="bilinear", align_corners=False)
        return (maps / inputs.shape[1]).expand(inputs.shape)


def captum_call(noisy: Attribute) -> Callable[[Attribute], Attribute]:
    """Decorator of ``attribute(self, inputs, target)``, which Captum may then call, too; ``noisy`` is the
    same method for pixels that may leave [0, 1]."""

    def decorated(attribute: Attribute) -> Attribute:
        @functools.wraps(attribute)
        def call(self: Any, inputs: Any, target: Any = None) -> Any:
            if isinstance(inputs, tuple) and len(inputs) == 1:
                return (noisy(self, inputs[0], target),)
            return attribute(self, inputs, target)

        call.__wrapped__ = noisy  # type: ignore[attr-defined]
        return call

    return decorated
