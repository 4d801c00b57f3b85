"""The pages on a narrow screen: a bar below the page, with the most used ones and a menu of the others."""

from __future__ import annotations

import streamlit as st

from xattn.app import state
from xattn.app.pages import PAGES

HERE = "bottom-bar-here"  # the CSS class of the page that is shown
FIRST = ("gallery", "image", "mistakes", "live", "compare")


def bottom_bar(pack_id: str | None) -> None:
    """Show the bar; wide screens hide it (``components/theme.py``), since their header has the pages."""
    here = state.current_page()
    others = [name for name in PAGES if name not in FIRST]
    with st.container(horizontal=True, key="bottom-bar", gap=None):
        for name in FIRST:
            with st.container(key=HERE if name == here else None):
                _link(name, pack_id)
        with st.container(key=HERE if here in others else None):
            with st.popover("More", icon=":material/more_horiz:", type="tertiary"):
                with st.container(key="bottom-bar-others", gap=None):
                    for name in others:
                        _link(name, pack_id)


def _link(name: str, pack_id: str | None) -> None:
    about = PAGES[name]
    st.page_link(
        state.page_object(name),
        label=about.title,
        icon=f":material/{about.icon}:",
        query_params={} if pack_id is None else {"pack": pack_id},
        width="stretch",
    )
