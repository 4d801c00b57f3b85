"""Files of the gallery's selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from xattn.app.pages.gallery.widgets import KEY
from xattn.app.pictures import export

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def files(pack: Pack, found: pd.DataFrame) -> None:
    """Files are made when they are asked for."""
    st.download_button(
        "CSV of the selection",
        data=lambda: export.maps_csv(pack, found.index),
        file_name=f"{pack.id}.csv",
        mime="text/csv",
        on_click="ignore",
        key=f"{KEY}export_csv",
    )
    most = export.MOST_MAPS["html"]
    several = len(found) > most
    st.download_button(
        f"HTML of the first {most} maps" if several else "HTML of the selection",
        data=lambda: export.html(pack, list(found.index[:most])),
        file_name=f"{pack.id}.html",
        mime="text/html",
        on_click="ignore",
        key=f"{KEY}export_html",
    )
    st.caption(
        "The CSV has a line for each map on all pages, with its figures. The HTML opens without a "
        "server."
    )
