"""The last gallery view of a session, to which the menu and the button return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from xattn.app.navigation import selection

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

_KEY = "_last_view"


def remember(pack: Pack, text: str) -> None:
    """Keep a view of this pack, as :func:`selection.to_text` wrote it; that of another is forgotten."""
    st.session_state[_KEY] = (pack.id, text)


def remembered(pack: Pack) -> str:
    """The text of the view of this pack that was used last, "" if there is none."""
    of, text = st.session_state.get(_KEY, ("", ""))
    return text if of == pack.id else ""


def forget() -> None:
    """Forget the view; the gallery then opens without filters."""
    st.session_state.pop(_KEY, None)


def image_of_url(pack: Pack) -> str:
    """The image that the URL names; without one, as the menu leads here, the gallery's first."""
    if "view" in st.query_params:  # other pages than the gallery lead to an image without one
        remember(pack, st.query_params["view"])
    image_id = st.query_params.get("image")
    if image_id:
        return image_id
    text, table = remembered(pack), selection.table(pack)
    if text:
        st.query_params["view"] = text
        found = selection.selected(pack, selection.from_text(text, table.choices))
        if found.count:
            return str(found.rows(0, 1)["image_id"].iloc[0])
    return table.image_id(0)
