"""Display of explanations in a notebook: compact grids as HTML and PNG, and a map as a matplotlib figure.

With several maps per photo, each photo is a row that starts with the photo; with one map per photo,
overlays fill the rows.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from xattn.pictures.contact_sheet import Cell, Row, contact_sheet_image, labelled, sheet_rows
from xattn.pictures.explained import Explained, format_probability
from xattn.pictures.overlay import SEQUENTIAL, colorize, data_url
from xattn.pictures.scales import overlay_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 200  # longer side of a picture in pixels
COLUMNS = 4  # overlays in a row
SHOWN = 24  # largest number of maps


def png(explanations: Sequence[Explained]) -> bytes:
    """The first ``SHOWN`` maps as a PNG grid with a legend."""
    image = contact_sheet_image(_rows(explanations), side=SIDE, notes=_more(explanations))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def grid_html(explanations: Sequence[Explained]) -> str:
    """The first ``SHOWN`` maps as a grid in one HTML element that contains its pictures."""
    rows = "".join(
        f'<div style="display:flex;flex-wrap:wrap;gap:12px;margin:0 0 12px">'
        f"{''.join(_figure_html(cell) for cell in row.cells)}</div>"
        for row in _rows(explanations)
    )
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in _more(explanations))
    return f'<div class="xattn-explanations">{rows}{notes}</div>'


def figure(
    explanation: Explained, cmap: str = SEQUENTIAL, width: float = 8.0, style: str = "overlay"
) -> Figure:
    """The photo, the map over it and a colour bar, under the class and its probability.

    The figure is not registered with pyplot, so that it need not be closed, and threads may draw
    at the same time.

    Args:
        cmap: ``"diverging"`` or a matplotlib colour map.
        width: in inches.
        style: "overlay", or "outline" or "spotlight", which have no colour bar.

    Raises:
        ValueError: the photo's pixels are not available.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    photo = explanation.photo(1000)
    height = width / 2 * photo.height / photo.width + 0.9
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots(1, 2)
    pictures = photo, overlay_of(explanation, photo, cmap=cmap, style=style)
    titles = explanation.file_name or explanation.image_id, explanation.method
    for one, picture, title in zip(axes, pictures, titles, strict=True):
        one.imshow(np.asarray(picture))
        one.set_title(title, fontsize="medium")
        one.set_axis_off()
    if style == "overlay":
        colours = ListedColormap(colorize(np.linspace(0, 1, 256), cmap) / 255)
        bar = drawn.colorbar(ScalarMappable(cmap=colours), ax=axes[1], fraction=0.05, pad=0.02)
        bar.set_label("mask" if explanation.is_mask else "map, min-max")
    name = explanation.target_name.split(",")[0]
    drawn.suptitle(f"{name}: {format_probability(explanation)}")
    return drawn


def _rows(explanations: Sequence[Explained]) -> list[Row]:
    shown = list(explanations)[:SHOWN]
    photos = len({e.image_id for e in shown})
    overlays_alone = photos > 1 and photos == len(shown)
    if not overlays_alone and all(map(_has_photo, shown)):
        return sheet_rows(shown, SIDE)
    cells = [_cell(e) for e in shown]
    return [Row("", cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]


def _has_photo(explanation: Explained) -> bool:
    try:
        explanation.photo(SIDE)
    except ValueError:
        return False
    return True


def _cell(explanation: Explained) -> Cell:
    """The map over its photo, or alone if the photo is not available."""
    name = explanation.file_name or explanation.image_id
    try:
        picture = overlay_of(explanation, explanation.photo(SIDE))
    except ValueError:
        picture = Image.fromarray(colorize(explanation.normalized()))
        picture = picture.resize((SIDE, SIDE * picture.height // picture.width or 1))
    return labelled(explanation, picture, f"{name} · {explanation.method_title}")


def _figure_html(cell: Cell) -> str:
    share = "" if cell.value is None else f" {cell.value:.1%}"
    return (
        f'<figure style="margin:0;width:{SIDE}px">'
        f'<img style="max-width:100%" alt="{html.escape(cell.alt or cell.title)}" '
        f'src="{data_url(cell.image.convert("RGB"), quality=86)}">'
        f'<figcaption style="overflow-wrap:anywhere"><b>{html.escape(cell.title)}</b>{share}<br>'
        f"<small>{html.escape(cell.detail)}</small></figcaption></figure>"
    )


def _more(explanations: Sequence[Explained]) -> list[str]:
    rest = len(explanations) - SHOWN
    return [f"and {rest} more"] if rest > 0 else []
