"""Map: the photos of a pack as points, and groups of photos on which the network looks at the same place."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app import state
from xattn.app.navigation import selection, url_widgets
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.groups import groups_tab
from xattn.app.pages.photomap.points import points_tab
from xattn.app.state import Context

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

FEWEST = 3  # photos for a map


def page(context: Context) -> None:
    """Show the open pack's map."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    st.title("Map", anchor=False)
    if len(pack.images) < FEWEST:
        count = "one photo" if len(pack.images) == 1 else f"{len(pack.images)} photos"
        st.info(f"This pack has {count}; a map needs at least {FEWEST}. Explain a folder of photos.")
        return
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    with bar:
        of = _of(pack)
        method = _method(pack)
    if not pack.has_features:
        _without_features()
    points, groups = st.tabs(["Photos", "Groups"], key="part", bind="query-params")
    if points.open:
        with points:
            points_tab(pack, of, method)
    if groups.open:
        with groups:
            groups_tab(pack, method)


def _of(pack: Pack) -> str:
    """What makes photos near: features, where the pack has them, or maps."""
    offered = list(data.OF) if pack.has_features else ["maps"]
    return url_widgets.selectbox(
        "Near by", offered, "near", format_func=data.OF.__getitem__, width=180
    )


def _method(pack: Pack) -> str:
    """Whose maps are shown and compared; of several methods the person's choice."""
    choices = selection.table(pack).choices
    if len(choices.under_test) == 1:
        return choices.under_test[0]
    return url_widgets.selectbox("Maps by", list(choices.under_test), "method", width=180)


def _without_features() -> None:
    with st.expander("This pack has no features, so photos are near by their maps alone."):
        st.markdown("Explain the photos again with what the network reads of each:")
        output = shlex.quote(str(state.settings().root / "with-features"))
        st.code(f"xattn explain PHOTOS --features --output {output}", language="sh", wrap_lines=True)
