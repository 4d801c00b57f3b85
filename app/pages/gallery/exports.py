"""Files of the gallery's selection."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode

import streamlit as st

from xattn.app.navigation import selection
from xattn.app.navigation.selection import Selection, View
from xattn.app.pages.gallery.cells import look_of
from xattn.app.pages.gallery.widgets import KEY
from xattn.app.pictures import export

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def files(pack: Pack, view: View, found: Selection) -> None:
    """Files are made when they are asked for."""
    query = {"pack": pack.id, "view": selection.to_text(view, selection.table(pack).choices)}
    st.link_button("CSV of the selection", f"{export.CSV}?{urlencode(query)}")
    most = export.MOST_MAPS["html"]
    several = found.count > most
    st.download_button(
        f"HTML of the first {most} maps" if several else "HTML of the selection",
        data=lambda: _html(pack, view, found.ids(most)),
        file_name=f"{pack.id}.html",
        mime="text/html",
        on_click="ignore",
        key=f"{KEY}export_html",
    )
    st.caption(
        "The CSV has a line for each map on all pages, with its figures. The HTML opens without a "
        "server."
    )


def _html(pack: Pack, view: View, entry_ids: list[str]) -> str:
    return export.html(pack, entry_ids, look_of(pack, view, entry_ids))
