"""The data for the map, the groups and "more like this", computed once for each version of a pack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from xattn.app import state
from xattn.app.components import grid, sent_value, verdict
from xattn.app.navigation import last_view
from xattn.app.pictures.rendering import Look, map_url
from xattn.app.state import cache_by_version, plain, short
from xattn.app.triage import selection
from xattn.eval.report.mistakes import accuracy
from xattn.eval.report.photo_map.cache import load_or_make as on_disk
from xattn.eval.report.photo_map.clusters import Cluster, clusters
from xattn.eval.report.photo_map.pooled_maps import (
    MOST_PHOTOS,
    normalise_rows,
    read,
    sample,
    standardise_rows,
)
from xattn.eval.report.photo_map.projection import project
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


OF = {"features": "Features", "maps": "Explanation maps"}  # what photos are compared by

# Columns of :func:`photos`, and their names in the pack's table.
PHOTO = {
    name: name
    for name in (
        *("image_id", "title", "label_name", "predicted_name", "right", "confidence"),
        "disagreement",
    )
} | {"predicted": "predicted_id"}

Rows = NDArray[np.int64]


def rows_of(pack: Pack) -> Rows:
    """The indices of the photos on the map: all photos of the pack, or a sample if there are many."""
    return sample(pack.counts[1])


@cache_by_version(8)
def photos(pack: Pack, method: str) -> pd.DataFrame:
    """The photos on the map, by their index in the pack. The columns are those of ``PHOTO``, the
    ``entry_id`` of the method's map of the most probable class (None if there is no such map), and the
    metrics of this map as ``measure:KEY``. ``predicted`` is a key of the gallery's choices."""
    table, rows = selection.table(pack), rows_of(pack)
    metrics = [m.key for m in pack.metrics if m.key in table.choices.measures]
    columns = [*PHOTO, "entry_id", *(f"measure:{key}" for key in metrics)]
    own = [table.column(key) for key in metrics]
    query = f"""WITH own AS (SELECT * FROM maps WHERE method = $1 AND is_first)
        SELECT {", ".join(f'images."{name}"' for name in PHOTO.values())},
        {", ".join(f"own.{name}" for name in ("entry_id", *own))}
        FROM images LEFT JOIN own ON own.m = images.rowid
        WHERE images.rowid IN (SELECT unnest($2::BIGINT[])) ORDER BY images.rowid"""
    found = table.answer(query, [method, rows.tolist()])
    frame = pd.DataFrame(found, columns=columns, index=rows, dtype=object)
    numbers = ("confidence", "disagreement", *columns[len(PHOTO) + 1 :])
    return frame.astype(dict.fromkeys(numbers, float))


@cache_by_version(8, "The maps are being read")
def pooled_maps(pack: Pack, method: str) -> tuple[Rows, NDArray[np.float32]]:
    """The photos that have a map by ``method``, and their pooled maps (n, 64)."""
    own = photos(pack, method)["entry_id"].dropna()
    stored = on_disk(
        pack.version,
        f"maps by {method}, {MOST_PHOTOS}",
        lambda: {"values": read(pack, own.tolist())},
    )
    return own.index.to_numpy(np.int64), stored["values"].astype(np.float32)


@cache_by_version(4)
def _features(pack: Pack) -> NDArray[np.float32]:
    found = pack.features()
    assert found is not None, "asked for where the pack has features"
    return normalise_rows(found[rows_of(pack)])


@cache_by_version(8)
def _toward(pack: Pack, method: str) -> NDArray[np.float32]:
    return standardise_rows(pooled_maps(pack, method)[1])


def vectors(pack: Pack, of: str, method: str) -> tuple[Rows, NDArray[np.float32]]:
    """Photos and a vector for each, which has length 1, or length 0 if the map of the photo is constant.

    Args:
        of: "features" or "maps".
        method: the method of the maps.
    """
    if of == "features":
        return rows_of(pack), _features(pack)
    return pooled_maps(pack, method)[0], _toward(pack, method)


@cache_by_version(16, "The photos are being placed")
def project_photos(
    pack: Pack, of: str, method: str, projection: str
) -> tuple[Rows, NDArray[np.float32]]:
    """Photos and their points (n, 2); photos with a constant map are left out."""
    rows, values = vectors(pack, of, method)
    known = np.any(values != 0, axis=1)
    rows, values = rows[known], values[known]
    what = f"{projection} of {of} {method if of == 'maps' else ''}, {MOST_PHOTOS}"
    if len(rows) < 2:
        return rows, np.zeros((len(rows), 2), np.float32)
    stored = on_disk(pack.version, what, lambda: {"points": project(values, projection)})
    return rows, stored["points"].astype(np.float32)


@cache_by_version(8, "The maps are being grouped")
def groups(pack: Pack, method: str) -> list[Cluster]:
    """Groups of photos on which the network looks at the same place; their ``rows`` index the photos of
    :func:`pooled_maps`."""
    rows, values = pooled_maps(pack, method)
    own = photos(pack, method).loc[rows]
    return clusters(values, name_list(own["predicted_name"]), correctness(own["right"]))


def name_list(column: pd.Series) -> list[str | None]:
    """A column's names; None where a name is missing."""
    return [value if isinstance(value, str) and value else None for value in column]


def correctness(column: pd.Series) -> list[bool | None]:
    """The values of a column as True or False, or None where a value is unknown."""
    return [None if pd.isna(value) else bool(value) for value in column]


SIDE = 240  # pixels of a picture's longer side
SHOWN = 24  # photos per page


def photos_grid(
    pack: Pack,
    rows: Sequence[int],
    method: str,
    key: str,
    label: str,
    note: Callable[[int], str] | None = None,
) -> None:
    """Show a page of these photos with their maps by ``method``; a click opens a photo.

    Args:
        rows: indices of photos on the map.
        note: returns a line of text for a photo, given its position in ``rows``.
    """
    of = f"{key}.page"
    pages = -(-len(rows) // SHOWN)
    number = min(st.session_state.get(of, 0), pages - 1)
    start = number * SHOWN
    shown = photos(pack, method).loc[list(rows[start : start + SHOWN])]
    cells = [
        _cell(pack, found, method, note(start + i) if note else "")
        for i, found in enumerate(shown.to_dict("records"))
    ]
    grid(cells, key, label=label, width=130, on_open=lambda: _open(pack, key))
    if pages > 1:
        bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
        before, after = (n if 0 <= n < pages else None for n in (number - 1, number + 1))
        last_view.steps(bar, f"{key}.", before, after, partial(_turn, of), (None, None))
        bar.caption(f"{start + 1:,} to {start + len(shown):,} of {len(rows):,}", width="content")


def _turn(of: str, number: int) -> None:
    st.session_state[of] = number


def _cell(pack: Pack, found: dict[str, Any], method: str, note: str) -> dict[str, Any]:
    image_id, entry_id = found["image_id"], found["entry_id"]
    predicted, label = found["predicted_name"], found["label_name"]
    sure = "" if found["confidence"] != found["confidence"] else f"  {found['confidence']:.1%}"
    title = f"{short(predicted)}{sure}" if predicted else str(found["title"])
    return {
        "id": image_id,
        "src": map_url(pack, image_id, entry_id, Look(side=SIDE)),
        "alt": f"Map by {pack.title_of(method)} on {found['title']}"
        if entry_id
        else f"Photo {found['title']}",
        "title": title,
        "lines": [*filter(None, [note, f"true: {short(label)}" if label else ""]), found["title"]],
        "badge": verdict(found["right"]),
        "href": state.link("image", pack=pack.id, image=image_id),
    }


def _open(pack: Pack, key: str) -> None:
    opened = sent_value(key, "open")
    if isinstance(opened, str) and selection.table(pack).image(opened) is not None:
        state.go("image", image=opened)


def summary(pack: Pack, rows: Sequence[int], method: str) -> str:
    """A Markdown sentence on what these photos have in common."""
    images = photos(pack, method).loc[list(rows)]
    parts = [count_phrase(len(rows), "photo")]
    predicted = sorted(name for name in name_list(images["predicted_name"]) if name)
    if predicted:
        name, most = Counter(predicted).most_common(1)[0]
        parts.append(plain(f"{most / len(rows):.0%} predicted as {short(name)}"))
    known = np.array([float(v) for v in correctness(images["right"]) if v is not None])
    if len(known):
        right = accuracy(known)
        sure = f" (95 % interval {right.lo:.0%} to {right.hi:.0%})" if len(known) > 1 else ""
        parts.append(f"{right.mean:.0%} classified correctly{sure}")
    return ", ".join(parts) + "."


def class_button(pack: Pack, rows: Sequence[int], method: str, key: str) -> None:
    """A button that shows, in the gallery, all photos whose prediction is the most frequent one among these
    photos."""
    choices = selection.table(pack).choices
    found = Counter(name_list(photos(pack, method).loc[list(rows), "predicted"]))
    found.pop(None, None)
    if not found:
        return
    key_of_class = min(found, key=lambda key: (-found[key], choices.predicted[str(key)]))
    name = choices.predicted[str(key_of_class)]
    view = selection.View(method=method, predicted=(str(key_of_class),))
    label = plain(f"All predicted as {short(name)}, in the gallery")
    st.button(label, key=key, on_click=last_view.to_gallery, args=(pack, view))
