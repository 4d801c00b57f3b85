"""Flow matching of pictures from a prompt and a reference (Imagine Yourself, arXiv 2409.13346).

    x_t = (1 - t) z + t x,   z ~ N(0, 1)         the network predicts x from x_t, t and what it reads
    dx_t / dt = (x^ - x_t) / (1 - t)             integrated from noise, t = 0, to a picture, t = 1

Tokens are patches of 4 x 4 pixels. Each block has self-attention, attention to what is read, and an
MLP. What is read are the words and the patches of the reference:

    parallel       a separate attention to each, added; that to the reference starts at 0
    concatenated   one attention to both, in one sequence
    text, vision   one attention to only one of them

Words are embedded; the patches of a reference go through an MLP that is trained with the rest.
The published model has three frozen text encoders and a latent diffusion model, which are not built here.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.attention import ParallelCrossAttention
from xattn.runtime.option_checks import Count, checked

Reading = Literal["parallel", "concatenated", "text", "vision"]
READINGS: tuple[str, ...] = get_args(Reading)
PATCH = 4


class CharacterFlow(nn.Module):
    """``model(x, t, prompts, references)`` -> the predicted picture, (B, 3, side, side).

    Args:
        choices: number of possible words at each place of a prompt.
        reading: how the words and the reference are attended to.
        side: pixels, a multiple of 4.

    >>> model = CharacterFlow((4, 4, 3))
    >>> x, t, prompts = torch.rand(2, 3, 16, 16), torch.rand(2), torch.zeros(2, 3, dtype=torch.long)
    >>> model(x, t, prompts, torch.rand(2, 3, 16, 16)).shape
    torch.Size([2, 3, 16, 16])
    """

    @checked
    def __init__(
        self,
        choices: tuple[int, ...],
        reading: Reading = "parallel",
        side: Count = 16,
        dim: Count = 64,
        depth: Count = 2,
        heads: Count = 4,
    ) -> None:
        super().__init__()
        self.reading, self.side, self.dim = reading, side, dim
        count, pixels = (side // PATCH) ** 2, 3 * PATCH**2
        self.first = torch.tensor([0, *choices[:-1]]).cumsum(0)
        self.embed = nn.Conv2d(3, dim, PATCH, PATCH)
        self.positions = nn.Parameter(0.1 * torch.randn(1, count, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.words = nn.Embedding(sum(choices), dim)
        self.look = nn.Conv2d(3, dim, PATCH, PATCH)
        self.look_positions = nn.Parameter(0.1 * torch.randn(1, count, dim))
        self.look_norm = nn.LayerNorm(dim)
        self.look_layers = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )
        self.blocks = nn.ModuleList(Block(dim, heads, 2.0, qkv_bias=True) for _ in range(depth))
        widths = (dim, dim) if reading == "parallel" else (dim,)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.cross = nn.ModuleList(ParallelCrossAttention(dim, heads, widths) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pixels))

    def streams(self, prompts: Tensor, references: Tensor) -> tuple[Tensor, ...]:
        """The streams that are read, (B, S, dim) each."""
        text = self.words(prompts + self.first.to(prompts.device))
        if self.reading == "text":
            return (text,)
        patches = self.look(2 * references - 1).flatten(2).transpose(1, 2) + self.look_positions
        vision = patches + self.look_layers(self.look_norm(patches))
        if self.reading == "vision":
            return (vision,)
        if self.reading == "concatenated":
            return (torch.cat([text, vision], 1),)
        return text, vision

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor, references: Tensor) -> Tensor:
        return self.predict(x, t, self.streams(prompts, references))

    def predict(self, x: Tensor, t: Tensor, streams: tuple[Tensor, ...]) -> Tensor:
        """The predicted picture for x_t (B, 3, side, side) at times t (B,), given the streams."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        tokens = tokens + self.time(_sines(t, self.dim))[:, None]
        for norm, cross, block in zip(self.norms, self.cross, self.blocks, strict=True):
            tokens = block(tokens + cross(norm(tokens), streams))
        n = self.side // PATCH
        pixels = self.out(tokens).unflatten(2, (3, PATCH, PATCH)).unflatten(1, (n, n))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def loss(
        self, pictures: Tensor, prompts: Tensor, references: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """Mean squared error of the pictures in [0, 1] that are predicted at times t (B,)."""
        x = 2 * pictures - 1
        times = t[:, None, None, None]
        found = self((1 - times) * noise + times * x, t, prompts, references)
        return (found - x).square().mean()

    @torch.no_grad()
    def sample(self, prompts: Tensor, references: Tensor, noise: Tensor, steps: int = 16) -> Tensor:
        """Pictures (B, 3, side, side) in [0, 1], generated from ``noise`` by Euler steps."""
        streams = self.streams(prompts, references)
        x = noise
        for step in range(steps):
            t = step / steps
            found = self.predict(x, torch.full((len(x),), t), streams)
            x = x + (found - x) / (1 - t) / steps
        return ((x + 1) / 2).clamp(0, 1)


def _sines(t: Tensor, dim: int) -> Tensor:
    """(B, dim): sines and cosines of times (B,) in [0, 1]."""
    rates = torch.exp(torch.arange(dim // 2) * (-math.log(1000.0) / (dim // 2)))
    angles = 1000 * t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)
