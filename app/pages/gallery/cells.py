"""A map as a cell of the gallery's grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xattn.app import state
from xattn.app.navigation.selection import ALL, Choices, View
from xattn.app.pictures.rendering import Look, overlay_url, photo_url
from xattn.app.state import short
from xattn.pictures.explained import probability_text

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side


def cell(
    pack: Pack,
    view: View,
    choices: Choices,
    text: str,
    last: str | None,
    entry_id: str,
    row: dict[str, Any],
) -> dict[str, Any]:
    explained = short(row["target_name"])
    name = row["title"]
    number = probability_text(row["probability"], row["is_value"])
    lines = [number + (f" · {row['method']}" if view.method == ALL else "")]
    if row["label_name"]:
        lines.append(f"true: {short(row['label_name'])}")
    lines.append(name)
    for key in dict.fromkeys(
        (view.sort, view.measure if view.low is not None or view.high is not None else "")
    ):
        if key == "confidence" and row["measure:confidence"] == row["probability"]:
            continue  # it stands there already
        if key in choices.measures and key != "probability":
            lines.append(f"{choices.measures[key].name}: {_figure(key, row[f'measure:{key}'])}")
    if view.show == "photo":
        source, alt = photo_url(pack, row["image_id"], SIDE), f"Photo {name}"
    else:
        source = overlay_url(pack, entry_id, Look(side=SIDE))
        alt = f"Map by {row['method']} of {explained} on {name}"
    return {
        "id": entry_id,
        "src": source,
        "alt": alt,
        "title": explained,
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
