"""Functions that turn maps into masks, and the four masking metrics as pure functions of probabilities.

    AD = 100/n sum max(0, p - q) / p        Grad-CAM++ (arXiv 1710.11063)
    IC = 100/n sum [q > p]                  Grad-CAM++, here with a margin for rounding errors
    ADD = 100/n sum (p - d) / p             LIFT-CAM (arXiv 2102.05228), signed
    AG = 100/n sum max(0, q - p) / (1 - p)  Opti-CAM (arXiv 2301.07002)

p, q and d are the probabilities (B,) of one fixed class on the image x, on x o m and on
x o (1 - m); with ``bounded=False`` they can be any scores, such as logits. All sums are computed in
float64. The ``*_values`` functions return one percentage per image, which is NaN where a score or the map
is invalid. The mean of these values is the metric, and a bootstrap can resample them. Maps of clips are
masked in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IC_MARGIN = 1e-6
# A map counts as constant if its range is at most this fraction of its largest magnitude, since so small a
# range can be the result of rounding in float32.
CONSTANT_RANGE = 1e-6

# ---------------------------------------------------------------- masks


def minmax(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Scale raw maps (B, 1, h, w) to [0, 1], in float32; also return which are valid, (B,) bool.

    A map that is constant or contains a non-finite value is invalid and is returned as zeros.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import minmax
        >>> minmax(torch.tensor([[[[1.0, 3.0], [2.0, 5.0]]]]))
        (tensor([[[[0.0000, 0.5000],
                  [0.2500, 1.0000]]]]), tensor([True]))
    """
    check_maps(maps)
    x = maps.detach().double()
    finite = x.isfinite().flatten(1).all(1)
    one = (-1, *[1] * (x.ndim - 1))
    x = torch.where(finite.view(one), x, 0.0)
    low, high = _range(x)
    span = high - low
    varies = (span > CONSTANT_RANGE * torch.maximum(low.abs(), high.abs())).flatten()
    scaled = (x - low) / torch.where(varies.view(one), span, 1.0)
    valid = finite & varies
    return torch.where(valid.view(one), scaled, 0.0).float(), valid


def _range(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each item in the batch (B, ...)."""
    axes = tuple(range(1, maps.ndim))
    return maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)


def upsample(maps: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Resize maps (B, 1, h, w) to (B, 1, H, W), with align_corners=False, within the range of each map.

    Maps of clips (B, 1, t, h, w) are resized to (B, 1, T, H, W), with linear interpolation in time.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import upsample
        >>> upsample(torch.rand(2, 1, 7, 7), (56, 56)).shape
        torch.Size([2, 1, 56, 56])
    """
    check_maps(maps)
    corners = None if mode == "nearest" else False
    mode = "trilinear" if mode == "bilinear" and maps.ndim == 5 else mode
    resized = F.interpolate(maps, tuple(size), mode=mode, align_corners=corners)
    # The interpolation weights sum to 1 only up to rounding, but a mask of ones must stay exactly 1.
    low, high = _range(maps)
    return torch.minimum(torch.maximum(resized, low), high)


def saliency(
    maps: Tensor,
    size: Sequence[int],
    *,
    is_mask: bool = False,
    normalization: str = "minmax",
    resize: str = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Turn raw maps (B, 1, h, w) into grey masks (B, 1, H, W) float32 in [0, 1], and valid (B,) bool.

    ``"minmax"`` scales each map at its own resolution and then resizes it; ``"minmax_upsampled"`` resizes
    it first. With ``is_mask``, the values must already be in [0, 1] and are only resized, and every mask is
    valid, even a constant one. Without it, a constant map is invalid.

    Example:
        >>> import torch
        >>> from xattn.eval import saliency
        >>> values, valid = saliency(torch.rand(2, 1, 7, 7), (56, 56))
        >>> values.shape, valid
        (torch.Size([2, 1, 56, 56]), tensor([True, True]))
    """
    if is_mask:
        check_maps(maps)
        grey = maps.detach().float()
        # NaN fails both comparisons, so it also raises this error.
        if not bool(((grey >= 0) & (grey <= 1)).all()):
            raise ValueError(
                "maps: a mask has values outside [0, 1]; scale it, or declare it as a map, not a mask"
            )
        valid = torch.ones(len(grey), dtype=torch.bool, device=grey.device)
        return upsample(grey, size, resize), valid
    if normalization == "minmax":
        grey, valid = minmax(maps)
        return upsample(grey, size, resize), valid
    if normalization == "minmax_upsampled":
        return minmax(upsample(maps.detach().double(), size, resize))
    raise ValueError(f"normalization: got {normalization!r}; choose 'minmax' or 'minmax_upsampled'")


def quantile(flat: Tensor, q: float) -> Tensor:
    """Return the linearly interpolated quantile (B,) of each row of (B, N), found without a full sort.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import quantile
        >>> quantile(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 0.5)
        tensor([1.5000])
    """
    position = q * (flat.shape[1] - 1)
    rank = min(int(position), flat.shape[1] - 1)
    low = flat.kthvalue(rank + 1, dim=1).values
    if rank == position:
        return low
    above = flat > low[:, None]  # the next larger value follows without a second selection
    tied = above.sum(1) < flat.shape[1] - rank - 1
    high = torch.where(tied, low, torch.where(above, flat, torch.inf).amin(1))
    return torch.lerp(low, high, position - rank)


def threshold_mask(masks: Tensor, level: float, method: str = "quantile") -> Tensor:
    """Keep the fraction ``level`` of pixels with the largest values of each (1, H, W); set the rest to 0.

    The grey levels of the remaining pixels do not change. ``"quantile"`` keeps every value >= the
    (1 - level) quantile, so a constant mask is kept completely. ``"kth"`` keeps exactly ceil(level * HW)
    pixels; among equal values, it prefers those that come first in row-major order.

    Example:
        >>> import torch
        >>> from xattn.eval import threshold_mask
        >>> threshold_mask(torch.tensor([[[[0.1, 0.9], [0.4, 0.6]]]]), level=0.5)
        tensor([[[[0.0000, 0.9000],
                  [0.0000, 0.6000]]]])
    """
    check_maps(masks)
    if not 0 < level <= 1:
        raise ValueError(f"level: got {level}; give a retained fraction in (0, 1]")
    if level == 1:
        return masks
    flat = masks.flatten(1)
    if method == "quantile":
        keep = flat >= quantile(flat, 1 - level)[:, None]
    elif method == "kth":
        dropped = int(flat.shape[1] * (1 - level) + 1e-9)
        order = flat.sort(dim=1, descending=True, stable=True).indices
        keep = torch.ones_like(flat, dtype=torch.bool)
        keep.scatter_(1, order[:, flat.shape[1] - dropped :], False)
    else:
        raise ValueError(f"threshold: got {method!r}; choose 'quantile' or 'kth'")
    return torch.where(keep, flat, 0.0).view_as(masks)


def check_maps(maps: Tensor) -> None:
    """Raise a ValueError unless ``maps`` have shape (B, 1, h, w), or (B, 1, t, h, w) for clips.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import check_maps
        >>> check_maps(torch.rand(2, 1, 7, 7))
    """
    if maps.ndim not in (4, 5) or maps.shape[1] != 1 or 0 in maps.shape[2:]:
        raise ValueError(
            f"maps: got shape {tuple(maps.shape)}; give (B, 1, h, w), or (B, 1, t, h, w) for clips"
        )


# ---------------------------------------------------------------- one percentage per image


def average_drop_values(p: Tensor, q: Tensor, *, bounded: bool = True) -> Tensor:
    """100 max(0, p - q) / p, (B,) float64; 0 where p = 0, since such a score cannot drop.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import average_drop_values
        >>> average_drop_values(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor([50.,  0.], dtype=torch.float64)
    """
    p, q = _scores(p, q, bounded)
    return 100 * ((p - q).clamp_min(0) / torch.where(p == 0, 1.0, p))


def increase_in_confidence_values(
    p: Tensor, q: Tensor, margin: float = IC_MARGIN, *, bounded: bool = True
) -> Tensor:
    """100 where q > p + margin max(p, q), else 0, (B,) float64.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import increase_in_confidence_values
        >>> increase_in_confidence_values(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor([  0., 100.], dtype=torch.float64)
    """
    p, q = _scores(p, q, bounded)
    higher = (q > p + margin * torch.maximum(p.abs(), q.abs())).double() * 100
    return torch.where((p + q).isnan(), torch.nan, higher)


def average_drop_in_deletion_values(p: Tensor, d: Tensor, *, bounded: bool = True) -> Tensor:
    """100 (p - d) / p, signed, (B,) float64; 0 where p = 0.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import average_drop_in_deletion_values
        >>> average_drop_in_deletion_values(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.5]))
        tensor([50.,  0.], dtype=torch.float64)
    """
    p, d = _scores(p, d, bounded)
    return torch.where(p == 0, 0.0 * d, 100 * (p - d) / torch.where(p == 0, 1.0, p))


def average_gain_values(p: Tensor, q: Tensor, *, bounded: bool = True) -> Tensor:
    """100 max(0, q - p) / (1 - p), (B,) float64; 0 where p = 1, since such a score cannot rise.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import average_gain_values
        >>> average_gain_values(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.75]))
        tensor([ 0., 50.], dtype=torch.float64)
    """
    p, q = _scores(p, q, bounded)
    return 100 * ((q - p).clamp_min(0) / torch.where(p == 1, 1.0, 1 - p))


def drop_values(p: Tensor, q: Tensor, *, bounded: bool = True) -> Tensor:
    """100 max(0, p - q), (B,) float64, the drop that pytorch-grad-cam computes; it is not divided by p.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import drop_values
        >>> drop_values(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor([40.0000,  0.0000], dtype=torch.float64)
    """
    p, q = _scores(p, q, bounded)
    return 100 * (p - q).clamp_min(0)


VALUES: dict[str, Callable[..., Tensor]] = {
    "AD": average_drop_values,
    "IC": increase_in_confidence_values,
    "ADD": average_drop_in_deletion_values,
    "AG": average_gain_values,
    "drop": drop_values,
}


def as_tensor(values: Any) -> Tensor:
    """Return ``values`` as a tensor. A tensor is returned unchanged; other values become a tensor on the
    CPU, whatever torch's default device is.

    Example:
        >>> from xattn.eval.functional import as_tensor
        >>> as_tensor([0.5, 1.0])
        tensor([0.5000, 1.0000])
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _scores(p: Tensor, q: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    p, q = (as_tensor(x).detach().double() for x in (p, q))
    if p.shape != q.shape or p.ndim != 1:
        raise ValueError(
            f"p, q: got shapes {tuple(p.shape)} and {tuple(q.shape)}; give (B,) and (B,)"
        )
    if not bounded:
        return p, q
    for name, value in (("p", p), ("q", q)):
        finite = value[value.isfinite()]
        if bool(((finite < 0) | (finite > 1 + 1e-6)).any()):
            raise ValueError(
                f"{name}: values from {float(finite.min()):g} to {float(finite.max()):g}; give "
                f"probabilities in [0, 1] (softmax or sigmoid of the logits)"
            )
    # A float32 softmax can slightly exceed 1. If p or q is not finite, both become NaN.
    finite = p.isfinite() & q.isfinite()
    return (
        torch.where(finite, p, torch.nan).clamp_max(1.0),
        torch.where(finite, q, torch.nan).clamp_max(1.0),
    )


# ---------------------------------------------------------------- sums and means


def mean_update(values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Per-image values (B,) -> (sum of the valid values, their number, number of invalid values).

    A value is invalid if it is NaN or if ``valid`` (B,) is False for it.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import mean_update
        >>> mean_update(torch.tensor([1.0, 2.0, 9.0]), valid=torch.tensor([True, True, False]))
        (tensor(3.), tensor(2), tensor(1))
    """
    good = ~values.isnan()
    if valid is not None:
        if valid.shape != values.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid: got {valid.dtype} of shape {tuple(valid.shape)}; give bool "
                f"{tuple(values.shape)}"
            )
        good = good & valid.to(good.device)
    return torch.where(good, values, 0.0).sum(), good.sum(), (~good).sum()


def mean_compute(total: Tensor, n: Tensor) -> Tensor:
    """Divide a sum by a count; the result is NaN where the count is 0.

    Example:
        >>> import torch
        >>> from xattn.eval.functional import mean_compute
        >>> mean_compute(torch.tensor(6.0), torch.tensor(4))
        tensor(1.5000)
    """
    return torch.where(n > 0, total / n.clamp_min(1), torch.nan)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    return mean_compute(*mean_update(values, valid)[:2])


def average_drop(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average drop in percent; lower is better. ``p`` and ``q`` (B,) are in [0, 1]; ``valid`` (B,) is bool.

    >>> average_drop(torch.tensor([0.8]), torch.tensor([0.6])).round(decimals=4)
    tensor(25., dtype=torch.float64)
    """
    return _mean(average_drop_values(p, q), valid)


def increase_in_confidence(
    p: Tensor, q: Tensor, valid: Tensor | None = None, margin: float = IC_MARGIN
) -> Tensor:
    """Percentage of images whose score increases when they are masked; higher is better.

    Example:
        >>> import torch
        >>> from xattn.eval import increase_in_confidence
        >>> increase_in_confidence(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.6]))
        tensor(50., dtype=torch.float64)
    """
    return _mean(increase_in_confidence_values(p, q, margin), valid)


def average_drop_in_deletion(p: Tensor, d: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean signed drop of the score on x o (1 - m), in percent; higher is better. ``d`` (B,) is in [0, 1].

    Example:
        >>> import torch
        >>> from xattn.eval import average_drop_in_deletion
        >>> p, d = torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.5])  # clean, masked
        >>> average_drop_in_deletion(p, d)
        tensor(25., dtype=torch.float64)
    """
    return _mean(average_drop_in_deletion_values(p, d), valid)


def average_gain(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average gain in percent; higher is better.

    Example:
        >>> import torch
        >>> from xattn.eval import average_gain
        >>> average_gain(torch.tensor([0.8, 0.5]), torch.tensor([0.4, 0.75]))
        tensor(25., dtype=torch.float64)
    """
    return _mean(average_gain_values(p, q), valid)
