"""A small classifier built from any block: patches, blocks, mean of tokens, linear layer.

    net = BlockNet("ninformer", size=8, patch=2, classes=10, dim=64, depth=2, options={"grid": (4, 4)})
    backbone = load_backbone(net)               # every explainer that reads tokens or gradients

It is a :class:`~xattn.backbone.TapModule`; its one tap is the last block's tokens as a map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import check_whole
from xattn.blocks import create_block
from xattn.photos.preprocessing import Preprocessing


class PlaceEmbedding(nn.Module):
    """A separate linear layer for the patch at each place: (B, N, P) -> (B, N, C)."""

    def __init__(self, places: int, width: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(places, width, dim) * width**-0.5)
        self.bias = nn.Parameter(torch.randn(places, dim) * 0.02)

    def forward(self, patches: Tensor) -> Tensor:
        return torch.einsum("bnp,npc->bnc", patches, self.weight) + self.bias


class BlockNet(nn.Module):
    """Images (B, channels, size, size) to logits (B, classes).

    Args:
        block: its name, see :func:`xattn.blocks.list_blocks`; "" for the stem without any block.
        size: side of the image in pixels; ``patch``: side of a token's patch.
        channels: of the images.
        dim, depth, options: width of the tokens, number of blocks, and the options of each block.
        stem: "shared", one linear layer for all patches; "place", one for each place; "conv", a 3 x 3
            convolution over the image with GELU before the patches.
        positions: whether a learned vector is added at each place; "place" has its own.
        norm: whether there is a layer norm before the mean.
    """

    def __init__(
        self,
        block: str,
        *,
        size: int = 8,
        patch: int = 2,
        channels: int = 3,
        classes: int = 10,
        dim: int = 64,
        depth: int = 2,
        options: Mapping[str, Any] | None = None,
        stem: Literal["shared", "place", "conv"] = "shared",
        positions: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        side = size // patch
        self.patch, self.grid, self.dim, self.stem = (
            patch,
            (side, side),
            check_whole("dim", dim),
            stem,
        )
        self.preprocessing = Preprocessing(
            input_size=(size, size), mean=(0.0,) * channels, std=(1.0,) * channels
        )
        width = check_whole("channels", channels) * patch**2
        self.conv = nn.Conv2d(channels, dim, 3, padding=1) if stem == "conv" else None
        width = dim * patch**2 if stem == "conv" else width
        self.embed: nn.Module = nn.Linear(width, dim)
        if stem == "place":
            self.embed = PlaceEmbedding(side**2, width, dim)
        self.positions: nn.Parameter | None = None
        if positions and stem != "place":
            self.positions = nn.Parameter(torch.randn(1, side**2, dim) * 0.02)
        made = [create_block(block, dim, **(options or {})) for _ in range(depth)] if block else []
        self.blocks: Any = nn.ModuleList(made)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.classifier = nn.Linear(dim, check_whole("classes", classes))

    def tokens(self, x: Tensor) -> Tensor:
        """The input of the first block, (B, N, C)."""
        if self.conv is not None:
            x = F.gelu(self.conv(x))
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.embed(patches)
        return tokens if self.positions is None else tokens + self.positions

    def mixed(self, tokens: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """The output of the last block for ``tokens``; ``grid`` is the network's own by default."""
        for block in self.blocks:
            tokens = block(tokens, self.grid if grid is None else grid)
        return tokens

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits of the last block's tokens."""
        return self.classifier(self.norm(tokens).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.mixed(self.tokens(x)))

    def forward_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """The logits, and the last block's tokens as a map (B, C, h, w)."""
        tokens = self.mixed(self.tokens(x))
        return self.classify(tokens), (tokens.transpose(1, 2).unflatten(2, self.grid),)

    def at_size(self, size: int) -> BlockNet:
        """A copy for images of another size.

        Positions are interpolated. Blocks tied to a grid are replaced by their ``at_grid``, which
        warns that they are untuned.
        """
        made = copy.deepcopy(self)
        made.grid = (size // self.patch, size // self.patch)
        made.preprocessing = replace(self.preprocessing, input_size=(size, size))
        if self.positions is not None:
            plane = self.positions.detach().transpose(1, 2).unflatten(2, self.grid)
            plane = F.interpolate(plane, size=made.grid, mode="bilinear", align_corners=False)
            made.positions = nn.Parameter(plane.flatten(2).transpose(1, 2))
        for i, block in enumerate(made.blocks):
            at_grid = getattr(block, "at_grid", None)
            if at_grid is not None:
                made.blocks[i] = at_grid(made.grid)
        return made
