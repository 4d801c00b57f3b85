"""How alike two maps are: Spearman's rank correlation and structural similarity, in float64.

    rho = Pearson(rank(a), rank(b)),    SSIM = mean_u l(a, b; u) cs(a, b; u)
    l = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1),    cs = (2 s_ab + C2) / (s_a^2 + s_b^2 + C2)

m, s^2 and s_ab are the means, variances and the covariance in a window around pixel u (Wang et al.
2004, doi 10.1109/TIP.2003.819861). Constant or non-finite inputs have no structure to compare: NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two (B, ...) -> (B,) float64 in [-1, 1]; ties share their mean rank.

    >>> spearman(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 8.0, 9.0]])).item()
    1.0

    Raises:
        ValueError: other shapes.
    """
    return pearson(ranks(a), ranks(b))


def ranks(values: Tensor) -> Tensor:
    """(B, ...) -> (B, N) float64: ranks 1..N, of equal values their mean; NaN for constant or
    non-finite rows."""
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"values: got shape {tuple(values.shape)}; give (B, ...)")
    flat = values.detach().double().flatten(1)
    ordered = flat.sort(dim=1).values
    below = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    found = (below + up_to + 1).double() / 2
    return torch.where(_varies(flat)[:, None], found, torch.nan)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of two (B, N) -> (B,) float64; NaN where one of them is constant."""
    _check_same(a, b)
    a, b = a.double(), b.double()
    a, b = (v - v.mean(1, keepdim=True) for v in (a, b))
    return ((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).clamp(-1, 1)


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of two (B, 1, H, W) -> (B,) float64 in [-1, 1].

    The settings are Wang's: a Gaussian window of 11 x 11 pixels with sigma 1.5, variances divided
    by the window's weight (not by n - 1), C1 = (0.01 L)^2 and C2 = (0.03 L)^2, and the mean over
    the pixels whose window lies inside the map. With scikit-image these are
    ``structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=L)``; its own default is a uniform 7 x 7 window.

    Args:
        data_range: L, the largest value minus the smallest possible one; 1 for min-maxed maps.

    Raises:
        ValueError: other shapes, or sides below 11 pixels.
    """
    _check_same(a, b)
    if a.ndim != 4 or a.shape[1] != 1 or min(a.shape[2:]) < WINDOW:
        raise ValueError(
            f"a, b: got shape {tuple(a.shape)}; give (B, 1, H, W) of at least {WINDOW} pixels a side"
        )
    a, b = a.detach().double(), b.detach().double()
    mean_a, mean_b, aa, bb, ab = _windowed(torch.cat([a, b, a * a, b * b, a * b], 1)).unbind(1)
    var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    value = (luminance * structure).mean((1, 2))
    return torch.where(_varies(a.flatten(1)) & _varies(b.flatten(1)), value, torch.nan)


def _windowed(x: Tensor) -> Tensor:
    """Gaussian-weighted means (B, C, H - 10, W - 10) of every whole window of (B, C, H, W)."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])


def _varies(flat: Tensor) -> Tensor:
    """Which rows of (B, N) are finite and not constant, (B,) bool."""
    return flat.isfinite().all(1) & (flat.amin(1) < flat.amax(1))


def _check_same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a, b: got shapes {tuple(a.shape)} and {tuple(b.shape)}; give equal ones")
