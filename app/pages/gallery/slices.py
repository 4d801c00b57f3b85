"""Views of the gallery that are saved by name: slices, to be compared on the page Mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.navigation import selection
from xattn.app.navigation.selection import View
from xattn.app.pages.gallery.widgets import KEY
from xattn.app.triage import keyboard, tag_files
from xattn.app.triage.store import SLICE_LENGTH, Store, TagsError
from xattn.runtime.display_text import visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def tools(bar: Any, pack: Pack, view: View) -> None:
    """A popover that saves this view, and opens, renames and deletes saved ones."""
    choices = selection.table(pack).choices
    try:
        saved = tag_files.store_of(pack).slices()
    except TagsError:
        return  # the page says why
    with bar.popover("Slices", key=f"{KEY}slices"):
        st.text_input(
            "Save this view as",
            key=f"{KEY}slice_name",
            max_chars=SLICE_LENGTH,
            placeholder="night photos, wrong",
        )
        text = selection.to_text(view, choices)
        st.button("Save", key=f"{KEY}slice_save", on_click=_save, args=(pack, text))
        if not saved:
            st.caption(
                "The page Mistakes compares saved views and tags: accuracy, calibration, metrics."
            )
            return
        name = st.selectbox("Saved slices", list(saved), key=f"{KEY}slice", format_func=visible)
        row = st.container(horizontal=True, gap="small")
        if name in saved and row.button("Open", key=f"{KEY}slice_open"):
            state.go("gallery", **selection.from_text(saved[name], choices).params(choices))
        row.button(
            "Delete",
            key=f"{KEY}slice_delete",
            on_click=lambda: keyboard.change(
                pack, _told(lambda s: s.delete_slice(name), "Deleted.")
            ),
        )
        st.text_input("New name", key=f"{KEY}slice_new", max_chars=SLICE_LENGTH)
        st.button("Rename", key=f"{KEY}slice_rename", on_click=_rename, args=(pack, name))


def _save(pack: Pack, text: str) -> None:
    name = str(st.session_state.get(f"{KEY}slice_name") or "")
    if keyboard.change(pack, _told(lambda s: s.save_slice(name, text), f"Saved: {name}")):
        st.session_state[f"{KEY}slice_name"] = ""


def _rename(pack: Pack, name: str) -> None:
    new = str(st.session_state.get(f"{KEY}slice_new") or "")
    if keyboard.change(pack, _told(lambda s: s.rename_slice(name, new), f"Renamed: {new}")):
        st.session_state[f"{KEY}slice_new"] = ""


def _told(act: Callable[[Store], None], text: str) -> Callable[[Store, str], str]:
    def change(store: Store, person: str) -> str:
        act(store)
        return text

    return change
