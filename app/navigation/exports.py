"""Offers the photos of a view as files: in the gallery the whole view, and on every page the chosen
photos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import streamlit as st

from xattn.app import state
from xattn.app.components import download
from xattn.app.pictures import export
from xattn.app.pictures.rendering import Look
from xattn.app.triage import selection, selection_files, tag_files
from xattn.app.triage.selection import Selection, View
from xattn.packs.contained_files import PackError
from xattn.pictures.overlay import STYLES
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.reader import Pack

SIDE = 240  # pixels of a picture's longer side


def look_of(pack: Pack, view: View, entry_ids: Sequence[str]) -> Look:
    """The look with which the view draws these maps; a shared scale spans all of them."""
    shared = view.scale == "shared" and view.show != "photo"
    return Look(
        scale=view.scale,
        cmap=view.colours,
        side=SIDE,
        limits=_limits(pack, entry_ids) if shared else None,
        style=view.show if view.show in STYLES else "overlay",
        crop=view.part == "crop",
    )


def _limits(pack: Pack, entry_ids: Sequence[str]) -> tuple[float, float] | None:
    """The smallest and the largest value of these maps; maps that cannot be read are skipped."""
    ends = []
    for entry_id in entry_ids:
        with contextlib.suppress(PackError):  # its picture says so
            found = pack.explanation(entry_id).map
            ends += [float(found.min()), float(found.max())]
    return (min(ends), max(ends)) if ends else None


def files(pack: Pack, view: View, key: str) -> None:
    """Offer files of the photos of a view, which are made when they are requested.

    ``key`` is the prefix of the widgets' keys.
    """
    found = selection.select(pack, view)
    query = {"pack": pack.id, "view": selection.to_text(view, selection.table(pack).choices)}
    row = st.container(horizontal=True, gap="small")
    row.link_button("CSV", f"{selection_files.CSV}?{urlencode(query)}")

    def parquet() -> bytes:
        return selection_files.selection_parquet(found, tag_files.usable_store(pack))

    download(row, "Parquet", parquet, f"{pack.id}.parquet", f"{key}export_parquet")
    listed = selection_files.MOST_LISTED
    several = len(found.images) > listed
    label = f"List of the first {listed:,} photos" if several else "List of photos"
    photos = partial(selection_files.image_list, found)
    download(row, label, photos, f"{pack.id}.txt", f"{key}export_list")
    most = export.MOST_MAPS["html"]
    label = f"HTML of the first {most} maps" if found.count > most else "HTML"

    def report() -> str:
        ids = found.ids(most)
        return export.html(pack, ids, look_of(pack, view, ids))

    download(row, label, report, f"{pack.id}.html", f"{key}export_html")
    st.caption(
        "CSV and Parquet have a row for each map with its figures, tags, stars and note. The HTML works "
        "without a server. The list has the file names of the photos: put it into their folder and pass "
        "it to xattn."
    )
    _folders(pack, found, key)


def _folders(pack: Pack, found: Selection, key: str) -> None:
    """Offer exports that become a folder below the root."""
    library = state.library()
    if not library.keeps:
        return
    name = f"{key}export_name"
    st.text_input("Name of a new folder", key=name, max_chars=80)
    row = st.container(horizontal=True, gap="small")
    row.button(
        "Write a pack",
        key=f"{key}export_pack",
        on_click=lambda: _write(
            library, name, lambda to: selection_files.write_pack(pack, found, to), "map"
        ),
    )
    there = selection_files.fiftyone() is not None
    row.button(
        "Write a FiftyOne data set",
        key=f"{key}export_fiftyone",
        disabled=not there,
        on_click=lambda: _write(
            library,
            name,
            lambda to: selection_files.write_fiftyone(
                pack, found, to, tag_files.usable_store(pack)
            ),
            "photo",
        ),
    )
    if not there:
        st.caption("FiftyOne is not installed where this viewer runs: `pip install fiftyone`.")


def _write(library: Library, name: str, write: Callable[[Path], int], what: str) -> None:
    said = st.session_state.setdefault(tag_files.SAID, [])
    try:
        folder = library.new_folder(str(st.session_state.get(name) or ""))
        with st.spinner("Writing"):
            count = write(folder)
        said.append((f"{folder.name} is written: {count_phrase(count, what)}.", False))
    except (PackError, ValueError, OSError) as error:
        said.append((str(error).replace(str(library.root), library.root.name), True))
