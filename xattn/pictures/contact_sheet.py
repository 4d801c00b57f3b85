"""Contact sheets: each photo beside its explanations, as one HTML page, one image or one SVG.

Each picture is labelled with its class and method; legends explain the colours, and notes give the origin
of the maps. The HTML page and the SVG need no other files.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from xattn.pictures.design import DARK, FONT, LEGENDS, LIGHT, VARIABLES
from xattn.pictures.explained import Explained, format_probability
from xattn.pictures.lettering import load_font, shorten, wrap
from xattn.pictures.overlay import SEQUENTIAL, colour_bar, data_url, gradient, line_sample
from xattn.pictures.scales import OUTLINE, Legend, Scale, legend_of, overlay_of


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
    explanations: Sequence[Explained],
    max_side: int = 480,
    opacity: float = 0.55,
    cmap: str = SEQUENTIAL,
    draw: Callable[[Any, Image.Image], Image.Image] | None = None,
    style: str = "overlay",
) -> list[Row]:
    """Group explanations by photo, in order of appearance: the photo first, then its overlays.

    ``draw`` replaces the default, :func:`~xattn.pictures.scales.overlay_of` in ``cmap`` and ``style``.
    """
    groups: dict[str, list[Explained]] = {}
    for explanation in explanations:
        groups.setdefault(explanation.image_id, []).append(explanation)
    rows = []
    for image_id, group in groups.items():
        photo = group[0].photo(max_side)
        name = group[0].file_name or image_id
        cells = [Cell(photo, "Photo", name, alt=f"Photo {name}")]
        for e in group:
            drawn = draw(e, photo) if draw else overlay_of(e, photo, opacity, cmap, style)
            cells.append(labelled(e, drawn, e.method_title))
        rows.append(Row(name, cells))
    return rows


def labelled(explanation: Explained, drawn: Image.Image, detail: str) -> Cell:
    """A drawn map with its class and probability; a value that is not a probability becomes part of the
    detail."""
    e, label, name = explanation, explanation.target_name.split(",")[0], explanation.file_name
    alt = f"{e.method} map of {label} ({format_probability(e)}) on {name or e.image_id}"
    if e.is_value:
        return Cell(drawn, label, f"{format_probability(e)} · {detail}", None, alt)
    return Cell(drawn, label, detail, e.probability, alt)


def _as_rows(
    rows: Sequence[Row] | Sequence[Explained], cmap: str, style: str = "overlay"
) -> list[Row]:
    if not rows:
        raise ValueError("rows: got none; give explanations or rows of cells")
    if all(isinstance(r, Row) for r in rows):
        return list(rows)  # type: ignore[arg-type]
    return sheet_rows(rows, cmap=cmap, style=style)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- HTML


def contact_sheet_html(
    rows: Sequence[Row] | Sequence[Explained],
    title: str = "Explanations",
    subtitle: str = "",
    table: Sequence[Sequence[object]] | None = None,
    table_title: str = "",
    notes: Sequence[str] = (),
    cmap: str = SEQUENTIAL,
    legends: Sequence[Legend] | None = None,
    style: str = "overlay",
) -> str:
    """One self-contained HTML page: images, colours, light and dark theme.

    Args:
        rows: explanations (grouped by photo), or rows made by hand.
        table: optional figures below the pictures; the first row is the header.
        notes: paragraphs at the end.
        legends: what the colours mean, if they do not show the min-maxed map in ``cmap``.
        style: style of maps given as explanations: "overlay", "outline" or "spotlight".
    """
    lines = _as_rows(rows, cmap, style)
    sections = "\n".join(_html_row(row) for row in lines)
    parts = [f"<h1>{_text(title)}</h1>"]
    if subtitle:
        parts.append(f'<p class="sub">{_text(subtitle)}</p>')
    parts.append(legends_html(_legends(legends, cmap, style)))
    head = "\n".join(parts)
    foot = _html_table(table, table_title) if table else ""
    foot += "".join(f"<p>{_text(note)}</p>" for note in notes)
    columns = str(max(len(row.cells) for row in lines))
    style = _STYLE.replace("COLUMNS", columns)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{_text(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<header>\n{head}\n</header>\n"
        f"<main>\n{sections}\n</main>\n<footer>{foot}</footer>\n</body>\n</html>\n"
    )


def _legends(legends: Sequence[Legend] | None, cmap: str, style: str) -> Sequence[Legend]:
    if legends is not None:
        return legends
    legend = legend_of(Scale(0, 1), style=style)
    return [replace(legend, cmap=cmap) if style == "overlay" else legend]


def legends_html(legends: Sequence[Legend]) -> str:
    """HTML for the colour bars, with end labels and meaning, in elements of class ``legend``."""
    return "".join(map(_legend_html, legends))


def _legend_html(legend: Legend) -> str:
    if legend.cmap == OUTLINE:
        bar = '<i class="line" role="img" aria-label="Line"></i>'
    else:
        low, high = _text(legend.low), _text(legend.high)
        bar = (
            f'<span>{low}</span><i role="img" aria-label="Colours from {low} to {high}" '
            f'style="background:linear-gradient(90deg,{gradient(legend.cmap)})"></i>'
            f"<span>{high}</span>"
        )
    return f'<div class="legend">{bar}<em>{_text(legend.text)}</em></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _html_row(row: Row) -> str:
    figures = []
    for cell in row.cells:
        bar = ""
        if cell.value is not None:
            share = min(max(cell.value, 0.0), 1.0)
            bar = (
                f'<span class="p">{share:.1%}</span><span class="bar" aria-hidden="true">'
                f'<b style="width:{100 * share:.1f}%"></b></span>'
            )
        figures.append(
            f'<figure><img loading="lazy" width="{cell.image.width}" height="{cell.image.height}" '
            f'alt="{_text(cell.alt or cell.title)}" src="{_data_url(cell.image)}">'
            f"<figcaption><strong>{_text(cell.title)}</strong>{bar}"
            f"<small>{_text(cell.detail)}</small></figcaption></figure>"
        )
    return f'<section aria-label="{_text(row.title)}">{"".join(figures)}</section>'


def _data_url(image: Image.Image) -> str:
    return data_url(image.convert("RGB"), quality=86, optimize=True)


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


_STYLE = (
    f":root{{color-scheme:light dark;{VARIABLES}}}{LEGENDS}"
    f"body{{font:16px/1.5 {FONT}}}"
    """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:clamp(16px,4vw,48px);background:var(--ground);
color:var(--text)}
h1{margin:0;font-size:clamp(1.6rem,4vw,2.4rem);line-height:1.15;letter-spacing:-.02em}
h2{margin:2.5rem 0 .75rem;font-size:1.2rem;letter-spacing:-.01em}
.sub{margin:.5rem 0 0;max-width:70ch;color:var(--quiet)}
header .legend{margin:1.25rem 0 1.75rem}
header .legend+.legend{margin-top:-1.25rem}
main{--space:clamp(10px,1.5vw,18px);display:grid;gap:18px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(100%,COLUMNS*240px),1fr))}
section{display:grid;gap:var(--space);align-items:start;padding:var(--space);
grid-template-columns:repeat(auto-fill,minmax(max(min(100%,130px),
(100% - (COLUMNS - 1)*var(--space))/COLUMNS),1fr));
background:var(--panel);border:1px solid var(--line);border-radius:var(--corner-large)}
figure{margin:0;min-width:0}
img{display:block;width:100%;height:auto;max-height:420px;object-fit:contain;border-radius:var(--corner);
background:#0000000d}
figcaption{display:grid;grid-template-columns:1fr auto;gap:0 .5rem;align-items:baseline;
padding:.5rem .1rem 0;overflow-wrap:anywhere}
figcaption strong{font-weight:600;line-height:1.3}
.p{color:var(--accent);font-weight:600;font-variant-numeric:tabular-nums}
.bar{grid-column:1/-1;height:3px;margin:.35rem 0 .2rem;border-radius:2px;background:var(--line)}
.bar b{display:block;height:100%;border-radius:2px;background:var(--accent)}
small{grid-column:1/-1;color:var(--quiet)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child{text-align:left}thead th{color:var(--quiet);font-weight:600}
tbody th{font-weight:500}footer p{max-width:75ch;color:var(--quiet)}
"""
)


# ---------------------------------------------------------------------- image and SVG

PAPER = replace(LIGHT, ground="#ffffff")


class _Line(NamedTuple):
    """A line of text whose top left corner is at (x, y)."""

    x: float
    y: float
    text: str
    size: int
    soft: bool = False
    bold: bool = False


class _Picture(NamedTuple):
    """An image in a box."""

    x: int
    y: int
    size: tuple[int, int]
    image: Image.Image
    alt: str = ""


class _Sheet(NamedTuple):
    size: tuple[int, int]
    items: list[_Line | _Picture]


def _lay_out(
    lines: Sequence[Row],
    title: str,
    side: int,
    legends: Sequence[Legend],
    notes: Sequence[str],
) -> _Sheet:
    """The positions of all items: there is one line per photo, and every picture is in a square of ``side``
    pixels."""
    gap, text = round(side * 0.075), max(round(side * 0.07), 11)
    small = round(text * 0.9)
    caption = round(text * 3.1)
    columns = max(len(row.cells) for row in lines)
    width = gap + columns * (side + gap)
    items: list[_Line | _Picture] = []
    y = gap
    if title:
        large = round(text * 1.35)
        name = shorten(title, load_font(large, bold=True), width - 2 * gap)
        items.append(_Line(gap, gap, name, large, bold=True))
        y = round(text * 3.2)
    for row in lines:
        sizes = [_fit(cell.image, side) for cell in row.cells]
        tallest = max(height for _, height in sizes)
        for i, (cell, size) in enumerate(zip(row.cells, sizes, strict=True)):
            x = gap + i * (side + gap)
            left = x + (side - size[0]) // 2
            alt = cell.alt or cell.title
            items.append(_Picture(left, y + tallest - size[1], size, cell.image, alt))
            share = "" if cell.value is None else f"  {cell.value:.1%}"
            bold = load_font(text, bold=True)
            name = shorten(cell.title, bold, side - bold.getlength(share)) + share
            items.append(_Line(x, y + tallest + text * 0.4, name, text, bold=True))
            detail = shorten(cell.detail, load_font(small), side)
            items.append(_Line(x, y + tallest + text * 1.75, detail, small, soft=True))
        y += tallest + caption + gap
    for legend in legends:
        y = _lay_legend(items, legend, gap, y, min(side, width // 3), text, width - gap)
    for note in notes:
        y = _lay_words(items, note, gap, y, text, width - 2 * gap)
    return _Sheet((width, y + round(text * 0.9)), items)


def _lay_legend(
    items: list[_Line | _Picture],
    legend: Legend,
    left: int,
    y: int,
    length: int,
    text: int,
    right: int,
) -> int:
    small = round(text * 0.9)
    font = load_font(small)
    items.append(_Line(left, y, legend.low, small, soft=True))
    x = left + round(font.getlength(legend.low) + text * 0.4)
    height = max(text // 2, 4)
    if legend.cmap == OUTLINE:
        length //= 4
        bar = line_sample(length, height)
    else:
        bar = colour_bar(length, height, legend.cmap)
    items.append(_Picture(x, round(y + text * 0.35), bar.size, bar, "Colour scale"))
    x += length + round(text * 0.4)
    items.append(_Line(x, y, legend.high, small, soft=True))
    x += round(font.getlength(legend.high) + text)
    if font.getlength(legend.text) > right - x:  # below the bar, over the whole width
        x = left
        y += round(text * 1.4)
    return _lay_words(items, legend.text, x, y, text, right - x) + round(text * 0.2)


def _lay_words(
    items: list[_Line | _Picture], words: str, x: float, y: int, text: int, width: float
) -> int:
    """Add lines of at most ``width`` pixels, with longer words cut; returns the y below them."""
    small = round(text * 0.9)
    font = load_font(small)
    for line in wrap(words, font, width):
        items.append(_Line(x, y, shorten(line, font, width), small, soft=True))
        y += round(text * 1.4)
    return y


def contact_sheet_image(
    rows: Sequence[Row] | Sequence[Explained],
    title: str = "",
    side: int = 240,
    dark: bool = False,
    cmap: str = SEQUENTIAL,
    legends: Sequence[Legend] | None = None,
    notes: Sequence[str] = (),
    style: str = "overlay",
) -> Image.Image:
    """The contact sheet as one RGB image, with one line per photo and every picture in a square of ``side``
    pixels.

    Args:
        side: longer side of a picture in pixels.
        dark: light text on a dark background.
        legends: what the colours mean, if they do not show the min-maxed map in ``cmap``.
        notes: paragraphs below.
        style: style of maps given as explanations: "overlay", "outline" or "spotlight".
    """
    colours = DARK if dark else PAPER
    laid = _lay_out(_as_rows(rows, cmap, style), title, side, _legends(legends, cmap, style), notes)
    sheet = Image.new("RGB", laid.size, colours.ground)
    draw = ImageDraw.Draw(sheet)
    for item in laid.items:
        if isinstance(item, _Picture):
            picture = item.image.convert("RGB").resize(item.size, Image.Resampling.LANCZOS)
            sheet.paste(picture, (item.x, item.y))
        else:
            ink = colours.quiet if item.soft else colours.text
            draw.text((item.x, item.y), item.text, ink, load_font(item.size, bold=item.bold))
    return sheet


def contact_sheet_svg(
    rows: Sequence[Row] | Sequence[Explained],
    title: str = "",
    side: int = 240,
    cmap: str = SEQUENTIAL,
    legends: Sequence[Legend] | None = None,
    notes: Sequence[str] = (),
    style: str = "overlay",
) -> str:
    """:func:`contact_sheet_image` as SVG, in which text stays text and pictures keep their own pixels."""
    laid = _lay_out(_as_rows(rows, cmap, style), title, side, _legends(legends, cmap, style), notes)
    width, height = laid.size
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" font-family="DejaVu Sans, Verdana, sans-serif">',
        f"<title>{_xml(title or 'Explanations')}</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER.ground}"/>',
    ]
    for item in laid.items:
        if isinstance(item, _Picture):
            parts.append(
                f'<image x="{item.x}" y="{item.y}" width="{item.size[0]}" height="{item.size[1]}" '
                f'preserveAspectRatio="none" href="{_data_url(item.image)}">'
                f"<title>{_xml(item.alt)}</title></image>"
            )
        elif item.text:
            ink = PAPER.quiet if item.soft else PAPER.text
            weight = ' font-weight="bold"' if item.bold else ""
            # Pillow draws from the top of the letters, SVG from the baseline.
            parts.append(
                f'<text x="{item.x:g}" y="{item.y + 0.93 * item.size:g}" font-size="{item.size}" '
                f'fill="{ink}"{weight} xml:space="preserve">{_xml(item.text)}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])


def _xml(value: str) -> str:
    """``value`` as XML text, without control characters, which XML does not allow even escaped."""
    kept = "".join(c for c in value if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff"))
    return html.escape(kept.encode("utf-8", "replace").decode("utf-8"))


def _fit(image: Image.Image, side: int) -> tuple[int, int]:
    scale = side / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)
