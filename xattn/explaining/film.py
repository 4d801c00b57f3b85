"""The film of overlays of an explained clip, and its stills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from xattn.explaining.photos import Explanations
from xattn.packs.explanation import Explanation
from xattn.packs.format import OVERLAY_SIDE, VIDEO
from xattn.packs.writer import save_pack
from xattn.photos.clip import opencv_path
from xattn.pictures.lettering import load_font, shorten
from xattn.pictures.overlay import overlay
from xattn.runtime.files import follow_link, output_error, temporary_folder

STILLS = 16  # a pack shows more than this many frames of a long clip, up to twice as many


class Film:
    """The film and some stills for a pack, kept in a folder beside it while they grow."""

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

    def __enter__(self) -> Film:
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
    """``image`` with class and probability in the lower left corner, if there is room for them."""
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
