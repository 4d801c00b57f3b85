"""CAAP: the class logit of a picture without content, after the tokens of one patch were replaced with the
photo's.

    S(p) = f_c(neutral picture, with token p after blocks first, ..., last taken from the photo)

Izadi et al., "Causal Attribution via Activation Patching", arXiv 2603.13652. Our only source is the
paper's abstract, which mentions "an intermediate range of layers" and "a neutral target context". Here
both the blocks and the picture are options; the defaults are our choice.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from xattn.explainers.base import ImageByImage, register_explainer
from xattn.explainers.gradients import probe_image
from xattn.explainers.relevance.attention import choose_layer, patch_grid
from xattn.explainers.relevance.token_blocks import block_outputs, output_changed, token_blocks


@register_explainer("caap", title="CAAP", networks=("vit",), cases=({}, {"first": 0, "last": 0}))
@dataclass(kw_only=True, eq=False, repr=False)
class Caap(ImageByImage):
    """Activation patching of a ViT: maps (h, w) on the patch grid, from one pass per patch and one for
    the photo.

    Args:
        first, last: the range of blocks after which the token is replaced; negative numbers count from the
            end. By default, the range is from a quarter to half of the depth.
        neutral: the picture without content: the data set's "mean" colour, or "black".

    Raises:
        ValueError: the network has no blocks of tokens, or its blocks change the number of tokens.
    """

    perturbs = True
    first: int | None = None
    last: int | None = None
    neutral: Literal["mean", "black"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._blocks = token_blocks(self.backbone)
        count = len(self._blocks)
        first = count // 4 if self.first is None else choose_layer(self.first, count, "first")
        last = count // 2 if self.last is None else choose_layer(self.last, count, "last")
        if first > last:
            raise ValueError(
                f"first: got block {first}, which is after last={last}; give a first block "
                f"that is not after the last"
            )
        self._range = range(first, last + 1)
        with self._guard(), torch.no_grad():
            image = self._move(probe_image(self.backbone))
            tokens = self._source(image)
            if tokens.ndim != 4:
                raise ValueError(
                    f"backbone: the blocks of {self.backbone.name} do not return tokens (B, N, C); use "
                    f"'occlusion'"
                )
            patches = tokens.shape[2] - self.backbone.prefix_tokens
            patch_grid(self.backbone, image, patches)
        self.forwards = 1 + patches

    def _source(self, image: Tensor) -> Tensor:
        """The tokens after each block of the range, (blocks, 1, N, C)."""
        with block_outputs([self._blocks[i] for i in self._range]) as found:
            self.backbone.logits(image)
        alike = all(tokens.shape == found[0].shape for tokens in found)
        return torch.stack(found) if alike else torch.empty(0)

    def _explain(self, image: Tensor, classes: Tensor) -> Tensor:
        prefix, source = self.backbone.prefix_tokens, self._source(image[None])[:, 0]
        patches = source.shape[1] - prefix
        empty = torch.zeros_like(image[None])
        if self.neutral == "mean":
            empty = empty + self.backbone.mean.to(image)

        def scores(places: Tensor) -> Tensor:
            at = torch.arange(len(places), device=image.device), places  # one token of each picture
            with ExitStack() as hooks:
                for number, tokens in zip(self._range, source, strict=True):
                    change = partial(torch.index_put, indices=at, values=tokens[places])
                    hooks.enter_context(output_changed(self._blocks[number], change))
                logits = self.backbone.logits(empty.expand(len(places), -1, -1, -1))
            return logits[:, classes].double()

        places = torch.arange(prefix, prefix + patches, device=image.device)
        found = torch.cat(self._batches.run(scores, places))
        return found.T.unflatten(1, patch_grid(self.backbone, image[None], patches))
