"""HyperZZW: products of planes of tokens and of a kernel over positions (hyperevolnet/Terminator).

    c = n o K,    global  g = std(c std(W n)),    2E  e = c o n,    channel  i = n o sigmoid(y o k o y)
    u = W_u [g, e, i],    s = sigmoid(mean_channels(u) y o k o y),    x <- x + W_o (s o u)

with n = LN(x), y the mean of n over positions, K (C, h, w) and k (C,) hyper-kernels
(:mod:`xattn.blocks.hyper_kernel`) and std the standardisation of each plane. In g, two planes (h, w) of
each channel are multiplied as matrices. The parts are the authors'; their combination is ours. The authors'
network has no residual; its batch statistics and local branches are left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.operators.base import Operator
from xattn.blocks.base import Block, register_block
from xattn.blocks.hyper_kernel import (
    HyperKernel,
    hyper_interact,
    hyper_score,
    plane_product,
    resampled_rows,
    standardise,
)
from xattn.kernels.softmax.reference import widen

PARTS = ("global", "2e", "channel")


@register_block(
    "hyperzzw",
    paper="github.com/hyperevolnet/Terminator",
    complexity="(3 + P) N C^2 + N w C",
    grid=(2,),
    cases=(
        {"hidden": 8},
        {"hidden": 8, "parts": ("global",)},
        {"hidden": 8, "parts": ("2e", "channel")},
    ),
)
class HyperZZWBlock(Block):
    """Hyper-kernels instead of attention, on grids with two sides of any length. Prefix tokens have no
    position and pass unchanged.

    If the grid is not square, the rows of std(W n) are interpolated from h to w before the product.

    Args:
        parts: a selection of "global", "2e" and "channel".
        hidden, layers, omega: settings of the kernel over positions, see
            :class:`~xattn.blocks.hyper_kernel.HyperKernel`; the kernel over channels is half as wide.
    """

    def __init__(
        self,
        dim: int,
        parts: Sequence[str] = PARTS,
        hidden: int = 32,
        layers: int = 2,
        omega: float = 1.0,
    ) -> None:
        super().__init__(dim)
        self.parts = tuple(parts)
        if not self.parts or any(self.parts.count(p) > 1 or p not in PARTS for p in self.parts):
            raise ValueError(f"parts: got {self.parts}; give some of {', '.join(PARTS)}, each once")
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.kernel = HyperKernel(dim, 2, hidden, layers, omega)
        self.channel_kernel = HyperKernel(1, 1, max(1, hidden // 2), layers, omega)
        self.features = nn.Linear(dim, dim) if "global" in self.parts else None
        self.join = nn.Linear(len(self.parts) * dim, dim)
        self.proj = nn.Linear(dim, dim)

    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        n, context = self._context(x, grid, prefix)
        score, u = self._interaction(n, context)
        return x + F.pad(self.proj(_tokens(score * u)), (0, 0, prefix, 0))

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Operator | None:
        """The mean of c over the channels, as a signed operator (B, 1, N, N): c mixes the rows within each
        column of the grid. None without the global part."""
        if self.features is None:
            return None
        n, context = self._context(x, grid, prefix)
        h, w = n.shape[-2:]
        return PlaneOperator(
            context.mean(1, keepdim=True) @ resampled_rows(h, w, context) / w, w, prefix
        )

    @torch.no_grad()
    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """``context``: the mean over channels of n o K; ``score``: the mean of s. (B, 1, h, w)."""
        n, context = self._context(x, grid, prefix)
        score = self._interaction(n, context)[0]
        return {
            "context": context.mean(1, keepdim=True),
            "score": score.mean(1, keepdim=True),
        }

    def _context(
        self, x: Tensor, grid: tuple[int, ...] | None, prefix: int
    ) -> tuple[Tensor, Tensor]:
        """n and n o K as planes (B, C, h, w)."""
        assert grid is not None
        n = self.norm(x[:, prefix:]).transpose(1, 2).unflatten(2, grid)
        return n, n * self.kernel(grid)

    def _interaction(self, n: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """s and u, (B, C, h, w)."""
        y, k = n.mean((-2, -1)), self.channel_kernel((self.dim,))[0]
        made = []
        if self.features is not None:
            features = standardise(_planes(self.features, n))
            made.append(standardise(plane_product(context, features)))
        if "2e" in self.parts:
            made.append(context * n)
        if "channel" in self.parts:
            made.append(n * hyper_score(y, k)[:, :, None, None])
        u = _planes(self.join, torch.cat(made, 1))
        return hyper_interact(u, y * k * y), u


class PlaneOperator(Operator):
    """An operator in which the token in row i and column k reads the token in row j of the same column with
    the weight P_ij: A = P (x) I.

    Args:
        planes: P, (B, H, h, h); ``width``: w, number of columns; ``prefix``: number of leading tokens,
            which A neither reads nor writes.
    """

    signed = True

    def __init__(self, planes: Tensor, width: int, prefix: int = 0) -> None:
        self.planes, self.width, self.prefix = planes, width, prefix
        n = prefix + planes.shape[-1] * width
        self.shape = (planes.shape[0], planes.shape[1], n, n)

    @property
    def pairs(self) -> float:
        return float(self.planes.shape[-1] ** 2 * self.width)

    def matvec(self, x: Tensor) -> Tensor:
        places = x[:, :, self.prefix :].unflatten(2, (-1, self.width)).flatten(3)
        moved = self.planes.to(x.dtype) @ places
        return F.pad(moved.reshape(*x.shape[:2], -1, x.shape[-1]), (0, 0, self.prefix, 0))

    def rows(self, index: Tensor) -> Tensor:
        place = (index - self.prefix).clamp_min(0)
        rows = widen(self.planes[:, :, place // self.width])[..., None]
        column = F.one_hot(place % self.width, self.width).to(rows.dtype)[:, None]
        rows = (rows * column).flatten(3) * (index >= self.prefix)[:, None]
        return F.pad(rows, (self.prefix, 0))

    def _anchor(self) -> Tensor:
        return self.planes


def slow_loss(blocks: Sequence[HyperZZWBlock], grid: Sequence[int]) -> Tensor:
    """Slow neural loss: the sum, over all pairs of blocks, of the mean of (K_j - K_i)^2. The kernel with
    fewer channels is repeated; the loss is 0 only if all kernels over positions agree.

    Raises:
        ValueError: fewer than two blocks, or numbers of channels of which neither is a multiple of the
            other.
    """
    if len(blocks) < 2:
        raise ValueError(f"blocks: got {len(blocks)}; the slow loss compares two or more")
    total = None
    for first, second in combinations([block.kernel(grid) for block in blocks], 2):
        few, many = sorted((first, second), key=len)
        if len(many) % len(few):
            raise ValueError(
                f"blocks: got kernels of {len(few)} and {len(many)} channels; give multiples"
            )
        loss = (few.repeat(len(many) // len(few), 1, 1) - many).square().mean()
        total = loss if total is None else total + loss
    assert total is not None
    return total


def _planes(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer over the channels of (B, C, h, w)."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def _tokens(planes: Tensor) -> Tensor:
    return planes.flatten(2).transpose(1, 2)
