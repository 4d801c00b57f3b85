"""Files of the gallery's selection, or of the photos that are chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import streamlit as st

from xattn.app import state
from xattn.app.navigation import selection
from xattn.app.navigation.selection import Selection, View
from xattn.app.pages.gallery import marking
from xattn.app.pages.gallery.cells import look_of
from xattn.app.pages.gallery.widgets import KEY
from xattn.app.pictures import export
from xattn.app.triage import keyboard, selection_files, tag_files
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def files(pack: Pack, view: View, found: Selection) -> None:
    """Files are made when they are asked for."""
    chosen = marking.chosen(pack)
    which = "the selection"
    if chosen:
        names = {True: f"{keyboard.photos(len(chosen))} chosen", False: "The whole selection"}
        if st.radio("Export", list(names), key=f"{KEY}export_of", format_func=names.__getitem__):
            found = Selection(selection.table(pack), view.unfiltered(), chosen)
            which = "the chosen photos"
    _csv(pack, view, found, which)
    most = export.MOST_MAPS["html"]
    several = found.count > most
    st.download_button(
        f"HTML of the first {most} maps" if several else f"HTML of {which}",
        data=lambda: _html(pack, view, found.ids(most)),
        file_name=f"{pack.id}.html",
        mime="text/html",
        on_click="ignore",
        key=f"{KEY}export_html",
    )
    listed = selection_files.MOST_LISTED
    st.download_button(
        f"List of the first {listed:,} photos" if len(found.images) > listed else "List of photos",
        data=lambda: selection_files.image_list(found),
        file_name=f"{pack.id}.txt",
        mime="text/plain",
        on_click="ignore",
        key=f"{KEY}export_list",
    )
    st.caption(
        "The CSV has a line for each map, with its figures, tags, stars and note. The HTML opens without "
        "a server. The list has the names of the photos' files: put it into their folder, and give it to "
        "xattn."
    )
    _folders(pack, found)


def _csv(pack: Pack, view: View, found: Selection, which: str) -> None:
    """All of a view is sent while it is made; chosen photos are in this session alone."""
    if which == "the selection":
        query = {"pack": pack.id, "view": selection.to_text(view, selection.table(pack).choices)}
        st.link_button(f"CSV of {which}", f"{export.CSV}?{urlencode(query)}")
        return
    st.download_button(
        f"CSV of {which}",
        data=lambda: "".join(export.selection_csv(found, tag_files.usable_store(pack))),
        file_name=f"{pack.id}.csv",
        mime="text/csv",
        on_click="ignore",
        key=f"{KEY}export_csv",
    )


def _folders(pack: Pack, found: Selection) -> None:
    """What becomes a folder below the root."""
    root = state.library().root
    if not isinstance(root, Path):
        return  # a store of objects, which packs cannot be written to photo by photo
    st.text_input("Name of a new folder", key=f"{KEY}export_name", max_chars=80)
    row = st.container(horizontal=True, gap="small")
    row.button(
        "Write a pack",
        key=f"{KEY}export_pack",
        on_click=lambda: _write(
            root, lambda to: selection_files.write_pack(pack, found, to), "map"
        ),
    )
    there = selection_files.fiftyone() is not None
    row.button(
        "Write a FiftyOne data set",
        key=f"{KEY}export_fiftyone",
        disabled=not there,
        on_click=lambda: _write(
            root,
            lambda to: selection_files.write_fiftyone(
                pack, found, to, tag_files.usable_store(pack)
            ),
            "photo",
        ),
    )
    if not there:
        st.caption("FiftyOne is not installed where this viewer runs: `pip install fiftyone`.")


def _write(root: Path, write: Callable[[Path], int], what: str) -> None:
    said = st.session_state.setdefault(keyboard.SAID, [])
    try:
        folder = selection_files.check_name(
            root, str(st.session_state.get(f"{KEY}export_name") or "")
        )
        with st.spinner("Writing"):
            count = write(folder)
        said.append((f"{folder.name} is written: {count:,} {what}{'s' * (count != 1)}.", False))
    except (PackError, ValueError, OSError) as error:
        said.append((str(error).replace(str(root), root.name), True))


def _html(pack: Pack, view: View, entry_ids: list[str]) -> str:
    return export.html(pack, entry_ids, look_of(pack, view, entry_ids))
