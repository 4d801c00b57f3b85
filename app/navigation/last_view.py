"""Remembers a session's last gallery view, to which the menu and the back button return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components.theme import name_html
from xattn.app.triage import selection
from xattn.app.triage.selection import View
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


_KEY = "_last_view"


def remember(pack: Pack, text: str) -> None:
    """Remember a view of this pack, as :func:`selection.to_text` wrote it, and forget the views of
    other packs."""
    st.session_state[_KEY] = (pack.id, text)


def last_text(pack: Pack) -> str:
    """The text of this pack's last view; "" if there is none."""
    of, text = st.session_state.get(_KEY, ("", ""))
    return text if of == pack.id else ""


def to_gallery(pack: Pack, view: View) -> None:
    """Show a view of the pack's maps in the gallery."""
    choices = selection.table(pack).choices
    remember(pack, selection.to_text(view, choices))
    state.go("gallery", **view.params(choices))


def forget() -> None:
    """Forget the view; the gallery then opens without filters."""
    st.session_state.pop(_KEY, None)


def image_of_url(pack: Pack) -> str:
    """The image in the URL; if the URL has none, as after a click in the menu, the gallery's first
    image."""
    if "view" in st.query_params:  # pages other than the gallery link to an image without a view
        remember(pack, st.query_params["view"])
    image_id = st.query_params.get("image")
    if image_id:
        return image_id
    text, table = last_text(pack), selection.table(pack)
    if text:
        st.query_params["view"] = text
        found = selection.select(pack, selection.from_text(text, table.choices))
        if found.count:
            return str(found.rows(0, 1)["image_id"].iloc[0])
    return table.image_id(0)


def steps(
    bar: Any,
    key: str,
    before: Any,
    after: Any,
    go: Callable[[Any], None],
    shortcuts: tuple[str | None, str | None] = ("Shift+Left", "Shift+Right"),
) -> None:
    """The buttons Previous and Next, which call ``go`` with their target; None disables a button."""
    for label, to, keys in zip(("Previous", "Next"), (before, after), shortcuts, strict=True):
        bar.button(
            label,
            key=f"{key}{label}",
            icon=":material/chevron_left:" if label == "Previous" else ":material/chevron_right:",
            on_click=go,
            args=(to,),
            disabled=to is None,
            shortcut=keys,
        )


def photo_bar(
    pack: Pack, page: str, key: str, carried: Callable[[], Mapping[str, str | None]]
) -> str:
    """Show links to the previous and next photo and to the maps of this photo, and show its title below the
    links.

    Args:
        page: the name of the page.
        key: prefix of the widgets' keys.
        carried: called on a click; returns the URL parameters that other photos should keep.

    Returns:
        The photo's id.

    Raises:
        PackError: the photo in the URL is not in the pack.
    """
    image_id = image_of_url(pack)
    row = selection.table(pack).image(image_id)
    if row is None:
        raise PackError("This pack has no such image; choose another one in the gallery.")
    view = selection.from_text(last_text(pack), selection.table(pack).choices)
    before, after, number, count = selection.select(pack, view).neighbours(image_id)
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    steps(bar, key, before, after, lambda other: state.go(page, image=other, **carried()))
    place = f"{number:,} of {count:,}" if number else "not in the gallery's selection"
    bar.caption(place, width="content")
    bar.space("stretch")
    if bar.button("Image", key=f"{key}maps", help="The maps of this photo"):
        state.go("image", image=image_id, view=st.query_params.get("view"))
    st.html(name_html(row["title"]))
    return image_id
