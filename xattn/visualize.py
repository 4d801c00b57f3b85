"""Heat maps for the eye: perceptually uniform colours, overlays, and contact sheets.

A contact sheet shows each photo beside its explanations, as one self-contained HTML page or as one
image. A :class:`Scale` says what a colour means: by default the min-maxed map in [0, 1], for a map
with negative values its own numbers on a diverging scale centred on 0; where the model did not look
the photo is dimmed and grey.
"""

from __future__ import annotations

import base64
import difflib
import functools
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from xattn.explanation import Explanation

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SEQUENTIAL, DIVERGING = "inferno", "diverging"


@functools.lru_cache(maxsize=8)
def _lut(cmap: str) -> NDArray[np.uint8]:
    """256 RGB colours of ``"diverging"`` or of a matplotlib colour map."""
    import matplotlib

    if cmap == DIVERGING:
        return _diverging()
    if cmap not in matplotlib.colormaps:
        near = difflib.get_close_matches(cmap, list(matplotlib.colormaps), 3, 0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else "; see matplotlib.colormaps"
        raise ValueError(f"cmap: no colour map {cmap!r}{hint}")
    return np.rint(matplotlib.colormaps[cmap](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _diverging() -> NDArray[np.uint8]:
    """Blue below the centre, orange above, dark at it: CIELAB lightness rises linearly to both sides.

    Dark means nothing, as in inferno, and equal amounts of both signs are equally light.
    """
    from skimage.color import lab2rgb

    at = np.linspace(-1, 1, 256)
    size = np.abs(at)
    hue = np.deg2rad(np.where(at < 0, 262, 60))
    # Grey at the centre, paler towards light, where sRGB has little colour left.
    chroma = 43 * np.minimum(3 * size, 1) * np.minimum((1.35 - size) / 0.6, 1)
    lab = np.stack([8 + 82 * size, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    return np.rint(lab2rgb(lab) * 255).astype(np.uint8)


def colorize(values: NDArray[Any], cmap: str = "inferno") -> NDArray[np.uint8]:
    """Values (..., H, W) in [0, 1] as colours (..., H, W, 3), uint8; NaN becomes black."""
    index = np.nan_to_num(np.clip(values, 0, 1)) * 255
    colours = _lut(cmap)[np.rint(index).astype(np.uint8)]
    colours[np.isnan(values)] = 0
    return colours


def overlay(
    photo: Image.Image,
    values: NDArray[Any],
    opacity: float = 0.55,
    cmap: str = SEQUENTIAL,
    threshold: float = 0.0,
) -> Image.Image:
    """A map over its photo.

    Args:
        photo: RGB, H x W pixels.
        values: (H, W) in [0, 1]; NaN outside the model's view, shown dimmed and without colour.
        opacity: 0 (photo) to 1 (map), the same everywhere so that a colour has one meaning.
        threshold: values below stay without colour, 0 to 1; on the diverging scale those nearer to
            its centre than this share of half its length.
    """
    if values.shape != (photo.height, photo.width):
        raise ValueError(
            f"values: got shape {values.shape} for a photo of {photo.height} x {photo.width}; "
            f"give View.to_photo(map, size)"
        )
    for name, share in (("opacity", opacity), ("threshold", threshold)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}; give a number from 0 to 1")
    pixels = np.asarray(photo.convert("RGB"), dtype=np.float32)
    grey = (pixels @ LUMA)[..., None]
    # Less colour of its own below the map's: grey takes its place.
    out = (1 - opacity) ** 2 * pixels
    out += opacity * (1 - opacity) * grey
    out += opacity * colorize(values, cmap)
    if threshold > 0:
        strength = np.abs(2 * values - 1) if cmap == DIVERGING else values
        # The map's values are float32: one that equals the threshold is not below it.
        out = np.where((strength < np.float32(threshold))[..., None], pixels, out)
    outside = np.isnan(values)
    if outside.any():
        out = np.where(outside[..., None], 0.35 * grey, out)
        if not outside.all():
            edge = _frame(~outside, width=max(1, round(max(photo.size) / 400)))
            out[edge] = 0.45 * out[edge] + 0.55 * 255
    return Image.fromarray(np.rint(out).clip(0, 255).astype(np.uint8))


def _frame(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The outermost ``width`` pixels of the rectangle ``inside``, at sides within the photo."""
    core = inside.copy()
    for axis in (0, 1):
        for shift in (width, -width):
            moved = np.roll(inside, shift, axis)
            rim = slice(0, shift) if shift > 0 else slice(shift, None)
            moved[(rim,) if axis == 0 else (slice(None), rim)] = True  # the photo's own border
            core &= moved
    return inside & ~core


def colour_bar(width: int = 256, height: int = 16, cmap: str = "inferno") -> Image.Image:
    """The legend: colours from 0 (left) to 1 (right)."""
    row = colorize(np.linspace(0, 1, width)[None], cmap)
    return Image.fromarray(np.repeat(row, height, axis=0))


def gradient(cmap: str = SEQUENTIAL) -> str:
    """The colour stops of a CSS ``linear-gradient``, from the lowest value to the highest."""
    return ", ".join("rgb({} {} {})".format(*_lut(cmap)[i]) for i in range(0, 256, 15))


# ---------------------------------------------------------------------- scales


@dataclass(frozen=True)
class Scale:
    """The values at the two ends of a colour scale, in the map's own unit."""

    low: float
    high: float
    cmap: str = SEQUENTIAL

    def __call__(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Values as positions in [0, 1], clipped; all nothing (0, or the centre) if the ends meet."""
        if self.high <= self.low:
            return np.full(values.shape, 0.5 if self.cmap == DIVERGING else 0.0, np.float32)
        at = (values.astype(np.float64) - self.low) / (self.high - self.low)
        return np.clip(at, 0, 1).astype(np.float32)

    @property
    def ends(self) -> tuple[str, str]:
        """Both ends as short text."""
        return f"{self.low:.3g}", f"{self.high:.3g}"


def make_scale(limits: Iterable[tuple[float, float]], cmap: str | None = None) -> Scale:
    """One scale for maps with these (least, greatest) values.

    ``cmap=None`` is inferno from the least to the greatest value, or, where one is negative, the
    diverging scale; that is always as long on both sides of 0.
    """
    pairs = list(limits)
    if not pairs or not np.isfinite(pairs).all():
        raise ValueError(f"limits: got {pairs}; give the least and the greatest value of each map")
    low, high = min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
    cmap = cmap or (DIVERGING if low < 0 else SEQUENTIAL)
    if cmap == DIVERGING:
        high = max(abs(low), abs(high))
        low = -high
    return Scale(low, high, cmap)


def own_scale(explanation: Explanation, cmap: str | None = None) -> Scale:
    """The scale of one map alone: min-max; a mask's is always [0, 1]; see :func:`make_scale`."""
    if explanation.is_mask and cmap != DIVERGING:
        return Scale(0.0, 1.0, cmap or SEQUENTIAL)
    return make_scale([(float(explanation.map.min()), float(explanation.map.max()))], cmap)


def contrast(
    explanation: Explanation, other: Explanation, raw: bool = False
) -> NDArray[np.float32]:
    """What speaks for one class rather than the other: the difference of two maps (h, w).

    Of the min-maxed maps, in [-1, 1] (where each map puts its weight), or, with ``raw``, of the
    scores themselves (which also says how strong they are).

    Raises:
        ValueError: maps of another photo, crop or size.
    """
    same = explanation.image_id == other.image_id and explanation.view == other.view
    if not same or explanation.map.shape != other.map.shape:
        raise ValueError(
            f"other: the map {other.id} is not on the grid of {explanation.id}; give two classes of "
            f"one photo, explained by one method"
        )
    if raw:
        return explanation.map - other.map
    return explanation.normalized() - other.normalized()


# ---------------------------------------------------------------------- contact sheets


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet; ``value`` in [0, 1] is drawn as a bar below it."""

    image: Image.Image
    title: str
    detail: str = ""
    value: float | None = None
    alt: str = ""


@dataclass(frozen=True)
class Row:
    """A photo and its explanations."""

    title: str
    cells: Sequence[Cell]


def sheet_rows(
    explanations: Sequence[Explanation],
    max_side: int = 480,
    opacity: float = 0.55,
    cmap: str = "inferno",
) -> list[Row]:
    """Group explanations by photo, in order of appearance: the photo first, then its overlays."""
    groups: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault(explanation.image_id, []).append(explanation)
    rows = []
    for image_id, group in groups.items():
        photo = group[0].photo(max_side)
        name = group[0].file_name or image_id
        cells = [Cell(photo, "Photo", name, alt=f"Photo {name}")]
        for e in group:
            drawn = overlay(photo, e.on_photo((photo.height, photo.width)), opacity, cmap)
            label = e.target_name.split(",")[0]
            alt = f"{e.method} map of {label} ({e.probability:.1%}) on {name}"
            cells.append(Cell(drawn, label, e.method, e.probability, alt))
        rows.append(Row(name, cells))
    return rows


def _as_rows(rows: Sequence[Row] | Sequence[Explanation], cmap: str) -> list[Row]:
    if not rows:
        raise ValueError("rows: got none; give explanations or rows of cells")
    if all(isinstance(r, Row) for r in rows):
        return list(rows)  # type: ignore[arg-type]
    return sheet_rows(rows, cmap=cmap)  # type: ignore[arg-type]


def contact_sheet_html(
    rows: Sequence[Row] | Sequence[Explanation],
    title: str = "Explanations",
    subtitle: str = "",
    table: Sequence[Sequence[object]] | None = None,
    table_title: str = "",
    notes: Sequence[str] = (),
    cmap: str = "inferno",
) -> str:
    """One HTML page with everything inside it: images, colours, light and dark.

    Args:
        rows: explanations (grouped by photo), or rows made by hand.
        table: optional figures below the pictures; the first row is the header.
        notes: paragraphs at the end.
    """
    stops = gradient(cmap)
    lines = _as_rows(rows, cmap)
    sections = "\n".join(_html_row(row) for row in lines)
    parts = [f"<h1>{_text(title)}</h1>"]
    if subtitle:
        parts.append(f'<p class="sub">{_text(subtitle)}</p>')
    parts.append(
        '<div class="legend" role="img" aria-label="Colour scale from 0, irrelevant, to 1, most '
        'relevant"><span>0</span><i></i><span>1</span><em>relevance for the named class, min-max '
        "per map; dimmed: outside the model's view</em></div>"
    )
    head = "\n".join(parts)
    foot = _html_table(table, table_title) if table else ""
    foot += "".join(f"<p>{_text(note)}</p>" for note in notes)
    columns = str(max(len(row.cells) for row in lines))
    style = _STYLE.replace("STOPS", stops).replace("COLUMNS", columns)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{_text(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<header>\n{head}\n</header>\n"
        f"<main>\n{sections}\n</main>\n<footer>{foot}</footer>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _html_row(row: Row) -> str:
    figures = []
    for cell in row.cells:
        stream = io.BytesIO()
        cell.image.convert("RGB").save(stream, "JPEG", quality=86, optimize=True)
        data = base64.b64encode(stream.getvalue()).decode("ascii")
        bar = ""
        if cell.value is not None:
            share = min(max(cell.value, 0.0), 1.0)
            bar = (
                f'<span class="p">{share:.1%}</span><span class="bar" aria-hidden="true">'
                f'<b style="width:{100 * share:.1f}%"></b></span>'
            )
        figures.append(
            f'<figure><img loading="lazy" width="{cell.image.width}" height="{cell.image.height}" '
            f'alt="{_text(cell.alt or cell.title)}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><strong>{_text(cell.title)}</strong>{bar}"
            f"<small>{_text(cell.detail)}</small></figcaption></figure>"
        )
    return f'<section aria-label="{_text(row.title)}">{"".join(figures)}</section>'


def _html_table(table: Sequence[Sequence[object]], title: str) -> str:
    header = "".join(f'<th scope="col">{_text(c)}</th>' for c in table[0])
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{_text(c)}</th>' if i == 0 else f"<td>{_text(c)}</td>"
            for i, c in enumerate(line)
        )
        + "</tr>"
        for line in table[1:]
    )
    heading = f"<h2>{_text(title)}</h2>" if title else ""
    return (
        f'{heading}<div class="scroll" tabindex="0"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


_STYLE = """
:root{--bg:#fafaf9;--card:#fff;--ink:#1c1917;--soft:#6b6560;--line:#e7e5e4;--accent:#b4441f;
--shadow:0 1px 2px #0000000d,0 4px 16px #0000000a}
@media(prefers-color-scheme:dark){:root{--bg:#141312;--card:#1e1c1b;--ink:#f0eeec;--soft:#a39c96;
--line:#33302e;--accent:#f08a4b;--shadow:none}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:clamp(16px,4vw,48px);background:var(--bg);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{margin:0;font-size:clamp(1.6rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:2.5rem 0 .75rem;font-size:1.2rem;letter-spacing:-.01em}
.sub{margin:.5rem 0 0;max-width:70ch;color:var(--soft)}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem;margin:1.25rem 0 1.75rem;
color:var(--soft);font-size:.85rem;font-variant-numeric:tabular-nums}
.legend i{width:180px;height:10px;border-radius:5px;background:linear-gradient(90deg,STOPS)}
.legend em{font-style:normal;margin-left:.5rem}
main{--gap:clamp(10px,1.5vw,18px);display:grid;gap:18px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,COLUMNS*240px),1fr))}
section{display:grid;gap:var(--gap);align-items:start;padding:var(--gap);
grid-template-columns:repeat(auto-fill,minmax(max(min(100%,130px),
(100% - (COLUMNS - 1)*var(--gap))/COLUMNS),1fr));
background:var(--card);border:1px solid var(--line);border-radius:14px;box-shadow:var(--shadow)}
figure{margin:0;min-width:0}
img{display:block;width:100%;height:auto;max-height:420px;object-fit:contain;border-radius:8px;
background:#0000000d}
figcaption{display:grid;grid-template-columns:1fr auto;gap:0 .5rem;align-items:baseline;
padding:.5rem .1rem 0;overflow-wrap:anywhere}
figcaption strong{font-weight:600;line-height:1.3}
.p{color:var(--accent);font-weight:600;font-variant-numeric:tabular-nums}
.bar{grid-column:1/-1;height:3px;margin:.35rem 0 .2rem;border-radius:2px;background:var(--line)}
.bar b{display:block;height:100%;border-radius:2px;background:var(--accent)}
small{grid-column:1/-1;color:var(--soft)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left}thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:500}footer p{max-width:75ch;color:var(--soft)}
"""


def contact_sheet_image(
    rows: Sequence[Row] | Sequence[Explanation],
    title: str = "",
    side: int = 240,
    dark: bool = False,
    cmap: str = "inferno",
) -> Image.Image:
    """The contact sheet as one RGB image: a line per photo, every picture in a square of ``side``.

    Args:
        side: pixels of a picture's longer side.
        dark: light text on a dark ground.
    """
    lines = _as_rows(rows, cmap)
    ink, soft, ground = (
        ("#f0eeec", "#a39c96", "#141312") if dark else ("#1c1917", "#6b6560", "white")
    )
    gap, text = round(side * 0.075), max(round(side * 0.07), 11)
    caption = round(text * 3.1)
    top = round(text * 3.2) if title else gap
    columns = max(len(row.cells) for row in lines)
    sizes = [[_fit(cell.image, side) for cell in row.cells] for row in lines]
    heights = [max(h for _, h in row) + caption + gap for row in sizes]
    width = gap + columns * (side + gap)
    legend = round(text * 2.4)
    sheet = Image.new("RGB", (width, top + sum(heights) + legend), ground)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, ink, _font(round(text * 1.35), bold=True))
    y = top
    for row, fitted, height in zip(lines, sizes, heights, strict=True):
        tallest = height - caption - gap
        for i, (cell, size) in enumerate(zip(row.cells, fitted, strict=True)):
            x = gap + i * (side + gap)
            picture = cell.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            left = x + (side - size[0]) // 2
            sheet.paste(picture, (left, y + tallest - size[1]))
            share = "" if cell.value is None else f"  {cell.value:.1%}"
            bold, plain = _font(text, bold=True), _font(round(text * 0.9))
            name = _shorten(cell.title, bold, side - bold.getlength(share)) + share
            draw.text((x, y + tallest + text * 0.4), name, ink, bold)
            detail = _shorten(cell.detail, plain, side)
            draw.text((x, y + tallest + text * 1.75), detail, soft, plain)
        y += height
    bar = colour_bar(side, max(text // 2, 4), cmap)
    small = _font(round(text * 0.9))
    draw.text((gap, y), "0", soft, small)
    sheet.paste(bar, (gap + text, round(y + text * 0.35)))
    draw.text((gap + side + round(text * 1.4), y), "1   relevance (min-max per map)", soft, small)
    return sheet


def _fit(image: Image.Image, side: int) -> tuple[int, int]:
    scale = side / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


@functools.lru_cache(maxsize=16)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
