"""Clips, read frame by frame with OpenCV."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from xattn.photos.arrays import array_images
from xattn.runtime.files import printable

FALLBACK_FPS = 25.0
RETRIES = 32  # failed reads in a row before a clip counts as cut off


class Clip:
    """An open clip: its header, and its frames one by one."""

    def __init__(self, path: Path, max_pixels: int | None) -> None:
        import cv2

        if path.is_dir():
            raise ValueError(f"video: {path} is a folder; give one clip")
        if not path.exists():
            raise FileNotFoundError(f"video: no file {path}; check the path")
        if not path.is_file():
            raise ValueError(f"video: {path} is not a file; save the clip first")
        with path.open("rb"):  # OpenCV does not say why a file cannot be read
            pass
        self.path, self.decoded = path, 0
        self.capture = cv2.VideoCapture(opencv_path(path, "video"))
        if not self.capture.isOpened():
            line = shlex.join(["ffmpeg", "-i", path.name, f"{path.stem}-converted.mp4"])
            raise ValueError(
                f"video: OpenCV cannot read {path}: not a video, cut off before its index, or "
                f"without a frame; convert it, for example {line}"
            )
        self.capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        announced = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(announced) if 0 < announced < 1e12 else 0
        width, height = (
            int(self.capture.get(key))
            for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if max_pixels is not None and width * height > max_pixels:
            raise ValueError(
                f"video: {path} has frames of {width} x {height} pixels, over "
                f"max_pixels={max_pixels}; make it smaller or raise max_pixels"
            )
        self.fps = float(self.capture.get(cv2.CAP_PROP_FPS))
        if not 0 < self.fps <= 1000:
            warnings.warn(
                f"video: {path.name} gives {self.fps:g} frames per second; it is taken to run "
                f"at {FALLBACK_FPS:g}",
                stacklevel=5,
            )
            self.fps = FALLBACK_FPS

    def frames(self, every: int) -> Iterator[tuple[int, Image.Image]]:
        """(number, RGB frame) of every n-th frame (n = ``every``); damaged frames are skipped."""
        for number in self._grabbed():
            if number % every == 0 and (photo := self._retrieved()):
                yield number, photo

    def frames_at(self, numbers: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
        """(number, RGB frame) of the frames with the given ascending ``numbers``; a damaged frame is
        replaced by the next."""
        due = 0
        for number in self._grabbed():
            if due < len(numbers) and number >= numbers[due] and (photo := self._retrieved()):
                yield number, photo
                while due < len(numbers) and numbers[due] <= number:
                    due += 1

    def _grabbed(self) -> Iterator[int]:
        """The number of each frame, in turn."""
        failed = 0
        while failed <= (RETRIES if self.decoded < self.announced else 0):
            if not self.capture.grab():
                failed += 1
                continue
            number, failed = self.decoded, 0
            self.decoded += 1
            yield number

    def _retrieved(self) -> Image.Image | None:
        """The frame that was grabbed last; None if it is damaged."""
        import cv2

        valid, frame = self.capture.retrieve()
        if not valid:
            return None
        photo = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        photo.filename = self.path.name  # type: ignore[attr-defined]
        return photo


class Frames(NamedTuple):
    """``photos`` of a clip, their frame ``numbers``, the ``total`` number of frames, and the rate
    ``fps``."""

    photos: list[Image.Image]
    numbers: tuple[int, ...]
    total: int
    fps: float


def evenly_spaced_frames(
    source: Any, count: int, max_pixels: int | None, fps: float, argument: str = "clip"
) -> Frames:
    """At most ``count`` evenly spaced frames of a file or an array (frames, H, W, 3), from the first to the
    last; a damaged frame is replaced by the next. An array has ``fps`` frames per second.

    Raises:
        ValueError: the clip cannot be read. FileNotFoundError: it does not exist.
    """
    if isinstance(source, np.ndarray):
        at = evenly_spaced(len(source), count)
        chosen = [i.load(max_pixels) for i in array_images(source[at], argument=argument)]
        return Frames(chosen, tuple(at.tolist()), len(source), fps)
    found, total = list[tuple[int, Image.Image]](), -1
    try:
        with quiet():
            for _ in range(2):  # again if the header reports a wrong number of frames, or none
                with open_clip(Path(source), max_pixels) as clip:
                    known = clip.announced if total < 0 else total
                    found = list(clip.frames_at(evenly_spaced(known, count).tolist()))
                    total, fps = clip.decoded, clip.fps
                if known == total:
                    break
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{argument}: {str(error).partition(': ')[2]}") from error
    if not found:
        raise ValueError(f"{argument}: no frame of {source} can be decoded; replace the file")
    return Frames([frame for _, frame in found], tuple(n for n, _ in found), total, fps)


def evenly_spaced(total: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """At most ``count`` evenly spaced numbers in 0..total-1, including the ends."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def opencv_path(path: Path, argument: str) -> str:
    """``path`` in the form that OpenCV accepts.

    Raises:
        ValueError: the name is not UTF-8; OpenCV would abort the process.
    """
    text = str(path.absolute())
    if printable(text) != text:
        raise ValueError(
            f"{argument}: {path} is not a UTF-8 name, which OpenCV needs; rename the file or folder"
        )
    return text


@contextmanager
def open_clip(path: Path, max_pixels: int | None) -> Iterator[Clip]:
    """Context manager that opens a clip to read frames from, and closes it when the block ends."""
    clip = Clip(path, max_pixels)
    try:
        yield clip
    finally:
        clip.capture.release()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages that OpenCV and FFmpeg print about damaged clips; errors are raised."""
    import cv2

    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    key = "OPENCV_FFMPEG_LOGLEVEL"  # read once, with the first clip of the process
    given = key in os.environ
    os.environ.setdefault(key, "-8")
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
        if not given:
            os.environ.pop(key, None)
