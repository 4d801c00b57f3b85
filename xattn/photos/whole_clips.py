"""Clips and volumes as the input (C, T, H, W) of a network that reads them whole, and folders of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.photos.arrays import array_images, is_array
from xattn.photos.clip import Frames, evenly_spaced, evenly_spaced_frames
from xattn.photos.image_names import is_volume
from xattn.photos.images import load_image
from xattn.photos.preprocessing import Preprocessing
from xattn.photos.view import View, prepare
from xattn.photos.volumes import AxialSlices
from xattn.runtime.stores import is_remote


class WholeClip(NamedTuple):
    """A clip's ``pixels`` (C, T, H, W) in [0, 1]; the T ``frames`` as pictures, to which ``view`` refers;
    and whether each is a "frame" of a clip or a "slice" of a volume."""

    pixels: Tensor
    view: View
    frames: Frames
    unit: str


def read_clip(
    clip: Any,
    preprocessing: Preprocessing,
    view: str,
    max_pixels: int | None,
    fps: float,
    name: str = "the network",
) -> WholeClip:
    """Everything that :func:`xattn.explain_clip` accepts as a clip, prepared for a network that is called
    ``name`` in messages.

    Raises:
        ValueError: the clip cannot be read. FileNotFoundError: the file does not exist.
    """
    if isinstance(clip, str | Path) and str(clip).lower().endswith(".npy"):
        clip = _saved_array(Path(clip), len(preprocessing.mean))
    frames, unit = _frames(clip, preprocessing, max_pixels, fps, name)
    return WholeClip(*_pixels(clip, frames, preprocessing, view, name), frames, unit)


def _saved_array(path: Path, channels: int) -> Any:
    """The array of a .npy file; as a tensor if its first axis, and not its last, is that of channels."""
    if not path.is_file():
        raise FileNotFoundError(f"clip: no file {path}; check the path")
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"clip: {path} is not an array ({error}); write it with numpy.save"
        ) from None
    if values.ndim == 4 and values.shape[0] == channels != values.shape[-1]:
        return torch.from_numpy(values)
    return values


def _frames(
    clip: Any, preprocessing: Preprocessing, max_pixels: int | None, fps: float, name: str
) -> tuple[Frames, str]:
    """T frames, and whether each is a "frame" of a clip or a "slice" of a volume."""
    count, unit = preprocessing.places[0], "frame"
    channels = len(preprocessing.mean)
    if isinstance(clip, Tensor):
        _check_tensor(clip, channels)
        at = evenly_spaced(clip.shape[1], count)
        chosen = array_images(clip.movedim(1, 0)[at], channels, "clip")
        photos = [image.load(max_pixels) for image in chosen]
        found = Frames(photos, tuple(at.tolist()), clip.shape[1], fps)
    elif isinstance(clip, list | tuple) or is_volume(clip):
        unit = "slice" if is_volume(clip) else unit
        whole: Any = AxialSlices(clip) if is_volume(clip) else clip
        if not len(whole):
            raise ValueError("clip: got an empty list; give one photo or more")
        at = evenly_spaced(len(whole), count)
        load = whole.load if is_volume(clip) else lambda i, most: _photo(clip[i], channels, most)
        names = [whole.numbers[i] for i in at] if is_volume(clip) else at.tolist()
        found = Frames([load(int(i), max_pixels) for i in at], tuple(names), len(whole), fps)
    elif isinstance(clip, str | Path) and is_remote(clip, "clip"):
        raise ValueError(f"clip: {clip} is in a store; copy it here first")
    elif isinstance(clip, str | Path | np.ndarray):
        if isinstance(clip, np.ndarray):
            clip = clip[..., None] if channels == 1 and clip.ndim == 3 else clip
            if clip.ndim != 4 or not len(clip):
                raise ValueError(f"clip: got an array {clip.shape}; give (frames, H, W, 3)")
            if channels == clip.shape[-1] == 1:
                clip = np.broadcast_to(clip, (*clip.shape[:3], 3))
        found = evenly_spaced_frames(clip, count, max_pixels, fps)
    else:
        raise ValueError(
            f"clip: got a {type(clip).__name__}; give a file, a list of photos, an array (frames, H, W, 3) "
            f"or a tensor (C, T, H, W)"
        )
    if len({photo.size for photo in found.photos}) > 1:
        raise ValueError("clip: its photos have several sizes; give frames of one size")
    here = len(found.photos)
    if here < count:
        warnings.warn(
            f"clip: has {here} {unit}{'s' * (here > 1)} and {name} reads {count}; they are repeated",
            stacklevel=4,
        )
        at = np.linspace(0, here - 1, count).round().astype(int)
        photos, numbers = [found.photos[i] for i in at], tuple(found.numbers[i] for i in at)
        found = found._replace(photos=photos, numbers=numbers)
    return found, unit


def _photo(frame: Any, channels: int, max_pixels: int | None) -> Image.Image:
    """A frame from a list, with the network's number of channels, or three."""
    if is_array(frame):
        rgb = frame.ndim == 3 and frame.shape[0 if isinstance(frame, Tensor) else -1] == 3
        (frame,) = array_images(frame, 3 if rgb else channels, "clip")
    return load_image(frame, max_pixels)


def _check_tensor(clip: Tensor, channels: int) -> None:
    if clip.ndim != 4 or clip.shape[0] != channels or not clip.numel():
        remedy = f"give one clip ({channels}, T, H, W) in [0, 1]"
        if clip.ndim == 4 and clip.shape[1] == channels:
            remedy = "put channels before frames: clip.transpose(0, 1)"
        raise ValueError(f"clip: got a tensor {tuple(clip.shape)}; {remedy}")


def _pixels(
    clip: Any, frames: Frames, preprocessing: Preprocessing, view: str, name: str
) -> tuple[Tensor, View]:
    """The network's input (C, T, H, W), and the part of each frame that it shows."""
    channels, size = len(preprocessing.mean), preprocessing.input_size
    if isinstance(clip, Tensor) and tuple(clip.shape[2:]) == tuple(size):
        at = torch.tensor(frames.numbers, device="cpu")
        values = clip.detach().cpu()[:, at]
        values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        return values, View("tensor", size, size, (0, 0, *size), size)
    if channels not in (1, 3):
        raise ValueError(
            f"clip: {name} reads {channels} channels; give a tensor ({channels}, T, {size[0]}, "
            f"{size[1]})"
        )
    prepared = [prepare(photo, preprocessing, view) for photo in frames.photos]
    return torch.stack([pixels for pixels, _ in prepared], 1), prepared[0][1].check_size()
