"""The top of a page about one photo of the gallery's selection, beside the photo's own page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app import state
from xattn.app.components.theme import name_html
from xattn.app.navigation import last_view, selection
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def photo_bar(
    pack: Pack, page: str, key: str, carried: Callable[[], Mapping[str, str | None]]
) -> str:
    """The ways to the photos before and after that of the URL, and to its maps; below them its title.

    Args:
        page: the page's own name.
        key: before the keys of the widgets.
        carried: parameters of the URL that the other photos get, asked for at the click.

    Returns:
        The photo's id.

    Raises:
        PackError: the URL names a photo that the pack does not have.
    """
    image_id = last_view.image_of_url(pack)
    row = selection.table(pack).image(image_id)
    if row is None:
        raise PackError("This pack has no such image; choose one in the gallery.")
    view = selection.from_text(last_view.remembered(pack), selection.table(pack).choices)
    before, after, number, count = selection.neighbours(pack, view, image_id)
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    for label, other, keys in (("Previous", before, "Shift+Left"), ("Next", after, "Shift+Right")):
        if bar.button(label, key=f"{key}{label}", disabled=other is None, shortcut=keys):
            state.go(page, image=other, **carried())
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")
    bar.space("stretch")
    if bar.button("Image", key=f"{key}maps", help="The maps of this photo"):
        state.go("image", image=image_id, view=st.query_params.get("view"))
    st.html(name_html(row["title"]))
    return image_id
