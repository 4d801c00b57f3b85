"""Clips for vision-language models: which are taken, and frames at even steps over one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.photos.arrays import array_images
from xattn.photos.clip import open_clip, quiet
from xattn.photos.image_names import is_video
from xattn.runtime.stores import StorePath, is_remote
from xattn.vlm.model import OF_CLIPS, VLM, Timing


def is_clip(source: Any, vlm: VLM) -> bool:
    """Whether ``source`` is a clip: a file that is named like one, or, for a model that takes clips, an
    array (frames, H, W, 3).

    Raises:
        ValueError: a clip of a store.
    """
    if isinstance(source, str | Path | StorePath):
        if (video := is_video(str(source))) and is_remote(source, "images"):
            raise ValueError(f"images: {source} is a clip of a store; copy it here first")
        return video
    return isinstance(source, np.ndarray) and source.ndim == 4 and vlm.family in OF_CLIPS


def frames_of(
    source: Any, count: int, max_pixels: int | None, fps: float
) -> tuple[list[Image.Image], Timing]:
    """At most ``count`` frames of a clip, at even steps from the first to the last, and when they are; of a
    damaged one the next. An array is of ``fps`` frames a second.

    Raises:
        ValueError: no clip that can be read. FileNotFoundError: it is not there.
    """
    if isinstance(source, np.ndarray):
        at = _even(len(source), count)
        chosen = [image.load(max_pixels) for image in array_images(source[at])]
        return chosen, Timing((*at.tolist(),), len(source), fps)
    found, total = list[tuple[int, Image.Image]](), -1
    try:
        with quiet():
            for _ in range(2):  # again where the header knows another number than there is, or none
                with open_clip(Path(source), max_pixels) as clip:
                    known = clip.announced if total < 0 else total
                    found = list(clip.frames_at(_even(known, count).tolist()))
                    total, fps = clip.decoded, clip.fps
                if known == total:
                    break
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"images: {str(error).partition(': ')[2]}") from error
    if not found:
        raise ValueError(f"images: no frame of {source} can be decoded; replace the file")
    return [frame for _, frame in found], Timing(tuple(n for n, _ in found), total, fps)


def _even(total: int, count: int) -> NDArray[np.int64]:
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)
