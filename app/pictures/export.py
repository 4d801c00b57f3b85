"""Exports from the viewer: a figure with caption and provenance, and a static HTML report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL.PngImagePlugin import PngInfo

from xattn.app.pictures import rendering
from xattn.app.pictures.rendering import Look
from xattn.eval.metric_words import name_and_title, with_direction
from xattn.packs.contained_files import PackError
from xattn.packs.explanation import map_name
from xattn.pictures.contact_sheet import (
    contact_sheet_html,
    contact_sheet_image,
    contact_sheet_svg,
    sheet_rows,
)
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.packs.manifest import MetricInfo
    from xattn.packs.reader import Pack
    from xattn.photos.view import View
    from xattn.pictures.contact_sheet import Row

FORMATS = ("png", "svg")
MOST_MAPS = {"html": 200, "png": 60, "svg": 60}  # in one file
SIDE = 320  # side of a picture in a figure, in pixels
COLUMNS = 5  # columns in a figure of one photo


def figure(pack: Pack, entry_ids: Sequence[str], format: str, look: Look | None = None) -> bytes:
    """A PNG or SVG file of photos with these maps beside them, including their provenance.

    A map that cannot be read is left out, and a note says so.

    Raises:
        ValueError: the format is unknown, or there are no maps or too many.
        PackError: a map is unknown, or none can be read.
    """
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; give one of {', '.join(FORMATS)}")
    look = look or Look()
    rows, entry_ids, left_out = _rows(pack, entry_ids, format, look)
    legends = rendering.legends(pack, entry_ids, look)
    notes = [*left_out, *provenance(pack, entry_ids, look)]
    if len(rows) == 1:
        cells = rows[0].cells
        rows = [
            replace(rows[0], cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)
        ]
    if format == "svg":
        return contact_sheet_svg(
            rows, _title(pack, entry_ids), SIDE, legends=legends, notes=notes
        ).encode()
    sheet = contact_sheet_image(rows, _title(pack, entry_ids), SIDE, legends=legends, notes=notes)
    info = PngInfo()
    info.add_itxt("Description", "\n".join(notes))
    info.add_text("Software", f"xattn {pack.provenance(entry_ids[0])['xattn']}")
    stream = io.BytesIO()
    sheet.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def html(pack: Pack, entry_ids: Sequence[str], look: Look | None = None) -> str:
    """A report of these maps as one HTML page that needs no server: maps, metrics and provenance.

    A map that cannot be read is left out, and a note says so.

    Raises:
        ValueError: there are no maps or too many.
        PackError: a map is unknown, or none can be read.
    """
    look = look or Look()
    rows, entry_ids, left_out = _rows(pack, entry_ids, "html", look)
    entries = pack.entries.loc[list(entry_ids)]
    metrics = [m for m in pack.metrics if entries[m.key].notna().any()]
    table = _table(pack, entries, metrics) if metrics else None
    notes = [_note(m) for m in metrics]
    return contact_sheet_html(
        rows,
        _title(pack, entry_ids),
        f"{count_phrase(len(entries), 'map')} of {count_phrase(len(rows), 'photo')}",
        table,
        "Fidelity of each map (↑ higher is better, ↓ lower)" if table else "",
        [*left_out, *notes, *provenance(pack, entry_ids, look)],
        legends=rendering.legends(pack, entry_ids, look),
    )


def _note(metric: MetricInfo) -> str:
    """What a column measures, in plain words and as a formula."""
    name, about = (
        name_and_title(metric.key, metric.title),
        with_direction(metric.about, metric.higher_is_better),
    )
    return f"{name}. {about} {metric.formula}; protocol {metric.protocol_id}"


def _table(pack: Pack, entries: pd.DataFrame, metrics: Sequence[MetricInfo]) -> list[list[object]]:
    """The metrics of each map; the first row is the header."""
    table: list[list[object]] = [
        ["map", *(f"{m.key} {'↑' if m.higher_is_better else '↓'}" for m in metrics)]
    ]
    several = entries["image_id"].nunique() > 1
    for row in entries.to_dict("records"):
        name = f"{pack.title_of(row['method'])}, {row['target_name'].split(',')[0]}"
        if several:
            name += f", {pack.images.loc[row['image_id'], 'title']}"
        values = [row[m.key] for m in metrics]
        table.append([name, *("–" if v != v else f"{v:.4g}" for v in values)])
    return table


def _rows(
    pack: Pack, entry_ids: Sequence[str], kind: str, look: Look
) -> tuple[list[Row], list[str], list[str]]:
    """The rows of a sheet, the maps that they show, and a note for each map that cannot be read.

    Raises:
        ValueError: there are no maps or too many.
        PackError: a map is unknown, or none can be read.
    """
    if not 0 < len(entry_ids) <= MOST_MAPS[kind]:
        raise ValueError(
            f"entry_ids: got {len(entry_ids)} maps; give 1 to {MOST_MAPS[kind]} for {kind}"
        )
    photos: dict[str, Any] = {}
    explanations, kept, notes = [], [], []
    problems: list[PackError] = []
    for entry_id in entry_ids:
        try:
            explanation = pack.explanation(entry_id)
            image_id = explanation.image_id
            if image_id not in photos:
                photos[image_id] = pack.photo(image_id)
        except PackError as error:
            if entry_id not in pack.entries.index:
                raise
            entry = pack.entries.loc[entry_id]
            title = pack.images.at[entry["image_id"], "title"]
            name = map_name(pack.title_of(entry["method"]), entry["target_name"], title)
            notes.append(f"The map {name} is left out. {error}")
            problems.append(error)
            continue
        kept.append(entry_id)
        explanations.append(replace(explanation, source=photos[image_id]))
    if not explanations:
        raise problems[0]
    rows = sheet_rows(explanations, draw=lambda e, photo: rendering.draw(pack, e, photo, look))
    if look.crop:
        views = {e.image_id: e.view for e in explanations}
        rows = [_cropped(row, view) for row, view in zip(rows, views.values(), strict=True)]
    return rows, kept, notes


def _cropped(row: Row, view: View) -> Row:
    """The row with its photo, the first cell, as the model saw it."""
    photo, *maps = row.cells
    image = photo.image.crop(rendering.seen_box(view, photo.image))
    return replace(row, cells=[replace(photo, image=image), *maps])


def _title(pack: Pack, entry_ids: Sequence[str]) -> str:
    images = pack.entries.loc[list(entry_ids), "image_id"].unique()
    if len(images) > 1:
        return pack.name
    return str(pack.images.loc[images[0], "title"])


def provenance(pack: Pack, entry_ids: Sequence[str], look: Look) -> list[str]:
    """Sentences on where these maps come from and how they are drawn, without repetition."""
    methods: dict[str, dict[str, None]] = {}
    for entry_id in entry_ids:
        found = pack.provenance(entry_id)
        backbone, head = found["backbone"] or {}, found["head"] or {}
        line = f"{backbone.get('name', 'unknown network')} (sha256 {_digits(backbone)})"
        if head:
            line += f", head {head.get('name', 'unknown')} (sha256 {_digits(head)})"
        line += f", explained by xattn {found['xattn']}."
        methods.setdefault(line, {})[found["method"]] = None
    lines = [f"{', '.join(names)}: {line}" for line, names in methods.items()]
    kind = {"overlay": "with", "spotlight": "as spotlights, with"}
    drawn = f"Drawn {kind.get(look.style)} opacity {look.opacity:g}"
    if look.style == "outline":
        drawn = "Drawn as outlines of the region that holds half of each map"
    elif look.threshold and look.style == "spotlight":
        drawn += f", without light below {look.threshold:g} of the scale"
    elif look.threshold:
        drawn += f", without colour below {look.threshold:g} of the scale"
    return [*lines, f"{drawn}. Pack {pack.name}, version {pack.version}."]


def _digits(record: dict[str, Any]) -> str:
    return str(record.get("sha256", "unknown"))[:12]
