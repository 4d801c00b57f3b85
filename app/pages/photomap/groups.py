"""The tab of the groups: photos on which the network looks at the same place, possible shortcuts first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st
from PIL import Image

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.photos import class_button, photos_grid, summary
from xattn.app.pictures.rendering import data_uri, jpeg
from xattn.app.state import plain, short
from xattn.eval.report.photo_map.clusters import Cluster
from xattn.eval.report.photo_map.pooled_maps import SIDE as CELLS_A_SIDE
from xattn.pictures.overlay import overlay

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

GROUP = "group"  # parameter of the URL: the number of a card, from 1
CARDS, PHOTOS = "photomap.groups", "photomap.group"
SHOWN = 12  # cards
SIDE = 240  # pixels of a card's picture
APART = 0.5  # above which a group is marked: the rest of its class looks elsewhere


def groups_tab(pack: Pack, method: str) -> None:
    """Cards of the groups, and the photos of one of them."""
    found = data.groups(pack, method)[:SHOWN]
    if not found:
        st.info(
            plain(
                f"There are no groups: at least three photos need maps by {method} that are not the same "
                f"value everywhere."
            )
        )
        return
    st.caption(
        "Photos on which the network looks at the same place. First come groups of one class that look "
        "where the other photos of that class do not: there may be a shortcut, such as a watermark."
    )
    chosen = _chosen(len(found))
    cells = [_card(pack, one, i, method, i == chosen) for i, one in enumerate(found)]
    grid(cells, CARDS, label="Groups of photos", width=150, aspect=1, on_open=_opened)
    one = found[chosen]
    where = one.place[0].upper() + one.place[1:]
    st.subheader(plain(f"Group {chosen + 1}: {where}"), anchor=False)
    rows = [int(row) for row in data.looks(pack, method)[0][one.rows]]
    st.markdown(summary(pack, rows, method))
    st.caption(
        plain(
            f"The group's maps are alike to {one.tightness:.2f} (1: all the same). They look, with up to "
            f"{one.apart:.0%} of a map's scale, where other photos of the class do not."
        )
    )
    class_button(pack, rows, method, "photomap.group.class")
    photos_grid(pack, rows, method, PHOTOS, "Photos of the group, the most typical first")


def _chosen(count: int) -> int:
    """The card of the URL, the first without one."""
    wanted = st.query_params.get(GROUP, "1")
    known = [str(number + 1) for number in range(count)]
    if wanted not in known:
        st.warning("There is no such group; the first is shown.")
        return 0
    return known.index(wanted)


def _opened() -> None:
    opened = sent(CARDS, "open")
    if isinstance(opened, str):
        st.query_params[GROUP] = opened
        st.session_state.pop(f"{PHOTOS}.page", None)


def _card(pack: Pack, one: Cluster, number: int, method: str, selected: bool) -> dict[str, Any]:
    share = f"{one.share:.0%} {short(one.class_name)}" if one.class_name else "class not known"
    lines = [share, f"{len(one.rows):,} photos"]
    if one.accuracy.n:
        lines.append(f"{one.accuracy.mean:.0%} told right")
    return {
        "id": str(number + 1),
        "src": picture(one.mean),
        "alt": f"Mean map of {len(one.rows):,} photos: {one.place}",
        "title": one.place[0].upper() + one.place[1:],
        "lines": lines,
        "badge": {"text": "Unusual place", "kind": "plain"} if one.apart > APART else None,
        "selected": selected,
        "href": state.link(
            "photomap", pack=pack.id, method=method, group=number + 1, part="Groups"
        ),
    }


def picture(mean: np.ndarray) -> str:
    """The mean of pooled maps (64,) over grey, as the address of a picture."""
    low, high = float(mean.min()), float(mean.max())
    cells = ((mean - low) / (high - low) if high > low else mean * 0).astype(np.float32)
    grown = Image.fromarray(cells.reshape(CELLS_A_SIDE, CELLS_A_SIDE)).resize(
        (SIDE, SIDE), Image.Resampling.BICUBIC
    )
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    return data_uri(jpeg(overlay(grey, np.clip(np.asarray(grown), 0, 1), 0.8)))
