"""Map: the photos of a pack as points, and groups on which the network looks at the same place."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.navigation import selection, url_widgets
from xattn.app.pages.photomap import data
from xattn.app.pages.photomap.groups import groups_tab
from xattn.app.pages.photomap.points import WIDTH, points_tab
from xattn.app.state import Context
from xattn.pictures.words import method_title

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

FEWEST = 3  # photos for a map


def page(context: Context) -> None:
    """Show the open pack's map."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    st.title("Map", anchor=False)
    photos = pack.counts[1]
    if photos < FEWEST:
        count = "one photo" if photos == 1 else f"{photos} photos"
        st.info(
            f"This pack has {count}; a map needs at least {FEWEST}. Explain a folder of photos."
        )
        return
    points, groups = st.tabs(["Photos", "Groups"], key="part", bind="query-params")
    if points.open:
        with points:
            _points(pack)
    if groups.open:
        with groups:
            groups_tab(pack, _method(st, pack))


def _points(pack: Pack) -> None:
    if not pack.has_features:
        _without_features()
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    offered = list(data.OF) if pack.has_features else ["maps"]
    with bar:
        of = url_widgets.selectbox(
            "Near by", offered, "near", format_func=data.OF.__getitem__, width=WIDTH
        )
    points_tab(pack, of, _method(bar, pack), bar)


def _method(place: Any, pack: Pack) -> str:
    """Whose maps are shown and compared; of several methods the person's choice."""
    choices = selection.table(pack).choices
    if len(choices.under_test) == 1:
        return choices.under_test[0]
    with place.container(width=WIDTH):
        return url_widgets.selectbox(
            "Maps by", list(choices.under_test), "method", format_func=method_title
        )


def _without_features() -> None:
    with st.expander("This pack has no features, so photos are near by their maps alone."):
        st.markdown("Explain the photos again with what the network reads of each:")
        output = shlex.quote(str(state.settings().root / "with-features"))
        st.code(
            f"xattn explain PHOTOS --features --output {output}", language="sh", wrap_lines=True
        )
