"""Explain a clip: a heat map for every frame, as a pack and as a film of overlays.

Frames are decoded, explained and drawn batch by batch with OpenCV, so at most ``batch_size``
frames are ever in memory; only maps and their records grow with the clip, by 2 to 5 kB per frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from xattn.backbone import Backbone, Preprocessing
from xattn.explainers import Explainer
from xattn.explaining.passes import PreparedPhoto, explain_batch, set_up, warn_of_constant_maps
from xattn.explaining.photos import Explanations
from xattn.heads import Head
from xattn.packs.explanation import Explanation
from xattn.packs.format import OVERLAY_SIDE, VIDEO, interrupted_output, is_pack
from xattn.packs.reader import load_pack
from xattn.packs.writer import save_pack
from xattn.photos.clip import FALLBACK_FPS, Clip, open_clip, opencv_path, quiet
from xattn.photos.images import MAX_PIXELS
from xattn.photos.view import prepare
from xattn.pictures.lettering import load_font, shorten
from xattn.pictures.overlay import overlay
from xattn.runtime.files import check_output, follow_link, output_error, temporary_folder
from xattn.runtime.option_checks import Count, Share, check
from xattn.runtime.process import deferred_interrupt


class VideoExplanations(Explanations):
    """The explanations of a clip's frames.

    ``frames`` is the number of decoded frames, ``announced`` the number in the header (0 if the header has
    none), ``fps`` their rate; ``skipped`` lists what is missing.
    """

    fps: float = FALLBACK_FPS
    frames: int = 0
    announced: int = 0


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
    """Explain the frames of a clip. Arguments that are not listed here are the same as in ``explain``.

    Args:
        video: a file that OpenCV reads.
        classes: explain these classes in every frame; by default the ``top`` most probable of each frame.
        output: folder for a pack: the maps of all frames, ``overlay.mp4``, and pictures of 17 to 32
            frames spread evenly over the clip.
        max_pixels: clips with larger frames raise an error.
        overlays: whether the pack gets ``overlay.mp4`` and overlay pictures.
        every: explain only every n-th frame.
        smoothing: weight in [0, 1) of the past in an exponential moving average of the raw maps,
            ``m_t = smoothing m_{t-1} + (1 - smoothing) map_t``; it starts again for a class that was
            not explained in the previous frame.

    ``overlay.mp4`` (MPEG-4 Part 2, no sound) shows each explained frame with its most probable
    explained class, at ``fps / every``, so it lasts as long as the clip. The colours are the same as for
    photos. Frames with an odd side repeat their last row or column, because the codec needs even sides;
    frames of at least 96 x 48 pixels show the name and probability of the class.

    After an error or Ctrl-C the frames explained so far are saved as a complete pack, in ``output`` or,
    if that already holds a pack, in ``<output>-interrupted``.

    Returns:
        Explanations in frame order, named ``frame-000123`` (decoded frames are counted from 0); with
        ``output``, they are as returned by :func:`~xattn.packs.reader.load_pack`. Frames that the
        file's header announces but that cannot be decoded cause a warning and are listed in ``.skipped``.

    Raises:
        ValueError: ``video`` is not a video, has no decodable frame or frames over ``max_pixels``, or an
            argument is invalid.
        OSError: the file does not exist, or ``output`` cannot be written.
    """
    path = Path(video)
    _check(output, every, smoothing)
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
        with nullcontext() if output is None else Film(output, clip.fps / every, overlays) as film:
            try:
                for photo, group in explained:
                    if film is not None:
                        film.add(photo, group)
                    result.extend(group)
                _check_frames(clip, result)
                warn_of_constant_maps([(e, e.image_id) for e in result])
            except BaseException as error:
                if result and film is not None:
                    _save_interrupted(film, result, path.name, error)
                raise
            if film is not None:
                _save(film, result)
        result.frames = clip.decoded
    return result


def _check(output: str | Path | None, every: int, smoothing: float) -> None:
    if output is not None:
        check_output(output, is_ours=is_pack)
    check("every", every, Count)
    check("smoothing", smoothing, Share)


def _save(film: Film, result: VideoExplanations) -> None:
    """Write the pack, even if Ctrl-C is pressed meanwhile, and read it back into ``result``."""
    with deferred_interrupt() as interrupted:
        film.save(result)
    if interrupted():
        raise KeyboardInterrupt
    result[:] = load_pack(film.output)


def _save_interrupted(
    film: Film, result: VideoExplanations, name: str, error: BaseException
) -> None:
    reason = f"stopped after {result[-1].image_id} by {type(error).__name__}"
    result.skipped.append((name, reason))
    film.output = interrupted_output(film.output)
    with suppress(OSError, ValueError):  # the first error is the one to report
        film.save(result)
        warnings.warn(
            f"explain_video: {reason}; {film.output} holds what was explained",
            RuntimeWarning,
            stacklevel=3,
        )


def _explained(
    batches: Iterator[list[PreparedPhoto]],
    explain: Callable[[list[PreparedPhoto]], Iterator[Explanation]],
    smoothing: float,
) -> Iterator[tuple[Image.Image, list[Explanation]]]:
    """The picture of each frame, and its explanations with averaged maps (without the picture)."""
    past: dict[int, NDArray[np.float64]] = {}
    for batch in batches:
        found = list(explain(batch))
        count = len(found) // len(batch)
        for i, item in enumerate(batch):
            group = found[i * count : (i + 1) * count]
            now = {e.target: e.map.astype(np.float64) for e in group}
            past = {k: smoothing * past.get(k, m) + (1 - smoothing) * m for k, m in now.items()}
            maps = {k: m.astype(np.float32) for k, m in past.items()}
            assert isinstance(item.source, Image.Image)
            yield item.source, [replace(e, map=maps[e.target], source=None) for e in group]
        del batch, found, item, group  # otherwise two batches of frames would be in memory


def _batches(
    clip: Clip,
    preprocessing: Preprocessing,
    view: str,
    batch_size: int,
    every: int,
    progress: bool,
) -> Iterator[list[PreparedPhoto]]:
    total = math.ceil(clip.announced / every) or None
    batch: list[PreparedPhoto] = []
    for number, photo in tqdm(
        clip.frames(every), desc="explain", unit="frame", total=total, disable=not progress
    ):
        pixels, seen = prepare(photo, preprocessing, view)
        batch.append(PreparedPhoto(pixels, seen.check_size(), f"frame-{number:06d}", photo))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_frames(clip: Clip, result: VideoExplanations) -> None:
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


# ---------------------------------------------------------------------- the film

STILLS = 16  # a pack shows more than this many frames of a long clip, up to twice as many


class Film:
    """The film and some stills for a pack, stored in a folder beside the pack until they are complete."""

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
        self.stills: dict[int, tuple[str, Path]] = {}  # number of an explained frame -> id, picture
        self.count, self.step = 0, 1

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()
        self._stack.close()

    def add(self, photo: Image.Image, group: Sequence[Explanation]) -> None:
        """Add one frame and its explanations."""
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

    def save(self, result: Explanations) -> None:
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
        """Read the film's header back: OpenCV does not report a full disk."""
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
    """``image`` with class and probability in the lower left corner, if there is room for the text."""
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
