"""Images given as numbers: accepted layouts and ranges, and how each becomes the model's input.

``explain`` takes photos. Tensors and arrays among them are

    a tensor   (3, H, W) or (B, 3, H, W)    float in [0, 1], or uint8
    an array   (H, W, 3) or (B, H, W, 3)    float in [0, 1], or uint8

where a clip has one more axis, (3, T, H, W) and (T, H, W, 3).

A **tensor of the model's input size is the model's input** and is used unchanged. Everything else (tensors
of another size, arrays, PIL images, files) is treated as a photo and prepared with the model's own crop.
Photos have 8 bits, so floats are rounded to 8 bits. A list may mix all of these; a loader, or any other
iterable, yields images or batches of them, alone or followed by labels, which are ignored.

``explainer.attribute`` takes the model's input: a float tensor (B, 3, H, W) in [0, 1], one image
(3, H, W), or arrays, which are only converted to the layout and range of a tensor. Nothing is cropped
there.

Pixels are raw: the backbone normalises them. Any float type, device and memory layout is accepted, as are
tensors with a gradient graph, but no gradient flows back to the caller. Anything else raises a one-line
error that contains the call that would convert it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xattn.photos.images import check_size

ROUNDING = 1e-4  # tolerance for values that resizing pushes out of [0, 1]


@dataclass(frozen=True, eq=False)
class ArrayImage:
    """One image from a tensor or an array: ``pixels`` (C, H, W), uint8 or float in [0, 1], on the CPU."""

    pixels: Tensor
    is_tensor: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    def load(
        self, max_pixels: int | None = None, bands: Sequence[int] | None = None
    ) -> Image.Image:
        """An 8-bit RGB photo of the image's three channels, or of the three channels in ``bands``. If the
        image has another number of channels and ``bands`` is None, the photo is their mean, in grey.

        Raises:
            ValueError: the image has more than ``max_pixels``.
        """
        check_size(self.size[::-1], "the given array", max_pixels)
        pixels = self.pixels if bands is None else self.pixels[list(bands)]
        if pixels.shape[0] != 3:
            pixels = pixels.float().mean(0, keepdim=True).to(pixels.dtype).expand(3, -1, -1)
        if pixels.dtype != torch.uint8:
            pixels = _unit(pixels).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def input(self) -> Tensor:
        """(C, H, W) float32 in [0, 1]."""
        return _unit(self.pixels)


def is_array(value: Any) -> TypeGuard[Tensor | NDArray[Any]]:
    """Whether ``value`` is a tensor or a NumPy array."""
    return isinstance(value, Tensor | np.ndarray)


def is_stream(images: Any) -> bool:
    """Whether images come from a loader or another iterable of unknown length that is read only once."""
    if is_array(images) or isinstance(images, Sequence | Image.Image | dict):
        return False
    return hasattr(images, "__iter__") or hasattr(images, "__getitem__")


def single_images(images: Iterable[Any], channels: int = 3) -> Iterator[Any]:
    """The items of a list, a loader or a data set, as a network needs them: batches are split into single
    tensors (C, H, W) or :class:`ArrayImage`, and paths and PIL images are unchanged."""
    for item in iterate_images(images):
        if isinstance(item, Tensor) and item.ndim == 4:
            yield from item
        elif isinstance(item, np.ndarray):
            yield from array_images(item, channels)
        else:
            yield item


def array_images(
    images: Tensor | NDArray[Any], channels: int = 3, argument: str = "images"
) -> list[ArrayImage]:
    """The images in a tensor or an array, one or a batch; see the module for the accepted layouts.

    Raises:
        ValueError: the layout, dtype or range is not accepted, a value is NaN, or there is no image.
    """
    pixels = _checked(images, channels, argument).cpu()
    return [ArrayImage(image, isinstance(images, Tensor)) for image in pixels.unbind()]


def input_batch(inputs: Any, channels: int = 3, argument: str = "inputs", axes: int = 2) -> Tensor:
    """Convert a batch or a single image, given as a tensor or an array, to the network's input
    (B, C, H, W), float in [0, 1]; with ``axes`` = 3, convert clips to (B, C, T, H, W).

    Raises:
        ValueError: the type, layout, dtype or range is not accepted, a value is NaN, or there is no image.
    """
    if not is_array(inputs):
        sides, other = "H, W", "photos to xattn.explain(images, backbone, explainer=explainer)"
        if axes == 3:
            sides, other = "T, H, W", "a clip to xattn.explain_clip(clip, backbone, explainer)"
        raise ValueError(
            f"{argument}: got a {type(inputs).__name__}; give a float tensor (B, {channels}, {sides}), or "
            f"{other}"
        )
    pixels = _checked(inputs, channels, argument, axes)
    if isinstance(inputs, Tensor) and inputs.dtype == torch.uint8:
        raise ValueError(
            f"{argument}: got {_kind(inputs)}; give floats in [0, 1]: {argument} / 255"
        )
    return pixels if isinstance(inputs, Tensor) else _unit(pixels)


def iterate_images(images: Iterable[Any]) -> Iterator[Any]:
    """Items of a list, a loader or a data set, without the labels that follow an image or a batch.

    Raises:
        ValueError: an item is a dictionary, in which it is unclear which entries are images.
    """
    if isinstance(images, dict):
        images = [images]
    if isinstance(images, list | tuple) and _has_labels(images):
        images = images[:1]
    for item in images:
        if isinstance(item, dict):
            keys = list(map(str, item)) or ["image"]
            raise ValueError(
                f"images: got a dictionary of {', '.join(keys)}; give the images in it: "
                f"(batch[{keys[0]!r}] for batch in images)"
            )
        if isinstance(item, list | tuple):
            yield from iterate_images(item)
        else:
            yield item


def _has_labels(item: Sequence[Any]) -> bool:
    """Whether all items after the first are classes: a single class, or one per image."""
    return len(item) > 1 and all(
        isinstance(label, int) or (is_array(label) and label.ndim < 2) for label in item[1:]
    )


# ---------------------------------------------------------------------- checks


def check_bands(bands: Sequence[int] | None, channels: int) -> None:
    """Raise a ``ValueError`` unless ``bands`` are None or three channel numbers."""
    if bands is None:
        return
    if len(bands) != 3 or not all(type(n) is int and 0 <= n < channels for n in bands):
        raise ValueError(
            f"bands: got {bands!r}; give three numbers of channels, from 0 to {channels - 1}"
        )


def _checked(images: Tensor | NDArray[Any], channels: int, argument: str, axes: int = 2) -> Tensor:
    """(B, C, H, W) or (B, C, T, H, W), detached, uint8 or float in [0, 1]."""
    remedy = layout_remedy(images, channels, argument, axes) or _type_remedy(images, argument)
    if remedy:
        raise ValueError(f"{argument}: got {_kind(images)}; {remedy}")
    if 0 in images.shape:
        raise ValueError(
            f"{argument}: got an empty batch {tuple(images.shape)}; give one image or more"
        )
    if isinstance(images, Tensor):
        pixels = images.detach()
    else:  # a copy, because arrays may be read-only, or have negative strides
        pixels = torch.from_numpy(np.array(images, order="C"))
        pixels = pixels.movedim(-1, -1 - axes)
    pixels = pixels if pixels.ndim == 2 + axes else pixels[None]
    if pixels.is_floating_point():
        _check_range(pixels, argument, isinstance(images, Tensor))
    return pixels


def _kind(images: Tensor | NDArray[Any]) -> str:
    noun = "a tensor" if isinstance(images, Tensor) else "an array"
    return f"{noun} {tuple(images.shape)} of {images.dtype}"


def layout_remedy(
    images: Tensor | NDArray[Any], channels: int, argument: str, axes: int = 2
) -> str:
    """Advice, with the call to make, on bringing images (or, with ``axes`` = 3, clips) into an accepted
    layout; empty if their layout is already accepted."""
    if axes == 3:
        return _clip_remedy(images, channels, argument)
    if isinstance(images, Tensor):
        return _tensor_remedy(tuple(images.shape), channels, argument)
    return _array_remedy(tuple(images.shape), channels, argument)


def _tensor_remedy(shape: tuple[int, ...], channels: int, name: str) -> str:
    form = f"({channels}, H, W) or (B, {channels}, H, W)"
    last = "permute(2, 0, 1)" if len(shape) == 3 else "permute(0, 3, 1, 2)"
    sizes = ", ".join(["-1"] * (len(shape) - 3) + [str(channels), "-1", "-1"])
    if len(shape) in (3, 4) and shape[-3] == channels:
        return ""
    if len(shape) in (3, 4) and shape[-1] == channels:
        return f"put channels first: {name}.{last}"
    if len(shape) in (3, 4) and shape[-3] == 1:
        return f"repeat the grey channel: {name}.expand({sizes})"
    if len(shape) in (3, 4) and shape[-3] == channels + 1:
        return f"drop the alpha channel: {name}[..., :{channels}, :, :]"
    if len(shape) in (3, 4) and shape[-1] == 1:
        return f"put channels first and repeat the grey one: {name}.{last}.expand({sizes})"
    if len(shape) in (3, 4) and shape[-1] == channels + 1:
        return f"drop the alpha channel, and put channels first: {name}[..., :{channels}].{last}"
    if len(shape) == 2:
        return f"give {form}; of a grey image (H, W): {name}.expand({channels}, -1, -1)"
    if len(shape) == 3:
        return (
            f"give {form}; of grey images (B, H, W): {name}[:, None].expand(-1, {channels}, -1, -1)"
        )
    if len(shape) == 5 and shape[2] == channels:
        return f"give {form}: {name}.flatten(0, 1)"
    return f"give {form}"


def _clip_remedy(clips: Tensor | NDArray[Any], channels: int, name: str) -> str:
    shape, tensor = tuple(clips.shape), isinstance(clips, Tensor)
    form = f"({channels}, T, H, W)" if tensor else f"(T, H, W, {channels})"
    form = f"{form} or (B, {form[1:]}"
    if len(shape) in (4, 5) and shape[-4 if tensor else -1] == channels:
        return ""
    if tensor and len(shape) in (4, 5) and shape[-3] == channels:
        return f"put channels before frames: {name}.transpose(-4, -3)"
    if tensor and len(shape) in (4, 5) and shape[-1] == channels:
        return f"put channels first: {name}.movedim(-1, -4)"
    return f"give {form}"


def _array_remedy(shape: tuple[int, ...], channels: int, name: str) -> str:
    form = f"(H, W, {channels}) or (B, H, W, {channels})"
    if len(shape) in (3, 4) and shape[-1] == channels:
        return ""
    if len(shape) in (3, 4) and shape[-3] == channels:
        last = "1, 2, 0" if len(shape) == 3 else "0, 2, 3, 1"
        return (
            f"put channels last: {name}.transpose({last}), or give a tensor: "
            f"torch.from_numpy({name})"
        )
    if len(shape) in (3, 4) and shape[-1] == 1:
        return f"repeat the grey channel: {name}.repeat({channels}, -1)"
    if len(shape) in (3, 4) and shape[-1] == channels + 1:
        return f"drop the alpha channel: {name}[..., :{channels}]"
    if len(shape) in (2, 3):
        return f"give {form}; of grey images: {name}[..., None].repeat({channels}, -1)"
    return f"give {form}"


def _type_remedy(images: Tensor | NDArray[Any], name: str) -> str:
    """The call that converts the numbers to floats in [0, 1] or bytes; empty if they already have that
    form."""
    if isinstance(images, Tensor):
        if images.is_floating_point() or images.dtype == torch.uint8:
            return ""
        as_float, as_byte = f"{name}.float()", f"{name}.to(torch.uint8)"
    else:
        if images.dtype in (np.float16, np.float32, np.float64, np.uint8):
            return ""
        as_float, as_byte = f"{name}.astype(np.float32)", f"{name}.astype(np.uint8)"
    if str(images.dtype).endswith("bool"):
        return f"give floats: {as_float}"
    if str(images.dtype).endswith("uint16"):
        return f"give floats in [0, 1]: {as_float} / 65535"
    return f"give bytes, of values in 0..255: {as_byte}"


def _check_range(pixels: Tensor, name: str, is_tensor: bool) -> None:
    low, high = (float(v) for v in pixels.aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        bad = int((~pixels.isfinite()).flatten(1).any(1).nonzero()[0])
        which = f"image {bad} " if len(pixels) > 1 else ""
        raise ValueError(
            f"{name}: {which}holds NaN or infinite values; leave it out, or clean it with "
            f"{'torch' if is_tensor else 'np'}.nan_to_num({name})"
        )
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return
    remedy = "give raw pixels in [0, 1]"
    if low >= 0 and high <= 256:
        remedy += f": {name} / 255"
    elif low < 0:
        undo = f"backbone.denormalize({name})" if is_tensor else f"{name} * std + mean"
        remedy += f", the backbone normalises them itself; if they are normalised: {undo}"
    raise ValueError(f"{name}: got values in [{low:.3g}, {high:.3g}]; {remedy}")


def _unit(pixels: Tensor) -> Tensor:
    """uint8 divided by 255, floats as float32 in [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels.float().div(255)
    return pixels.float().clamp(0, 1)
