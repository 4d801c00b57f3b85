"""Draw text on photos and record its boxes: image macros, and text that does not make a photo a macro.

A macro has white capitals with a black outline at the top, the bottom or both. Other text is a
caption bar, a watermark, a date stamp or a sign. What is drawn is a pure function of (seed, index)
and the photo's size. Fonts are Pillow's default and matplotlib's DejaVu; xattn ships none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from xattn.photos.base import Data
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.pictures.lettering import wrap
from xattn.runtime.files import atomic_folder, write_json

BOXES = "boxes.json"
SMALLEST = 48  # pixels per side; on smaller photos letters would not be legible
Box = tuple[int, int, int, int]

_WHO = """my cat|the boss|nobody|your code|the printer|every monday|my brain|this guy|the intern|
grandma|the new update|my alarm clock|one does not simply|that moment when coffee|the whole team"""
_DOES = """forgets the password|is late again|wants more coffee|deletes the backup|says it works here|
walks into the meeting|reads the manual|blames the weather|orders pizza|needs a holiday|
asks for one more change|starts on friday|has no idea|wins the game|breaks production"""
_SIGNS = "exit|open|sale|stop here|parking|ticket office|no entry|museum|platform 4|coffee|taxi"
_NAMES = "photo desk|jan novak|stock image|holiday 2019|city archive|sample|press office"


class Lettered(NamedTuple):
    """An image, and for each line of text the tight box (x0, y0, x1, y1) around the pixels that may have
    changed, in whole pixels, ends excluded.

    Example:
        >>> from xattn.parts import draw_macro
        >>> from PIL import Image
        >>> lettered = draw_macro(Image.new("RGB", (128, 96)), seed=0, index=0)
        >>> lettered.image.size, len(lettered.boxes) > 0
        ((128, 96), True)
    """

    image: Image.Image
    boxes: list[Box]


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> Any:
    if name == "default":
        return ImageFont.load_default(size)
    from matplotlib.font_manager import FontProperties, findfont

    family, _, weight = name.partition(":")
    path = findfont(
        FontProperties(family=family, weight=weight or "normal"), fallback_to_default=False
    )
    return ImageFont.truetype(path, size)


def _pick(rng: np.random.Generator, text: str) -> str:
    choices = text.replace("\n", "").split("|")
    return choices[rng.integers(len(choices))]


class _Pen:
    """Draws lines of text over a photo and keeps their boxes."""

    def __init__(self, photo: Image.Image) -> None:
        if min(photo.size) < SMALLEST:
            raise ValueError(
                f"photo: got {photo.width} x {photo.height} pixels; text needs at least {SMALLEST} x "
                f"{SMALLEST}"
            )
        self.image = photo.convert("RGB")
        self.boxes: list[Box] = []

    def ink(self, layers: Sequence[tuple[Image.Image, tuple[int, int, int]]]) -> None:
        """Paint each colour on the photo through its mask ("L"); one box is recorded around all masks."""
        boxes = [box for mask, _ in layers if (box := mask.getbbox()) is not None]
        for mask, colour in layers:
            self.image.paste(colour, (0, 0), mask)
        if boxes:
            x0, y0, x1, y1 = zip(*boxes, strict=True)
            self.boxes.append((min(x0), min(y0), max(x1), max(y1)))

    def mask(self, at: tuple[float, float], text: str, font: Any, **options: Any) -> Image.Image:
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).text(at, text, fill=255, font=font, **options)
        return mask

    def panel(self, box: tuple[float, float, float, float], opacity: int = 255) -> Image.Image:
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).rectangle(box, fill=opacity)
        return mask


def _fitted(text: str, name: str, size: float, width: float, lines: int) -> tuple[Any, list[str]]:
    """The largest font up to ``size`` in which ``text`` fits into ``lines`` lines of ``width``."""
    for pixels in range(max(int(size), 6), 5, -1):
        font = _font(name, pixels)
        wrapped = wrap(text, font, width)
        if len(wrapped) <= lines and all(font.getlength(line) <= width for line in wrapped):
            break
    return font, wrapped


def draw_macro(photo: Image.Image, seed: int, index: int) -> Lettered:
    """White capitals with a black outline at the top, the bottom or both of ``photo``.

    Example:
        >>> from xattn.parts import draw_macro
        >>> from PIL import Image
        >>> draw_macro(Image.new("RGB", (128, 96)), seed=0, index=0).image.size
        (128, 96)
    """
    rng = np.random.default_rng([seed, index, 0])
    pen = _Pen(photo)
    width, height = photo.size
    where = ("top", "bottom", "both", "both")[rng.integers(4)]
    size = rng.uniform(0.10, 0.15) * height
    margin = max(round(0.03 * height), 1)
    for place in ("top", "bottom"):
        text = f"{_pick(rng, _WHO)} {_pick(rng, _DOES)}".upper()
        if where not in (place, "both"):
            continue
        font, lines = _fitted(text, "DejaVu Sans:bold", size, 0.94 * width, 2)
        stroke = max(round(font.size / 12), 1)
        step = font.size * 1.12
        top = margin if place == "top" else height - margin - step * len(lines)
        for i, line in enumerate(lines):
            at = (width / 2, top + (i + 0.5) * step)
            outline = pen.mask(at, line, font, anchor="mm", stroke_width=stroke)
            letters = pen.mask(at, line, font, anchor="mm")
            pen.ink([(outline, (0, 0, 0)), (letters, (255, 255, 255))])
    return Lettered(pen.image, pen.boxes)


def draw_text(photo: Image.Image, seed: int, index: int) -> Lettered:
    """Text on ``photo`` that does not make it a macro: a caption bar, a watermark, a date or a sign.

    Example:
        >>> from xattn.parts import draw_text
        >>> from PIL import Image
        >>> draw_text(Image.new("RGB", (128, 96)), seed=0, index=0).image.size
        (128, 96)
    """
    rng = np.random.default_rng([seed, index, 1])
    pen = _Pen(photo)
    STYLES[rng.integers(len(STYLES))](pen, rng)
    return Lettered(pen.image, pen.boxes)


def _caption(pen: _Pen, rng: np.random.Generator) -> None:
    """A sentence in a dark or light bar along an edge."""
    width, height = pen.image.size
    text = f"{_pick(rng, _WHO)} {_pick(rng, _DOES)}".capitalize()
    font, lines = _fitted(text, "default", rng.uniform(0.05, 0.08) * height, 0.9 * width, 1)
    bar = font.size * 1.7
    top = 0.0 if rng.random() < 0.3 else height - bar
    dark = rng.random() < 0.6
    ground, letters = ((0, 0, 0), (255, 255, 255)) if dark else ((255, 255, 255), (20, 20, 20))
    at = (0.05 * width, top + bar / 2)
    panel = pen.panel((0, top, width, top + bar), int(rng.integers(140, 256)))
    pen.ink([(panel, ground), (pen.mask(at, lines[0], font, anchor="lm"), letters)])


def _watermark(pen: _Pen, rng: np.random.Generator) -> None:
    """A name, half transparent, across the middle or in a corner."""
    width, height = pen.image.size
    text = _pick(rng, _NAMES)
    font, lines = _fitted(text, "default", rng.uniform(0.06, 0.16) * height, 0.8 * width, 1)
    places = ((0.5, 0.5, "mm"), (0.97, 0.95, "rs"), (0.03, 0.95, "ls"), (0.5, 0.3, "mm"))
    x, y, anchor = places[rng.integers(len(places))]
    mask = pen.mask((x * width, y * height), lines[0], font, anchor=anchor)
    if anchor == "mm" and rng.random() < 0.6:
        turn = float(rng.uniform(-30, 30))
        mask = mask.rotate(turn, Image.Resampling.BILINEAR, center=(x * width, y * height))
    opacity = rng.uniform(0.35, 0.7)
    pen.ink([(mask.point(lambda v: int(v * opacity)), (255, 255, 255))])


def _date(pen: _Pen, rng: np.random.Generator) -> None:
    """A camera's orange date in the lower right corner."""
    width, height = pen.image.size
    day, month, year = rng.integers(1, 29), rng.integers(1, 13), rng.integers(0, 25)
    font = _font("DejaVu Sans Mono:bold", max(round(rng.uniform(0.045, 0.07) * height), 6))
    at = (0.96 * width, 0.95 * height)
    text = f"{day:02d}.{month:02d}.'{year:02d}"
    pen.ink([(pen.mask(at, text, font, anchor="rs"), (255, 140, 30))])


def _sign(pen: _Pen, rng: np.random.Generator) -> None:
    """Capitals on a coloured board somewhere in the picture."""
    width, height = pen.image.size
    colours = ((200, 30, 30), (20, 60, 150), (10, 100, 50), (240, 200, 40), (245, 245, 245))
    board = colours[rng.integers(len(colours))]
    letters = (20, 20, 20) if sum(board) > 450 else (255, 255, 255)
    text = _pick(rng, _SIGNS).upper()
    size = rng.uniform(0.06, 0.11) * height
    font, lines = _fitted(text, "DejaVu Sans:bold", size, 0.5 * width, 1)
    w, h = font.getlength(lines[0]) / 2 + 0.5 * font.size, 0.8 * font.size
    x, y = rng.uniform(w, max(width - w, w)), rng.uniform(h, max(height - h, h))
    panel = pen.panel((x - w, y - h, x + w, y + h))
    pen.ink([(panel, board), (pen.mask((x, y), lines[0], font, anchor="mm"), letters)])


STYLES: tuple[Callable[[_Pen, np.random.Generator], None], ...] = (
    _caption,
    _watermark,
    _date,
    _sign,
)


# ---------------------------------------------------------------------- whole data sets


def write_lettered(
    data: Data,
    output: str | Path,
    draw: Callable[[Image.Image, int, int], Lettered] = draw_macro,
    *,
    seed: int = 0,
    worn: bool = False,
    max_pixels: int | None = MAX_PIXELS,
) -> list[Path]:
    """Write every photo of ``data`` with text drawn on it, and the text's boxes as ``boxes.json``.

    Args:
        data: see :mod:`xattn.photos.sources`.
        output: a folder that is empty or new, or an earlier output of this function.
        draw: :func:`draw_macro` or :func:`draw_text`.
        worn: make photos look as if they had been shared many times. Before text is drawn on a photo,
            its shorter side is reduced to a limit between 160 and 224 pixels if it is longer; the
            JPEG quality is between 15 and 40 instead of 95. Limit and quality depend on (seed, number).

    Returns:
        The files, in the order of the photos. ``boxes.json`` is read by ``xattn parts --evidence`` and
        by :class:`xattn.eval.annotations.Boxes`.

    Raises:
        ValueError: a photo cannot be read or is too small, or ``output`` contains other files.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from xattn.parts import write_lettered
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (128, 96)).save(folder / "a.jpg")
        >>> [path, *_] = write_lettered(folder, folder / "macros")
        >>> path.name
        '000000-a.jpg'
    """
    photos = open_photos(data)
    names = [f"{i:06d}-{PurePath(photos.name(i)).stem}.jpg" for i in range(len(photos))]
    boxes: dict[str, Any] = {}
    with atomic_folder(
        output, [*names, BOXES], lambda folder: (folder / BOXES).is_file()
    ) as folder:
        for i, name in enumerate(names):
            photo, quality = photos.load(i, max_pixels), 95
            if worn:
                rng = np.random.default_rng([seed, i, 2])
                scale = rng.integers(160, 225) / min(photo.size)
                quality = int(rng.integers(15, 41))
                if scale < 1:
                    size = (round(photo.width * scale), round(photo.height * scale))
                    photo = photo.resize(size, Image.Resampling.BICUBIC)
            lettered = draw(photo, seed, i)
            lettered.image.save(folder / name, quality=quality)
            boxes[name] = [{"class": "text", "box": list(box)} for box in lettered.boxes]
        write_json(folder / BOXES, boxes)
    return [Path(output) / name for name in names]
