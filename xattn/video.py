"""Explain a clip: a heat map for every frame, as a pack and as a film of overlays.

Frames are decoded, explained and drawn batch by batch with OpenCV, so no more than ``batch_size``
frames are ever in memory; what grows with the clip is the maps and their records, 2 to 5 kB a frame.
"""

from __future__ import annotations

import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from xattn.explaining import Explanations, Prepared, explain_batch, set_up, warn_of_blank
from xattn.packs.explanation import Explanation
from xattn.packs.format import OVERLAY_SIDE, VIDEO, check_output, interrupted_output
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.images import MAX_PIXELS
from xattn.photos.view import prepare
from xattn.pictures.lettering import load_font, shorten
from xattn.pictures.overlay import overlay
from xattn.runtime.files import follow_link, output_error, printable, temporary_folder
from xattn.runtime.interrupts import deferred_interrupt

if TYPE_CHECKING:
    from xattn.backbone import Backbone, Preprocessing
    from xattn.explainers import Explainer
    from xattn.heads import Head

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ogv .ts .mts .m2ts .3gp .mjpeg".split()
)
FALLBACK_FPS = 25.0
STILLS = 16  # a pack shows more than this many frames of a long clip, up to twice as many
RETRIES = 32  # failed reads in a row before a clip counts as cut off


class VideoExplanations(Explanations):
    """The explanations of a clip's frames.

    ``frames`` were decoded, ``announced`` stand in the header (0: it does not say), at ``fps``;
    ``skipped`` says what is missing.
    """

    fps: float = FALLBACK_FPS
    frames: int = 0
    announced: int = 0


def is_video(path: str | Path) -> bool:
    """Whether the name is that of a clip: ``.mp4``, ``.mov``, ``.avi``, ``.mkv``, ``.webm``, ..."""
    return Path(path).suffix.lower() in SUFFIXES


def explain_video(
    video: str | Path,
    backbone: Backbone,
    head: Head | None = None,
    explainer: str | Explainer | None = None,
    classes: int | str | Sequence[int | str] | None = None,
    top: int = 1,
    view: str = "whole",
    output: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_pixels: int | None = MAX_PIXELS,
    overlays: bool = True,
    progress: bool = False,
    *,
    every: int = 1,
    smoothing: float = 0.0,
) -> VideoExplanations:
    """Explain the frames of a clip; arguments not named here are those of ``explain``.

    Args:
        video: a file that OpenCV reads; rotation metadata is applied.
        classes: follow these in every frame; else each frame's ``top`` most probable, which may
            change from frame to frame.
        output: folder to write a pack to. Besides the maps of all frames it holds ``overlay.mp4``
            and pictures of 17 to 32 frames spread evenly over the clip (of all, if it has fewer).
        max_pixels: refuse clips with larger frames.
        overlays: whether the pack gets ``overlay.mp4`` and overlay pictures.
        every: explain each n-th frame.
        smoothing: weight in [0, 1) of the past in an exponential moving average of the raw maps,
            ``m_t = smoothing m_{t-1} + (1 - smoothing) map_t``, started anew for a class that was
            not explained in the frame before.

    ``overlay.mp4`` (MPEG-4 Part 2, no sound) shows the explained frames, each with its most probable
    explained class, at ``fps / every``, so that it lasts as long as the clip. It has the clip's size;
    a codec wants even sides, so the last row or column of an odd one is repeated. Colour means the
    same as for photos, the min-maxed map; with smoothing the range moves as slowly as the map. Name
    and probability are written into frames of at least 96 x 48 pixels.

    If a frame fails or Ctrl-C is pressed, the frames explained so far are written as a complete pack
    before the exception goes on; where ``output`` holds a pack already, to ``<output>-interrupted``.

    Returns:
        Explanations in the order of the frames, named ``frame-000123`` as counted from 0 while
        decoding; with ``output`` as :func:`~xattn.packs.reader.load_pack` gives them. Frames that
        the header announces and that cannot be decoded are warned about and noted in ``.skipped``.

    Raises:
        ValueError: not a video, no frame that can be decoded, frames over ``max_pixels``, or a bad
            argument.
        OSError: a missing file, or an ``output`` that cannot be written.
    """
    path = Path(video)
    if output is not None:
        check_output(output)
    if isinstance(every, bool) or every < 1:
        raise ValueError(f"every: got {every}; give 1 for each frame, 2 for every second, ...")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: got {smoothing}; give 0 (off) or more, below 1")
    with quiet(), open_clip(path, max_pixels) as clip:
        method, choose, protocol = set_up(
            backbone, head, explainer, classes, top, view, batch_size, seed
        )
        protocol["video"] = {"fps": clip.fps, "every": every, "smoothing": smoothing}
        result = VideoExplanations()
        result.fps, result.announced = clip.fps, clip.announced
        explained = _explained(
            _batches(clip, backbone.preprocessing, view, batch_size, every, progress),
            lambda batch: explain_batch(batch, backbone, method, choose, protocol),
            smoothing,
        )
        rate = clip.fps / every
        with nullcontext() if output is None else _Drafts(output, rate, overlays) as drafts:
            try:
                for photo, group in explained:
                    if drafts is not None:
                        drafts.add(photo, group)
                    result.extend(group)
                _check_frames(clip, result)
                warn_of_blank([(e, e.image_id) for e in result])
            except BaseException as error:
                if result and drafts is not None:
                    reason = f"stopped after {result[-1].image_id} by {type(error).__name__}"
                    result.skipped.append((path.name, reason))
                    drafts.output = interrupted_output(drafts.output)
                    with suppress(OSError, ValueError):  # the first error is the one to report
                        drafts.save(result)
                        warnings.warn(
                            f"explain_video: {reason}; {drafts.output} holds what was explained",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                raise
            if drafts is not None:
                with deferred_interrupt() as interrupted:
                    drafts.save(result)
                if interrupted():
                    raise KeyboardInterrupt
                result[:] = load_pack(drafts.output)
        result.frames = clip.decoded
    return result


def _explained(
    batches: Iterator[list[Prepared]],
    explain: Callable[[list[Prepared]], Iterator[Explanation]],
    smoothing: float,
) -> Iterator[tuple[Image.Image, list[Explanation]]]:
    """Frame by frame: its picture, and its explanations with averaged maps, without the picture."""
    past: dict[int, NDArray[np.float64]] = {}
    for batch in batches:
        found = list(explain(batch))
        count = len(found) // len(batch)
        for i, (*_, photo) in enumerate(batch):
            group = found[i * count : (i + 1) * count]
            now = {e.target: e.map.astype(np.float64) for e in group}
            past = {k: smoothing * past.get(k, m) + (1 - smoothing) * m for k, m in now.items()}
            maps = {k: m.astype(np.float32) for k, m in past.items()}
            assert isinstance(photo, Image.Image)
            yield photo, [replace(e, map=maps[e.target], source=None) for e in group]
        del batch, found, photo, group  # or two batches of frames would be alive


# ---------------------------------------------------------------------- reading


class _Clip:
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
                f"explain_video: {path.name} gives {self.fps:g} frames a second; "
                f"the overlay runs at {FALLBACK_FPS:g}",
                stacklevel=5,
            )
            self.fps = FALLBACK_FPS

    def frames(self, every: int) -> Iterator[tuple[int, Image.Image]]:
        """(number, RGB frame) of each n-th frame; a damaged one is passed over."""
        import cv2

        failed = 0
        while failed <= (RETRIES if self.decoded < self.announced else 0):
            if not self.capture.grab():
                failed += 1
                continue
            number, failed = self.decoded, 0
            self.decoded += 1
            if number % every == 0:
                valid, frame = self.capture.retrieve()
                if valid:
                    photo = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
                    photo.filename = self.path.name  # type: ignore[attr-defined]
                    yield number, photo


def opencv_path(path: Path, argument: str) -> str:
    """``path`` as OpenCV takes it.

    Raises:
        ValueError: a name that is not UTF-8, at which OpenCV ends the process.
    """
    text = str(path.absolute())
    if printable(text) != text:
        raise ValueError(
            f"{argument}: {path} is not a UTF-8 name, which OpenCV needs; rename the file or folder"
        )
    return text


@contextmanager
def open_clip(path: Path, max_pixels: int | None) -> Iterator[_Clip]:
    """A clip to read frames from, released when the block ends."""
    clip = _Clip(path, max_pixels)
    try:
        yield clip
    finally:
        clip.capture.release()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what OpenCV and FFmpeg print about damaged clips off the terminal; errors are raised."""
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


def _batches(
    clip: _Clip,
    preprocessing: Preprocessing,
    view: str,
    batch_size: int,
    every: int,
    progress: bool,
) -> Iterator[list[Prepared]]:
    total = math.ceil(clip.announced / every) or None
    batch: list[Prepared] = []
    for number, photo in tqdm(
        clip.frames(every), desc="explain", unit="frame", total=total, disable=not progress
    ):
        pixels, seen = prepare(photo, preprocessing, view)
        batch.append((pixels, seen.check_size(), f"frame-{number:06d}", photo))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_frames(clip: _Clip, result: VideoExplanations) -> None:
    if not result:
        raise ValueError(
            f"video: no frame of {clip.path} can be decoded, its header announces "
            f"{clip.announced}; replace the file"
        )
    if clip.decoded < clip.announced:
        reason = f"{clip.decoded} of {clip.announced} announced frames can be decoded"
        result.skipped.append((clip.path.name, reason))
        warnings.warn(
            f"explain_video: {clip.path.name}: {reason}; the file may be cut off or damaged",
            stacklevel=3,
        )


# ---------------------------------------------------------------------- writing


class _Drafts:
    """What the pack will show, kept beside it on disk while it grows: the film and some stills."""

    def __init__(self, output: str | Path, fps: float, overlays: bool) -> None:
        self.output = Path(output)
        self.overlays = overlays
        if overlays:
            opencv_path(self.output, "output")
        self.fps = max(fps, 0.01)
        if Fraction(round(self.fps * 1000), 1000).numerator > 65535:  # a limit of MPEG-4
            self.fps = float(round(self.fps))
        self._stack = ExitStack()
        self.folder = self._stack.enter_context(temporary_folder(follow_link(self.output)))
        self.film = self.folder / VIDEO
        self.writer: Any = None
        self.stills: dict[int, tuple[str, Path]] = {}  # explained frame -> its id and picture
        self.count, self.step = 0, 1

    def __enter__(self) -> _Drafts:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()
        self._stack.close()

    def add(self, photo: Image.Image, group: Sequence[Explanation]) -> None:
        """One frame and its explanations."""
        if self.count % self.step == 0:
            self._keep(photo, group[0].image_id)
        if self.overlays:
            shown = max(group, key=lambda e: e.probability)
            self._write(_caption(overlay(photo, shown.on_photo()), shown))
        self.count += 1

    def _keep(self, photo: Image.Image, image_id: str) -> None:
        if len(self.stills) == 2 * STILLS:
            self.step *= 2
            for n in [n for n in self.stills if n % self.step]:
                self.stills.pop(n)[1].unlink()
        still = self.folder / f"{image_id}.jpg"
        small = photo.copy()
        small.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE), Image.Resampling.LANCZOS)
        try:
            small.save(still, quality=95, subsampling=0)
        except OSError as error:
            raise output_error("output", self.output, error) from error
        self.stills[self.count] = image_id, still

    def _write(self, image: Image.Image) -> None:
        import cv2

        width, height = image.width + image.width % 2, image.height + image.height % 2
        if self.writer is None:
            self.writer = cv2.VideoWriter(
                opencv_path(self.film, "output"),
                cv2.VideoWriter.fourcc(*"mp4v"),
                self.fps,
                (width, height),
            )
            if not self.writer.isOpened():
                raise ValueError(
                    f"video: OpenCV cannot write MPEG-4 of {width} x {height} pixels; "
                    f"make the clip smaller, or give overlays=False"
                )
        pixels = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
        bottom, right = height - image.height, width - image.width
        self.writer.write(
            cv2.copyMakeBorder(pixels, 0, bottom, 0, right, borderType=cv2.BORDER_REPLICATE)
        )

    def save(self, result: VideoExplanations) -> None:
        """Close the film and write the pack."""
        film = None
        if self.writer is not None:
            self.writer.release()
            self._check_film()
            film = self.film
        stills = dict(self.stills.values())
        explanations = [
            replace(e, source=stills[e.image_id]) if e.image_id in stills else e for e in result
        ]
        save_pack(self.output, explanations, self.overlays, result.skipped, film)

    def _check_film(self) -> None:
        """OpenCV writes to a full disk without a word, so read the film's header."""
        import cv2

        film = cv2.VideoCapture(opencv_path(self.film, "output"))
        frames = int(film.get(cv2.CAP_PROP_FRAME_COUNT)) if film.isOpened() else 0
        film.release()
        if frames < self.count:
            raise OSError(
                f"output: the film beside {self.output} holds {frames} of {self.count} frames; "
                f"choose a folder with free space, earlier results are untouched"
            )


def _caption(image: Image.Image, explanation: Explanation) -> Image.Image:
    """Class and probability in the lower left corner, where there is room for them."""
    size = max(12, round(min(image.size) / 22))
    if image.width < 8 * size or image.height < 4 * size:
        return image
    pad = size // 2
    font = load_font(size, bold=True)
    share = f"  {explanation.probability:.1%}"
    room = image.width - 4 * pad - font.getlength(share)
    text = shorten(explanation.target_name.split(",")[0], font, room) + share
    right, top = 3 * pad + math.ceil(font.getlength(text)), image.height - 3 * pad - size
    box = Image.new("L", image.size)
    ImageDraw.Draw(box).rounded_rectangle((pad, top, right, image.height - pad), pad, fill=176)
    image.paste("black", mask=box)
    draw = ImageDraw.Draw(image)
    draw.text((2 * pad, top + pad + size / 2), text, "white", font, anchor="lm")
    return image
