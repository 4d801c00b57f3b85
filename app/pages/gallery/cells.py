"""A map as a cell of the gallery's grid."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xattn.app import state
from xattn.app.navigation.selection import ALL, Choices, View
from xattn.app.pictures.rendering import Look, overlay_url, photo_url
from xattn.app.state import short
from xattn.packs.contained_files import PackError
from xattn.pictures.explained import probability_text
from xattn.pictures.overlay import STYLES
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side


def look_of(pack: Pack, view: View, entry_ids: Sequence[str]) -> Look:
    """How the view draws these maps; a shared scale is theirs."""
    shared = view.scale == "shared" and view.show != "photo"
    return Look(
        scale=view.scale,
        cmap=view.colours,
        side=SIDE,
        limits=_limits(pack, entry_ids) if shared else None,
        style=view.show if view.show in STYLES else "overlay",
        crop=view.part == "crop",
    )


def _limits(pack: Pack, entry_ids: Sequence[str]) -> tuple[float, float] | None:
    """The least and the greatest value of these maps; a map that cannot be read has none."""
    ends = []
    for entry_id in entry_ids:
        with contextlib.suppress(PackError):  # its picture says so
            found = pack.explanation(entry_id).map
            ends += [float(found.min()), float(found.max())]
    return (min(ends), max(ends)) if ends else None


def cell(
    pack: Pack,
    view: View,
    look: Look,
    choices: Choices,
    text: str,
    last: str | None,
    entry_id: str,
    row: dict[str, Any],
) -> dict[str, Any]:
    explained = short(row["target_name"])
    name, method = row["title"], method_title(row["method"])
    lines = [method] if view.method == ALL else []
    if row["label_name"] and short(row["label_name"]) != explained:
        lines.append(f"true: {short(row['label_name'])}")
    lines.append(name)
    for key in dict.fromkeys(
        (view.sort, view.measure if view.low is not None or view.high is not None else "")
    ):
        if key == "confidence" and row["measure:confidence"] == row["probability"]:
            continue  # it stands there already
        if key in choices.measures and key != "probability":
            lines.append(f"{choices.measures[key].name}: {_figure(key, row[f'measure:{key}'])}")
    photo = photo_url(pack, row["image_id"], SIDE, entry_id if look.crop else None)
    source, alt = photo, f"Photo {name}"
    if view.show != "photo":
        source = overlay_url(pack, entry_id, look)
        alt = f"Map by {method} of {explained} on {name}"
    return {
        "id": entry_id,
        "src": source,
        "bare": None if view.show == "photo" else photo,
        "alt": alt,
        "title": explained,
        "value": probability_text(row["probability"], row["is_value"]),
        "lines": lines,
        "badge": _badge(row["right"]),
        "selected": row["image_id"] == last,
        "href": state.link("image", pack=pack.id, image=row["image_id"], view=text or None),
    }


def _badge(right: Any) -> dict[str, str] | None:
    if right is True:
        return {"text": "Right", "kind": "good"}
    return {"text": "Wrong", "kind": "bad"} if right is False else None


def _figure(key: str, value: float) -> str:
    if value != value:
        return "none"
    return f"{value:.1%}" if key == "confidence" else f"{value:.3g}"
