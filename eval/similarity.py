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

from xattn.correlation import check_same, pearson, ranks, spearman, varies

__all__ = ["pearson", "ranks", "spearman", "ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


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
    check_same(a, b)
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
    return torch.where(varies(a.flatten(1)) & varies(b.flatten(1)), value, torch.nan)


def _windowed(x: Tensor) -> Tensor:
    """Gaussian-weighted means (B, C, H - 10, W - 10) of every whole window of (B, C, H, W)."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])
