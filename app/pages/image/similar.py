"""The tab "Similar": the photos nearest to one photo, by the network's features or by where it looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from xattn.app.navigation import address
from xattn.app.pages.image.display import PhotoView
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.data import photos_grid
from xattn.app.state import plain
from xattn.app.triage import selection
from xattn.eval.report.photo_map.pooled_maps import (
    nearest,
    normalise_rows,
    pool_map,
    standardise_rows,
)

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

NEAREST = 24  # photos shown
GRID = "similar"


def similar_tab(pack: Pack, shown: PhotoView) -> None:
    """Show the nearest photos with their distances."""
    method = str(shown.entries.loc[shown.focus, "method"])
    offered = list(data.OF) if pack.has_features else ["maps"]
    of = "maps"
    if len(offered) > 1:
        of = address.segmented("Similar by", offered, "near", format_func=data.OF.__getitem__)
    query = "SELECT rowid FROM images WHERE image_id = $1"
    (row,) = selection.table(pack).numbers(query, [shown.image_id])
    rows, values = data.vectors(pack, of, method)
    others = rows != row
    found, distance = nearest(values[others], _own(pack, shown, of, method, int(row)), NEAREST)
    if not len(found):
        what = "its map is constant" if of == "maps" and others.any() else "there is no other photo"
        st.info(plain(f"No photo is similar to this one: {what}."))
    else:
        near = [int(i) for i in rows[others][found]]
        photos_grid(
            pack, near, method, GRID, "Similar photos", lambda i: f"distance {distance[i]:.3f}"
        )
    notes = [
        "The distance is 1 - cosine of the network's features, from 0 (the same) to 2."
        if of == "features"
        else f"The distance is 1 - cosine of the maps by {pack.title_of(method)} on 8 x 8 cells, from 0 "
        f"(the same) to 2."
    ]
    if len(data.rows_of(pack)) < pack.counts[1]:
        notes.append(f"Compared with a random sample of {len(rows):,} photos.")
    if not pack.has_features:
        notes.append(
            "To compare by features as well, explain with: xattn explain PHOTOS --features."
        )
    st.caption(plain(" ".join(notes)))


def _own(pack: Pack, shown: PhotoView, of: str, method: str, row: int) -> np.ndarray:
    """The row of the photo itself, which may not be in the sample."""
    rows, values = data.vectors(pack, of, method)
    at = np.flatnonzero(rows == row)
    if len(at):
        return values[at[0]]
    if of == "features":
        features = pack.features()
        assert features is not None, "offered where the pack has features"
        return normalise_rows(features[[row]])[0]
    own = shown.entries[shown.entries["method"] == method]
    entry = own["probability"].astype(float).idxmax()
    return standardise_rows(pool_map(pack.explanation(entry).normalized())[None])[0]
