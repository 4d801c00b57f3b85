"""Clips for vision-language models: which sources are clips, and evenly spaced frames of a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.photos.clip import evenly_spaced_frames
from xattn.photos.image_names import is_video
from xattn.runtime.stores import StorePath, is_remote
from xattn.vlm.model import OF_CLIPS, VLM, Timing


def is_clip(source: Any, vlm: VLM) -> bool:
    """Whether ``source`` is a clip: a file with a clip's suffix or, for a model that takes clips, an
    array (frames, H, W, 3).

    Raises:
        ValueError: ``source`` is a clip in a store.
    """
    if isinstance(source, str | Path | StorePath):
        if (video := is_video(str(source))) and is_remote(source, "images"):
            raise ValueError(
                f"images: {source} is a clip in a store; copy it to a local folder first"
            )
        return video
    return isinstance(source, np.ndarray) and source.ndim == 4 and vlm.family in OF_CLIPS


def frames_of(
    source: Any, count: int, max_pixels: int | None, fps: float
) -> tuple[list[Image.Image], Timing]:
    """At most ``count`` evenly spaced frames of a clip, from the first to the last, and their times; a
    damaged frame is replaced by the next. An array has ``fps`` frames per second.

    Raises:
        ValueError: the clip cannot be read. FileNotFoundError: it does not exist.
    """
    found = evenly_spaced_frames(source, count, max_pixels, fps, "images")
    return found.photos, Timing(found.numbers, found.total, found.fps)
