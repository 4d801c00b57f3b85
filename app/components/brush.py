"""A picture to paint on: a brush, rectangles and regions make a mask over its raster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xattn.app.components import component, sent


def brush(
    photo: str,
    raster: tuple[int, int],
    key: str,
    *,
    subject: str,
    aspect: float,
    mask: str,
    stamp: int,
    regions: Sequence[int],
    label: str,
    alt: str,
    said: str = "",
    on_paint: Any = None,
) -> None:
    """Show a picture that can be painted on; each stroke's end sends the whole mask.

    The arrow keys move a cursor, Enter or Space uses the tool there, [ and ] change the brush's size, E
    erases, Ctrl+Z takes the last stroke back.

    Args:
        photo: URL of the picture that lies below the paint, changed or not.
        raster: rows and columns of the mask; ``aspect``: width over height of the picture.
        subject: what the mask belongs to; with another one, earlier strokes are forgotten.
        mask: the bits of the mask that ``photo`` answers, row by row, in base64.
        stamp: has grown where the page itself changed the mask, and the picture is to follow.
        regions: label, count, label, count, ...: the raster's regions, row by row.
        label: what the whole is called by a screen reader; ``alt``: what the picture shows.
        said: read out when it changes.
        on_paint: called before the script runs again; :func:`painted` of ``key`` is the mask then.
    """
    data = {
        "photo": photo,
        "rows": raster[0],
        "columns": raster[1],
        "subject": subject,
        "aspect": aspect,
        "mask": mask,
        "stamp": stamp,
        "regions": list(regions),
        "label": label,
        "alt": alt,
        "said": said,
    }
    component("brush")(data=data, key=key, on_paint_change=on_paint or (lambda: None))


def painted(key: str) -> Any:
    """What the picture ``key`` sent, as the browser gave it, inside its ``on_paint``."""
    return sent(key, "paint")
