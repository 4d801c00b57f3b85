"""Some photos of the map as a grid, page by page, with what they have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.navigation import last_view, selection
from xattn.app.pages.photomap import data
from xattn.app.pictures.rendering import Look, overlay_url, photo_url
from xattn.app.state import plain, short
from xattn.eval.report.mistakes import accuracy

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side
SHOWN = 24  # photos of a page


def photos_grid(
    pack: Pack,
    rows: Sequence[int],
    method: str,
    key: str,
    label: str,
    note: Callable[[int], str] | None = None,
) -> None:
    """A page of these photos, with the maps by ``method``; a press opens the photo.

    Args:
        rows: places of photos of the map; ``note``: a line for the n-th of them.
    """
    of = f"{key}.page"
    pages = -(-len(rows) // SHOWN)
    number = min(st.session_state.get(of, 0), pages - 1)
    start = number * SHOWN
    shown = data.photos(pack, method).loc[list(rows[start : start + SHOWN])]
    cells = [
        _cell(pack, found, method, note(start + i) if note else "")
        for i, found in enumerate(shown.to_dict("records"))
    ]
    grid(cells, key, label=label, width=130, on_open=lambda: _open(pack, key))
    if pages > 1:
        bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
        for text, by in (("Previous", -1), ("Next", 1)):
            bar.button(
                text,
                key=f"{key}.{text}",
                on_click=_turn,
                args=(of, number + by),
                disabled=not 0 <= number + by < pages,
            )
        bar.caption(f"{start + 1:,} to {start + len(shown):,} of {len(rows):,}", width="content")


def _turn(of: str, number: int) -> None:
    st.session_state[of] = number


def _cell(pack: Pack, found: dict[str, Any], method: str, note: str) -> dict[str, Any]:
    image_id, entry_id, right = found["image_id"], found["entry_id"], found["right"]
    predicted, label = found["predicted_name"], found["label_name"]
    sure = "" if found["confidence"] != found["confidence"] else f"  {found['confidence']:.1%}"
    title = f"{short(predicted)}{sure}" if predicted else str(found["title"])
    look = Look(side=SIDE)
    return {
        "id": image_id,
        "src": overlay_url(pack, entry_id, look) if entry_id else photo_url(pack, image_id, SIDE),
        "alt": f"Map by {method} on {found['title']}" if entry_id else f"Photo {found['title']}",
        "title": title,
        "lines": [*filter(None, [note, f"true: {short(label)}" if label else ""]), found["title"]],
        "badge": None
        if right is None
        else {"text": "Right" if right else "Wrong", "kind": "good" if right else "bad"},
        "href": state.link("image", pack=pack.id, image=image_id),
    }


def _open(pack: Pack, key: str) -> None:
    opened = sent(key, "open")
    if isinstance(opened, str) and selection.table(pack).image(opened) is not None:
        state.go("image", image=opened)


def summary(pack: Pack, rows: Sequence[int], method: str) -> str:
    """What these photos have in common, as Markdown."""
    images = data.photos(pack, method).loc[list(rows)]
    parts = ["1 photo" if len(rows) == 1 else f"{len(rows):,} photos"]
    predicted = sorted(name for name in data.texts(images["predicted_name"]) if name)
    if predicted:
        name, most = Counter(predicted).most_common(1)[0]
        parts.append(plain(f"{most / len(rows):.0%} predicted as {short(name)}"))
    known = np.array([float(v) for v in data.verdicts(images["right"]) if v is not None])
    if len(known):
        right = accuracy(known)
        sure = f" (95 % interval {right.lo:.0%} to {right.hi:.0%})" if len(known) > 1 else ""
        parts.append(f"{right.mean:.0%} told right{sure}")
    return ", ".join(parts) + "."


def class_button(pack: Pack, rows: Sequence[int], method: str, key: str) -> None:
    """The way to the gallery: all photos of the class that most of these are predicted as."""
    choices = selection.table(pack).choices
    found = Counter(data.texts(data.photos(pack, method).loc[list(rows), "predicted"]))
    found.pop(None, None)
    if not found:
        return
    key_of_class = min(found, key=lambda key: (-found[key], choices.predicted[str(key)]))
    name = choices.predicted[str(key_of_class)]
    view = selection.View(method=method, predicted=(str(key_of_class),))

    def go() -> None:
        last_view.remember(pack, selection.to_text(view, choices))
        state.go("gallery", **view.params(choices))

    st.button(plain(f"All predicted as {short(name)}, in the gallery"), key=key, on_click=go)
