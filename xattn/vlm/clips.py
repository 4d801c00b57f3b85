"""Clips for vision-language models: which are taken, and frames at even steps over one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.photos.arrays import array_images
from xattn.photos.clip import FALLBACK_FPS, open_clip, quiet
from xattn.photos.image_names import is_video
from xattn.vlm.model import Timing


def is_clip(source: Any) -> bool:
    """Whether ``source`` is a clip: a file that is named like one, or an array (frames, H, W, 3)."""
    if isinstance(source, str | Path):
        return is_video(source)
    return isinstance(source, np.ndarray) and source.ndim == 4


def frames_of(source: Any, count: int, max_pixels: int | None) -> tuple[list[Image.Image], Timing]:
    """At most ``count`` frames of a clip, at even steps from the first to the last, and when they are.

    Raises:
        ValueError: no clip that can be read. FileNotFoundError: it is not there.
    """
    found, step, fps = list[tuple[int, Image.Image]](), 1, FALLBACK_FPS
    if isinstance(source, np.ndarray):
        found = [(i, x.load(max_pixels)) for i, x in enumerate(array_images(source))]
        total = len(found)
    else:
        try:
            with quiet(), open_clip(Path(source), max_pixels) as clip:
                frames = clip.frames(max(clip.announced // (2 * count), 1))
                for i, frame in enumerate(frames):
                    found += [frame] if i % step == 0 else []
                    if len(found) > 4 * count:  # the header knows nothing, or too little
                        found, step = found[::2], 2 * step
                total, fps = clip.decoded, clip.fps
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"images: {str(error).partition(': ')[2]}") from error
    if not found:
        raise ValueError(f"images: no frame of {source} can be decoded; replace the file")
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    numbers = tuple(found[i][0] for i in places)
    return [found[i][1] for i in places], Timing(numbers, total, fps)
