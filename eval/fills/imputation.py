"""ROAD's imputation: every removed pixel becomes the weighted mean of its eight neighbours.

    w_i x_i = sum_j k_ij x_j,   k = 2 (edge) or 1 (corner),   w_i = sum of k_ij inside the image

for all removed pixels i, with the kept pixels as boundary values. The weights k_ij / w_i are 1/6 and 1/12,
renormalised at the image's border. Then noise N(0, noise^2) is added. This is the noisy linear imputation
of Rong et al. 2022 (arXiv 2202.00449). Written with the factor w_i, as above, the system is symmetric and
positive definite.

It is solved by conjugate gradients, preconditioned with one multigrid cycle (Trottenberg et al.,
*Multigrid*, 2001), in which one damped Jacobi step comes before each coarser grid and one after it.
Bilinear interpolation P transfers corrections between grids. On every grid, removed pixels can lie next to
pixels that are kept; therefore, the coarse operators are the exact products P^T A P (Galerkin). These
operators are again nine-point stencils and depend linearly on the stencil of the finer grid, so one fixed
convolution of stride 2 computes them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Half of the symmetric neighbourhood as (rows down, columns right, weight). The other half is its mirror
# image.
_LINKS = ((0, 1, 2.0), (1, 0, 2.0), (1, 1, 1.0), (1, -1, 1.0))
# Slices of the pixels i that have such a neighbour j inside the grid, and slices of these j.
_PAIRS = tuple(
    (
        (..., slice(0, -dy or None), slice(max(0, -dx), -dx if dx > 0 else None)),
        (..., slice(dy, None), slice(max(0, dx), dx if dx < 0 else None)),
    )
    for dy, dx, _ in _LINKS
)
_DAMPING = 0.9
_COARSEST = 3  # pixels per side
_COARSEST_STEPS = 8


def impute(
    images: Tensor,
    removed: Tensor,
    *,
    noise: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Tensor:
    """Fill the removed pixels with ROAD's noisy linear imputation, in a batch on any device.

    The values of removed pixels are never read, unless all pixels are removed. In that case there are no
    boundary values, and the result is the image's mean colour. The elements of the batch do not depend on
    each other.

    Args:
        images: (B, 3, H, W), or (1, 3, H, W) for B masks; float, H and W at least 2.
        removed: (B, 1, H, W) bool, or (1, 1, H, W) for B images.
        noise: standard deviation of the noise on removed pixels. Nothing is clamped afterwards.
        seed: the seed of the noise (3, H, W), which is the same for the whole batch.
        tolerance: an element is finished after a correction of at most this size, in the unit of the
            pixels. The remaining error is smaller: at most 6e-4 on photos for a tolerance of 1e-3.
        max_iterations: the largest number of iterations. If an element is not finished after these
            iterations, there is a warning.

    Returns:
        (B, 3, H, W) in the dtype of ``images``, without gradients. For images in half precision, the system
        is solved in float32.

    Raises:
        ValueError: if images or masks have a wrong type or size.
    """
    if not images.is_floating_point() or removed.dtype != torch.bool:
        raise ValueError(
            f"images, removed: got {images.dtype} and {removed.dtype}; give floating point and bool"
        )
    if removed.ndim != 4 or removed.shape[1:] != (1, *images.shape[2:]):
        raise ValueError(
            f"removed: got shape {tuple(removed.shape)} for images {tuple(images.shape)}; give one "
            f"mask (1, H, W) per image, of the same size"
        )
    batch = max(len(images), len(removed))
    images = images.expand(batch, -1, -1, -1)
    removed = removed.to(images.device).expand(batch, -1, -1, -1)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    images = images.detach()
    x = images.to(dtype)
    everything = removed.flatten(1).all(1)[:, None, None, None]
    unknown = removed & ~everything
    # The mean is subtracted so that residuals far from the boundary are exactly 0. Otherwise, rounding
    # errors of one sign would add up to 1e-3 there.
    known = x.masked_fill(unknown, 0)
    count = (~unknown).sum((2, 3), keepdim=True)
    mean = known.sum((2, 3), keepdim=True) / count
    solution = _solve((x - mean).masked_fill(unknown, 0), unknown, tolerance, max_iterations)
    filled = solution.add_(mean)
    if noise > 0:
        generator = torch.Generator().manual_seed(seed)
        field = torch.randn(
            images.shape[1:], generator=generator, dtype=torch.float32, device="cpu"
        )
        filled.add_(field.to(filled), alpha=noise)
    return torch.where(removed, filled.to(images.dtype), images)


# ---------------------------------------------------------------- conjugate gradients


def _solve(known: Tensor, unknown: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Compute the values of the unknown pixels, (B, 3, H, W), 0 elsewhere. ``known`` must be 0 at unknown
    pixels.

    The image is surrounded by a ring of known zeros, so that every pixel has eight neighbours.
    """
    known, mask = F.pad(known, (1, 1, 1, 1)), F.pad(unknown.to(known.dtype), (1, 1, 1, 1))
    weights = _weights(mask)
    r, x, p, q = (torch.zeros_like(known) for _ in range(4))
    _Differences(weights, known, r)()  # x = 0: the residual is sum_j k_ij x_j over known pixels
    grids, product = _grids(mask, weights, r), _Differences(weights, p, q)
    z, scratch = grids[0].x, grids[0].t
    going = mask.new_ones(len(mask), 1, 1, 1)
    rz = going
    for _ in range(max_iterations):
        _cycle(grids, 0)
        rz_before, rz = rz, torch.mul(r, z, out=scratch).sum((2, 3), keepdim=True)
        p.mul_(_ratio(rz, rz_before)).add_(z)
        product()  # q = -A p
        step = _ratio(rz, -torch.mul(p, q, out=scratch).sum((2, 3), keepdim=True)) * going
        x.addcmul_(p, step)
        r.addcmul_(q, step)
        # z estimates the error before this step. Finished elements do not change any more, so their result
        # does not depend on how long the others take.
        going.mul_(torch.abs(z, out=scratch).amax((1, 2, 3), keepdim=True) > tolerance)
        if not bool(going.any()):
            break
    else:
        warnings.warn(
            f"impute: {int(going.sum())} of {len(known)} images still changed by more than "
            f"{tolerance:g} after {max_iterations} iterations",
            stacklevel=3,
        )
    return x[..., 1:-1, 1:-1]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Compute a / b, or 0 where b is 0, which happens for a constant image, solved before the first
    step."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


# ---------------------------------------------------------------- the operators


class _Differences:
    """Computes y_i = sum_j k_ij x_j - w_i x_i inside the ring. This is -A x at unknown pixels if x is 0
    elsewhere.

    k is (1 2 1)^T (1 2 1) without its centre. The object is bound to fixed x and y, because on small grids
    creating the views takes longer than the arithmetic.
    """

    def __init__(self, weights: Tensor, x: Tensor, y: Tensor) -> None:
        batch, channels, h, w = x.shape
        rows = x.new_empty(batch, channels, h - 1, w)
        both = x.new_empty(batch, channels, h - 2, w)
        columns = rows[:, :, 1:, 1:]
        self.inner, self.out, self.centre = x[..., 1:-1, 1:-1], y[..., 1:-1, 1:-1], weights + 4
        self.sums = (
            (x[:, :, :-1], x[:, :, 1:], rows),
            (rows[:, :, :-1], rows[:, :, 1:], both),
            (both[..., :-1], both[..., 1:], columns),
            (columns[..., :-1], columns[..., 1:], self.out),
        )

    def __call__(self) -> None:
        for a, b, out in self.sums:
            torch.add(a, b, out=out)
        self.out.addcmul_(self.inner, self.centre, value=-1)


def _weights(mask: Tensor) -> Tensor:
    """Compute w (1, 1, H, W), the sum of the weights of a pixel's neighbours inside the image."""
    inside = mask.new_zeros(1, 1, *mask.shape[2:])
    inside[..., 1:-1, 1:-1] = 1
    total = torch.zeros_like(inside)
    _Differences(mask.new_zeros(()), inside, total)()
    return total[..., 1:-1, 1:-1]


class _Residual:
    """Computes t = b - A x for a nine-point stencil (B, 5, h, w), with fixed b, x and t.

    Channel 0 is the diagonal, and channels 1 to 4 are -a_ij for the four links.
    """

    def __init__(self, stencil: Tensor, b: Tensor, x: Tensor, t: Tensor) -> None:
        self.diagonal, self.b, self.x, self.t = stencil[:, :1], b, x, t
        self.terms = []
        for n, (i, j) in enumerate(_PAIRS, 1):
            link = stencil[:, n : n + 1][i]
            self.terms += [(t[i], link, x[j]), (t[j], link, x[i])]

    def __call__(self) -> None:
        torch.addcmul(self.b, self.diagonal, self.x, value=-1, out=self.t)
        for t, link, x in self.terms:
            t.addcmul_(link, x)


# ---------------------------------------------------------------- the multigrid cycle


class _Hats:
    """Linear interpolation P along one dimension between fixed tensors ``coarse`` and ``fine``.

    Coarse pixel n is at fine pixel 2 n. The last coarse pixel may be just outside of the fine grid.
    """

    def __init__(self, coarse: Tensor, fine: Tensor, dim: int) -> None:
        def every_second(start: int) -> Tensor:
            return fine[(*[slice(None)] * dim, slice(start, None, 2))]

        self.even, self.odd = every_second(0), every_second(1)
        count = self.odd.shape[dim]
        self.same = coarse.narrow(dim, 0, self.even.shape[dim])
        self.outside = coarse.narrow(
            dim, self.even.shape[dim], coarse.shape[dim] - self.even.shape[dim]
        )
        self.left, self.right = coarse.narrow(dim, 0, count), coarse.narrow(dim, 1, count)
        # A dense copy: stride 2 along the last dimension is slow to read and to write.
        self.middle = torch.empty_like(self.odd, memory_format=torch.contiguous_format)

    def restrict(self) -> None:
        """Compute coarse = P^T fine."""
        self.same.copy_(self.even)
        self.outside.zero_()
        self.middle.copy_(self.odd)
        self.left.add_(self.middle, alpha=0.5)
        self.right.add_(self.middle, alpha=0.5)

    def prolong(self, add: bool) -> None:
        """Compute fine = P coarse, or fine += P coarse if ``add``."""
        torch.add(self.left, self.right, out=self.middle)
        if add:
            self.even.add_(self.same)
            self.odd.add_(self.middle, alpha=0.5)
        else:
            self.even.copy_(self.same)
            torch.mul(self.middle, 0.5, out=self.odd)


class _Grid:
    """One level: b is the right-hand side, x the correction and t scratch memory, all (B, 3, h, w).

    ``residual()`` sets t = b - A x. ``jacobi`` (B, 1, h, w) is the damped inverse diagonal, 0 at known
    pixels.
    """

    residual: Callable[[], None]
    jacobi: Tensor
    restriction: tuple[_Hats, ...] = ()
    prolongation: tuple[_Hats, ...] = ()

    def __init__(self, b: Tensor) -> None:
        self.b, self.x, self.t = b, torch.empty_like(b), torch.empty_like(b)

    def smooth(self) -> None:
        self.residual()
        self.x.addcmul_(self.t, self.jacobi)


class _Finest(_Grid):
    def __init__(self, mask: Tensor, weights: Tensor, b: Tensor) -> None:
        super().__init__(b)
        self.mask, product = mask, _Differences(weights, self.x, self.t.zero_())

        def residual() -> None:
            product()
            self.t.add_(b)

        self.residual = residual
        self.jacobi = torch.zeros_like(mask)
        self.jacobi[..., 1:-1, 1:-1] = mask[..., 1:-1, 1:-1] / weights


class _Coarse(_Grid):
    def __init__(self, stencil: Tensor, b: Tensor) -> None:
        super().__init__(b)
        self.residual = _Residual(stencil, b, self.x, self.t)
        diagonal = stencil[:, :1]
        size = diagonal.clone()
        for n, (i, j) in enumerate(_PAIRS, 1):
            link = stencil[:, n : n + 1][i].abs()
            size[i] += link
            size[j] += link
        # By Gershgorin's theorem, the eigenvalues of A / max(diagonal, size / 2) are at most 2. With the
        # diagonal alone, the iteration diverges where several coarse pixels cover one removed pixel.
        scale = torch.maximum(diagonal, size / 2)
        self.jacobi = torch.where(scale > 0, _DAMPING / torch.where(scale > 0, scale, 1), 0)


def _grids(mask: Tensor, weights: Tensor, b: Tensor) -> list[_Grid]:
    """Create all levels for a mask (B, 1, h, w) and the finest right-hand side (B, 3, h, w)."""
    grids: list[_Grid] = [_Finest(mask, weights, b)]
    for stencil in _coarse_stencils(mask, weights):
        fine, coarse = grids[-1], _Coarse(stencil, b.new_empty(*b.shape[:2], *stencil.shape[2:]))
        half = b.new_empty(*b.shape[:2], stencil.shape[2], fine.b.shape[3])
        fine.restriction = (_Hats(half, fine.t, 2), _Hats(coarse.b, half, 3))
        fine.prolongation = (_Hats(coarse.x, half, 3), _Hats(half, fine.x, 2))
        grids.append(coarse)
    return grids


def _cycle(grids: Sequence[_Grid], n: int) -> None:
    """Set grids[n].x to an approximate solution for the right-hand side grids[n].b, by one symmetric
    V-cycle."""
    grid = grids[n]
    torch.mul(grid.b, grid.jacobi, out=grid.x)
    if n + 1 == len(grids):
        for _ in range(_COARSEST_STEPS):
            grid.smooth()
        return
    grid.residual()
    if isinstance(grid, _Finest):
        grid.t.mul_(grid.mask)
    for hats in grid.restriction:
        hats.restrict()
    _cycle(grids, n + 1)
    columns, rows = grid.prolongation
    columns.prolong(add=False)
    rows.prolong(add=True)
    if isinstance(grid, _Finest):
        grid.x.mul_(grid.mask)
    grid.smooth()


# ---------------------------------------------------------------- Galerkin products


def _coarse_stencils(mask: Tensor, weights: Tensor) -> list[Tensor]:
    """Compute P^T A P for every coarser grid, each (B, 5, h, w) as in :class:`_Residual`."""
    fine = mask.new_zeros(len(mask), 5, *mask.shape[2:])
    fine[:, :1, 1:-1, 1:-1] = weights
    fine[:, :1].mul_(mask)
    for n, ((i, j), (_, _, k)) in enumerate(zip(_PAIRS, _LINKS, strict=True), 1):
        torch.mul(mask[i], mask[j], out=fine[:, n : n + 1][i]).mul_(k)
    # On a GPU, float32 convolutions may be rounded to TF32, and operators would lose definiteness.
    exact = torch.float64 if fine.is_cuda else fine.dtype
    kernel = _galerkin().to(fine.device, exact)
    stencils = []
    while max(fine.shape[2:]) > _COARSEST:
        h, w = fine.shape[2:]
        padded = F.pad(fine.to(exact), (2, 3 - w % 2, 2, 3 - h % 2))
        fine = F.conv2d(padded, kernel, stride=2).to(mask.dtype)
        stencils.append(fine)
    return stencils


@functools.cache
def _galerkin() -> Tensor:
    """Return the kernel (5, 5, 5, 5) whose convolution of the fine stencil gives the coarse stencil.

    Let phi be the bilinear hat function of a coarse pixel at 0. The entry between this pixel and the coarse
    pixel at 2 o is the sum over f of a(f, f + c) (phi(f) phi(f + c - 2 o) + phi(f + c) phi(f - 2 o)).
    """

    def phi(y: Tensor, x: Tensor) -> Tensor:
        return (1 - y.abs() / 2).clamp_min(0) * (1 - x.abs() / 2).clamp_min(0)

    y, x = torch.meshgrid(
        torch.arange(-2, 3, device="cpu"), torch.arange(-2, 3, device="cpu"), indexing="ij"
    )
    offsets = [(0, 0), *((dy, dx) for dy, dx, _ in _LINKS)]
    kernel = torch.empty(5, 5, 5, 5, dtype=torch.float64, device="cpu")
    for n, (v, u) in enumerate(offsets):
        for m, (dy, dx) in enumerate(offsets):
            entry = phi(y, x) * phi(y + dy - 2 * v, x + dx - 2 * u)
            if m > 0:
                entry = entry + phi(y + dy, x + dx) * phi(y - 2 * v, x - 2 * u)
            # The diagonal is stored unchanged, and links are stored with the opposite sign.
            kernel[n, m] = entry if (n == 0) == (m == 0) else -entry
    return kernel
