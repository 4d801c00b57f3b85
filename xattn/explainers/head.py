"""A trained head as an explainer, and the same head with its weights shuffled as a sanity row.

``head``: scores of the target class before the sigmoid, any number of classes from one backbone
pass. ``randomized_head``: what Adebayo et al. (arXiv 1810.03292) ask of every method: if the map
survives the loss of the weights, it did not come from them.
"""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from xattn.explainers.base import Choose, Explainer, register_explainer

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.heads import Head

M = TypeVar("M", bound=nn.Module)


@register_explainer("head")
class HeadExplainer(Explainer):
    """A trained explanation head: any classes from one forward pass.

    Args:
        maps: ``"scores"`` or ``"mask"``, instead of the head's own ``explain_with``.
    """

    needs_head = True

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        maps: str | None = None,
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch)
        if maps not in (None, "scores", "mask"):
            raise ValueError(f"maps: got {maps!r}; choose 'scores' or 'mask'")
        if maps is not None:
            self.head = copy.copy(self.head)
            self.head.explain_with = maps  # type: ignore[union-attr]

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        assert self.head is not None
        return self.head.explanation(self.backbone(images), target)

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        assert self.head is not None
        taps = self.backbone(images)
        classes = self._chosen(choose, taps.logits)
        return taps.logits, classes, self.head.explanation(taps, classes)


@register_explainer("randomized_head")
class RandomizedHead(HeadExplainer):
    """Sanity row: the head explains after the values of its weights were shuffled.

    Args:
        randomize: ``"head"`` shuffles every weight tensor of the head, and the classifier rows that
            it reads, each within itself (so scales stay); ``"backbone"`` shuffles the weight
            matrices and kernels of the backbone that feeds it. Logits stay the real ones.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head | None = None,
        seed: int = 0,
        max_forward_batch: int = 32,
        randomize: str = "head",
    ) -> None:
        super().__init__(backbone, head, seed, max_forward_batch)
        if randomize not in ("head", "backbone"):
            raise ValueError(f"randomize: got {randomize!r}; choose 'head' or 'backbone'")
        assert self.head is not None
        self.randomize = randomize
        self.shuffled: Backbone | None = None
        if randomize == "head":
            self.head = shuffle_weights(self.head, seed)
        else:
            self.shuffled = shuffle_weights(backbone, seed, matrices_only=True)

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        assert self.head is not None
        return self.head.explanation((self.shuffled or self.backbone)(images), target)

    @torch.no_grad()
    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        if self.shuffled is None:
            return super()._attribute_classes(images, choose)
        return Explainer._attribute_classes(self, images, choose)


@torch.no_grad()
def shuffle_weights(module: M, seed: int, matrices_only: bool = False) -> M:
    """A copy whose tensors are each permuted within themselves, by (seed, name) alone.

    Running statistics of normalisation layers are left alone, and with ``matrices_only`` also
    buffers and everything of less than two dimensions.
    """
    module = copy.deepcopy(module)
    tensors: dict[str, Tensor] = dict(module.named_parameters())
    if not matrices_only:
        tensors.update((k, v) for k, v in module.named_buffers() if "running_" not in k)
    for name, value in tensors.items():
        if not value.is_floating_point() or (matrices_only and value.ndim < 2):
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        value.copy_(value.flatten()[order].view_as(value))
    return module
