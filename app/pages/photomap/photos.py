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
        rows: places in ``Pack.images``; ``note``: a line for the n-th of them.
    """
    of = f"{key}.page"
    pages = -(-len(rows) // SHOWN)
    number = min(st.session_state.get(of, 0), pages - 1)
    start = number * SHOWN
    shown = list(rows[start : start + SHOWN])
    entries = entries_by_photo(pack, method, shown)
    names = pack.images.index
    cells = [
        _cell(pack, row, entries.get(names[row]), method, note(start + i) if note else "")
        for i, row in enumerate(shown)
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


def entries_by_photo(pack: Pack, method: str, rows: Sequence[int]) -> dict[str, str]:
    """The method's map of the most probable class of each of these photos."""
    entries, names = pack.entries, pack.images.index[list(rows)]
    own = entries[entries["image_id"].isin(names) & (entries["method"] == method)]
    first = own.sort_values("probability", ascending=False, kind="stable")
    first = first.drop_duplicates("image_id")
    return dict(zip(first["image_id"], first.index, strict=True))


def _cell(pack: Pack, row: int, entry_id: str | None, method: str, note: str) -> dict[str, Any]:
    found, image_id = pack.images.iloc[row], str(pack.images.index[row])
    (right,) = data.verdicts(found[["right"]])
    predicted, label = data.texts(found[["predicted_name", "label_name"]])
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
    if isinstance(opened, str) and opened in pack.images.index:
        state.go("image", image=opened)


def summary(pack: Pack, rows: Sequence[int]) -> str:
    """What these photos have in common, as Markdown."""
    images = pack.images.iloc[list(rows)]
    parts = ["1 photo" if len(rows) == 1 else f"{len(rows):,} photos"]
    predicted = [name for name in data.texts(images["predicted_name"]) if name]
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
    images = pack.images.iloc[list(rows)]
    choices = selection.table(pack).choices
    pairs = zip(images["predicted"], data.texts(images["predicted_name"]), strict=True)
    found = Counter((int(n), name) for n, name in pairs if name and n == n and n is not None)
    if not found:
        return
    (number, name), _ = found.most_common(1)[0]
    if str(number) not in choices.predicted:
        return
    view = selection.View(method=method, predicted=(str(number),))

    def go() -> None:
        last_view.remember(pack, selection.to_text(view, choices))
        state.go("gallery", **view.params(choices))

    st.button(plain(f"All predicted as {short(name)}, in the gallery"), key=key, on_click=go)
