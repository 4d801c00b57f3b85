"""FullGrad: the sum of inputs and biases, each times its gradient, which in a ReLU network equals the
logit.

    f(x) = sum x . df/dx + sum_z sum b . df/dz         z: the output of a layer, b: its bias
    map  = psi(x . df/dx) + sum_z psi(b . df/dz)       psi: absolute, scaled to [0, 1], up-sampled, summed

Srinivas and Fleuret, NeurIPS 2019, arXiv 1905.00780. x is the normalised image; for BatchNorm, b is its
shift beta - mean gamma / sqrt(var + eps). The channels of a layer are scaled to [0, 1] together, which
preserves their proportions, and then summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xattn.backbone.scored import class_of, is_score
from xattn.backbone.taps import resized
from xattn.explainers.base import Choose, Explainer, check_inputs, check_target, register_explainer
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.rules import BIASED, Composite, own_gradient

LAYERS = Composite(plain=True, rules=tuple((name, own_gradient) for name in BIASED))


@register_explainer("fullgrad", title="FullGrad")
class FullGrad(Explainer):
    """FullGrad: nonnegative maps (B, 1, H, W) from one forward and one backward pass.

    In networks of ReLUs, pooling layers and BatchNorms, the parts sum to the logit: see
    :meth:`contributions`. In other networks they do not. Parts without a position in the image,
    such as the classifier's bias or those inside the windows of a Swin transformer, are left out of
    the map. All layers count equally, so the map depends on how a network is divided into layers.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("fullgrad", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    clips = True

    def contributions(self, inputs: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        """The contributions of the image and of all biases to the class logit, (B,) and (B,).

        Args:
            inputs, target: as in :meth:`attribute`.
        """
        if is_score(self.backbone, target):
            return self.with_target(target).contributions(inputs, 0)  # type: ignore[attr-defined,no-any-return]
        inputs, target = check_inputs(inputs, self.backbone), class_of(self.backbone, target)
        targets = check_target(target, inputs.shape[0], self.backbone.num_classes)
        with self._guard(), torch.enable_grad():
            images = self._move(inputs)
            logits, x, engine = self._pass(images)
            image, *parts = self._parts(logits, x, engine, targets.to(logits.device))
        biases = images.new_zeros(len(images), dtype=torch.float64)
        for part, _ in parts:  # its batch axis may hold several windows per image
            biases += part.double().reshape(len(images), -1).sum(1)
        return image[0].double().flatten(1).sum(1), biases

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        size = images.shape[2:]
        with torch.enable_grad():
            logits, x, engine = self._pass(images)
            classes = self._chosen(choose, logits.detach())
            maps = []
            for column in classes.unbind(1):
                image, *parts = self._parts(logits, x, engine, column)
                placed = (self._placed(part, last, images) for part, last in parts)
                psi = [_psi(part, size) for part in (image[0], *placed) if part is not None]
                maps.append(torch.stack(psi).sum(0))
        return logits.detach(), classes, torch.cat(maps, 1)

    def _pass(self, images: Tensor) -> tuple[Tensor, Tensor, Engine]:
        self.backbone.requires_grad_(False)  # the guard restores it
        x = self.backbone.normalize(images).requires_grad_()
        with Engine(LAYERS, keep=True) as engine:
            return self.backbone.logits_normalized(x), x, engine

    @staticmethod
    def _parts(
        logits: Tensor, x: Tensor, engine: Engine, classes: Tensor
    ) -> Iterator[tuple[Tensor, bool]]:
        """x . df/dx, then for each layer b . df/dz (B, ...) and whether its channels come last."""
        score = logits.gather(1, classes[:, None]).sum()
        edges, biases = zip(*engine.added, strict=True) if engine.added else ((), ())
        grads = torch.autograd.grad(score, [x, *edges], retain_graph=True, allow_unused=True)
        for factor, grad in zip((x.detach(), *biases), grads, strict=True):
            if grad is not None:
                yield factor * grad, factor.ndim == 1

    def _placed(self, part: Tensor, last: bool, images: Tensor) -> Tensor | None:
        """A layer's part as (B, C, h, w); None if it has no position in the image."""
        if len(part) != len(images):
            return None
        if part.ndim == 3 and last and self.backbone.is_vit and self.backbone.has_grid:
            grid = self.backbone.grid(*images.shape[2:])
            count = grid[0] * grid[1] + self.backbone.prefix_tokens
            return self.backbone.tokens_to_map(part, grid) if part.shape[1] == count else None
        if part.ndim != images.ndim:
            return None
        part = part.movedim(-1, 1) if last else part
        return part if part[0, 0].numel() > 1 else None


@torch.no_grad()
def _psi(part: Tensor, size: Any) -> Tensor:
    """(B, C, h, w) -> (B, 1, H, W); a constant part counts as 0."""
    part = part.abs()
    axes = tuple(range(1, part.ndim))
    low, high = part.amin(axes, keepdim=True), part.amax(axes, keepdim=True)
    unit = torch.where(high > low, (part - low) / (high - low), 0.0).sum(1, keepdim=True)
    return resized(unit, size)
