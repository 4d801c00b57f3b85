"""Fills for masked pixels: the image b in x o m + b o (1 - m).

A network can see the shape of a black or mean-coloured hole. A blurred image (RISE, arXiv 1806.07421) leaks
low frequencies. Inpainting (Telea 2004) and ROAD's imputation (arXiv 2202.00449) continue the surroundings
of a hole and hide its shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.eval.fills.imputation import impute

KINDS = ("black", "mean", "blur", "rise", "noise", "inpaint", "road")
COLOURED = ("mean", "rise")  # kinds that need the data set's mean colour
_TELEA_RADIUS = 3  # pixels
_RISE_SIZE, _RISE_SIGMA = 11, 5.0  # pixels


def fill(
    image: Tensor,
    removed: Tensor,
    kind: str,
    *,
    mean: Sequence[float] | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute the image that replaces masked pixels, (C, H, W) in the dtype and on the device of ``image``.

    Args:
        image: (C, H, W) float in [0, 1], raw pixels; or a clip (C, T, H, W), which is filled frame by
            frame.
        removed: the masked pixels, (1, H, W) bool, or (1, T, H, W) for a clip. Only ``"inpaint"`` and
            ``"road"`` use this mask; at all other pixels, they return the values of ``image``.
        kind: ``"black"`` is 0, ``"mean"`` is the colour ``mean``, and ``"noise"`` is uniform in [0, 1),
            drawn for each pixel and channel. For ``"blur"`` see :func:`blur`, for ``"rise"`` see
            :func:`rise_blur`, and for ``"inpaint"`` see :func:`inpaint`. ``"road"`` is
            :func:`~xattn.eval.fills.imputation.impute` with noise 0.01, whose values may be slightly
            outside [0, 1].
        mean: (C,) the data set's mean colour in [0, 1], for ``"mean"`` and ``"rise"``.
        seed: the seed for ``"noise"`` and ``"road"``.

    The results for ``"black"`` and ``"mean"`` are expanded views of a single colour, so copy them before
    you write into them.
    """
    clip = image.ndim == removed.ndim == 4
    if clip and kind in ("inpaint", "road"):
        raise ValueError(
            f"kind: got {kind!r}, which needs photos; for clips give 'black', 'mean' or 'blur'"
        )
    if not (clip or image.ndim == 3) or not image.is_floating_point():
        raise ValueError(
            f"image: got {image.dtype} of shape {tuple(image.shape)}; give float (C, H, W)"
        )
    if kind == "black":
        return image.new_zeros(()).expand_as(image)
    if kind in COLOURED and (mean is None or len(mean) != len(image)):
        raise ValueError(
            f"mean: got {mean}; kind={kind!r} needs the mean colour ({len(image)},) in [0, 1]"
        )
    if kind == "mean":
        colour = torch.as_tensor(mean, device="cpu").to(image)
        return colour.view(-1, *[1] * (image.ndim - 1)).expand_as(image)
    if kind == "blur":
        return blur(image)
    if kind == "rise":
        colour = torch.as_tensor(mean, device="cpu")
        if image.ndim == 4:
            return rise_blur(image.transpose(0, 1), colour).transpose(0, 1)
        return rise_blur(image, colour)
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(image.shape, generator=generator, device="cpu").to(image)
    if kind == "inpaint":
        return inpaint(image, removed)
    if kind == "road":
        return impute(image[None], removed[None], seed=seed)[0]
    raise ValueError(f"kind: got {kind!r}; choose one of {', '.join(KINDS)}")


def blur(images: Tensor) -> Tensor:
    """Apply a Gaussian blur to (..., 3, H, W). The kernel is 11x11 with sigma 5 if the shorter side is 224.

    The kernel scales with the shorter side; its size is odd and at least 3x3. Borders are reflected.
    RISE's own blur is :func:`rise_blur`.
    """
    from torchvision.transforms.functional import gaussian_blur

    size = max(3, 2 * round((11 * min(images.shape[-2:]) / 224 - 1) / 2) + 1)
    sigma = 5 / 11 * size
    return gaussian_blur(images, [size, size], [sigma, sigma])


def rise_blur(images: Tensor, mean: Tensor) -> Tensor:
    """Compute RISE's starting image for insertion from raw pixels (..., 3, H, W) and the mean colour (3,).

    The authors' code convolves the normalised image, padded with zeros, so that borders fade to the mean
    colour. The kernel has 11x11 pixels at every image size. It is the result of SciPy's Gaussian filter
    with sigma 5 for an 11x11 image with a single non-zero pixel. At the borders of this image, the filter
    mirrors the tails of the Gaussian, so the kernel is almost a box filter.
    """
    # SciPy truncates tails at 4 sigma; distance d from the middle collects the weights at d and d +- 11.
    reach = int(4 * _RISE_SIGMA)
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64, device="cpu")
    weight = torch.exp(-0.5 * (distance / _RISE_SIGMA) ** 2)
    place = (distance.long() + _RISE_SIZE // 2) % _RISE_SIZE
    kernel = torch.zeros(_RISE_SIZE, dtype=torch.float64, device="cpu").index_add_(0, place, weight)
    kernel = (kernel / weight.sum()).to(images)
    colour = mean.to(images)[:, None, None]
    planes = (images - colour).flatten(0, -3)[:, None]
    planes = F.conv2d(planes, kernel[None, None, :, None], padding=(_RISE_SIZE // 2, 0))
    planes = F.conv2d(planes, kernel[None, None, None, :], padding=(0, _RISE_SIZE // 2))
    return planes.view_as(images) + colour


def inpaint(image: Tensor, removed: Tensor) -> Tensor:
    """Fill the removed pixels with OpenCV's Telea inpainting with radius 3, on 8-bit pixels.

    (3, H, W) in [0, 1] and (1, H, W) bool -> (3, H, W). If all pixels are removed, the result is the
    image's mean colour.
    """
    import cv2

    removed = removed.to(image.device)
    if bool(removed.all()):
        return image.mean((1, 2), keepdim=True).expand_as(image)
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    mask = removed[0].to(torch.uint8).cpu().numpy()
    if pixels.shape[2] == 3:
        filled = cv2.inpaint(pixels, mask, _TELEA_RADIUS, cv2.INPAINT_TELEA)
    else:  # OpenCV accepts one channel or three
        parts = [
            cv2.inpaint(p, mask, _TELEA_RADIUS, cv2.INPAINT_TELEA)
            for p in pixels.transpose(2, 0, 1)
        ]
        filled = np.stack(parts, 2)
    values = torch.from_numpy(filled).to(image.device, image.dtype).permute(2, 0, 1) / 255
    return torch.where(removed, values, image)
