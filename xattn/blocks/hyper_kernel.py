"""Hyper-kernels: the weights of a mixer as a function of position, learned by a small network of sines.

    h_0 = f_0(c),   h_l = f_l(c) o (L_l h_{l-1} + b_l),   K(c) = L_out h_L,   f_l(c) = sin(W_l c + a_l)

c are coordinates in [-1, 1], including the ends, so that a kernel with 2 n - 1 positions equals, at every
second position, the kernel with n positions. W_l is initialised with uniform weights times 2 pi omega g /
(L + 1), where g is drawn from a Gamma distribution of shape 6 / (l + 1) and divided by the mean of that
distribution. This is close to github.com/hyperevolnet/Terminator, which divides neither by the mean nor by
L + 1, and adds a bias for each position that would tie K to one grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import check_whole

MOST_LAYERS = 64  # more do not improve kernels; a damaged file must not request thousands


class HyperKernel(nn.Module):
    """A kernel (channels, *grid) for grids of any size; it does not depend on the image.

    Args:
        channels: number of channels of the kernel.
        dims: number of coordinates of a position.
        hidden: width of h; ``layers``: L, the number of products of sines.
        omega: approximate highest initial frequency of the sines, in periods per side.
    """

    def __init__(
        self, channels: int, dims: int = 2, hidden: int = 32, layers: int = 2, omega: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < omega < float("inf"):
            raise ValueError(f"omega: got {omega}; give a positive number, such as 1")
        self.channels, self.dims = check_whole("channels", channels), check_whole("dims", dims)
        if check_whole("layers", layers) > MOST_LAYERS:
            raise ValueError(f"layers: got {layers}; give 1 to {MOST_LAYERS}")
        count = layers + 1
        filters = [nn.Linear(dims, check_whole("hidden", hidden)) for _ in range(count)]
        linears = [nn.Linear(hidden, hidden) for _ in range(layers)]
        self.filters, self.linears = nn.ModuleList(filters), nn.ModuleList(linears)
        self.out = nn.Linear(hidden, channels)
        for i, layer in enumerate(filters):
            shape = torch.full((hidden, 1), 6.0 / (i + 1))
            # The argument check reads values, which tensors on "meta" do not have.
            gamma = torch.distributions.Gamma(shape, 1.0, validate_args=False)
            scale = gamma.sample() / shape  # of mean 1
            nn.init.uniform_(layer.weight, -1, 1)
            nn.init.uniform_(layer.bias, -math.pi, math.pi)
            with torch.no_grad():
                layer.weight.mul_(2 * math.pi * omega * scale / count)
        for layer in linears:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
            nn.init.ones_(layer.bias)

    def forward(self, grid: Sequence[int]) -> Tensor:
        """(channels, *grid)."""
        if len(grid) != self.dims:
            raise ValueError(f"grid: got {tuple(grid)}; the kernel has {self.dims} coordinates")
        c = coordinates(grid, self.out.weight)
        h = self.filters[0](c).sin()
        for layer, linear in zip(self.filters[1:], self.linears, strict=True):
            h = layer(c).sin() * linear(h)
        return self.out(h).movedim(-1, 0)


def coordinates(grid: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates (*grid, dims) from -1 to 1 along each side; 0 along a side with one position."""
    sides = [
        torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device)
        if n > 1
        else like.new_zeros(1)
        for n in grid
    ]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)


def standardise(x: Tensor, eps: float = 1e-5) -> Tensor:
    """``x`` (B, C, h, w), scaled to mean 0 and variance 1 over the positions of each image and channel."""
    mean = x.mean((-2, -1), keepdim=True)
    variance = x.var((-2, -1), unbiased=False, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt()


def plane_product(context: Tensor, features: Tensor) -> Tensor:
    """The global product (B, C, h, w): for each image and channel, the matrix product of ``context`` and
    ``features``, both (h, w), divided by w. If the grid is not square, the h rows of ``features`` are
    interpolated to w rows first."""
    h, w = features.shape[-2:]
    return context @ (resampled_rows(h, w, features) @ features) / w


def resampled_rows(h: int, w: int, like: Tensor) -> Tensor:
    """The matrix (w, h) that interpolates h rows linearly to w rows; the identity if h = w."""
    eye = torch.eye(h, dtype=like.dtype, device=like.device)
    if h == w:
        return eye
    return F.interpolate(eye[None], size=w, mode="linear", align_corners=True)[0].t()


def hyper_score(y: Tensor, kernel: Tensor) -> Tensor:
    """Hyper-channel interaction: sigmoid((y o k) o y) of channel means y (B, C), k (C,)."""
    return (y * kernel * y).sigmoid()


def hyper_interact(planes: Tensor, channel: Tensor) -> Tensor:
    """Hyper-interaction: a score in (0, 1) for each position and channel, (B, C, h, w).

    ``planes`` (B, C, h, w) are averaged over channels, and the score is the sigmoid of this mean times
    ``channel`` (B, C).
    """
    return (planes.mean(1, keepdim=True) * channel[:, :, None, None]).sigmoid()
