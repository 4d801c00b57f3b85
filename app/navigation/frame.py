"""Shows the pack list, the bar of pages and the list of keys."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import streamlit as st

from xattn.app import state
from xattn.app.components import component, sent_value
from xattn.app.pictures.rendering import PICTURE
from xattn.app.state import PAGES, plain
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.app.library import Library, PackInfo
    from xattn.packs.reader import Pack


LIST, OPEN = "packs-list", "packs-open"  # keys of the list, and of whether it is shown
SEARCHED = 8  # fewest packs for which there is a search field
SIDE = 128  # pixels of a thumbnail's longer side


def chosen_pack() -> str | None:
    """The pack that was just chosen in the list, until :func:`mark_opened` is called."""
    return st.session_state.get("_picked")


def mark_opened() -> None:
    """Record that the chosen pack is open."""
    st.session_state["_picked"] = None


@st.fragment
def chip(library: Library, pack: Pack | None) -> None:
    """Show the chip with the open pack's name. The list of packs in it is made when the chip is opened,
    without running the page."""
    if chosen_pack() is not None:
        st.rerun()
    name = plain(pack.name) if pack is not None else "No pack is open"
    with st.container(key="pack-chip", width="content"):
        opened = st.popover(name, icon=":material/photo_library:", key=OPEN, on_change="rerun")
    if not opened.open:
        return
    with opened:
        if pack is not None:
            st.caption(plain(facts(pack)))
        infos = library.packs()
        if infos:
            here = None if pack is None else pack.id
            component("packs")(
                data=pack_options(infos, here),
                key=LIST,
                on_open_change=lambda: _choose(infos, here),
            )
        else:
            st.caption(f"There is no pack below {plain(library.root.name)} yet.")


def _choose(infos: list[PackInfo], here: str | None) -> None:
    picked = sent_value(LIST, "open")
    if any(info.id == picked and info.problem is None for info in infos):
        st.session_state["_picked"] = picked if picked != here else None
        st.session_state[OPEN] = False


def facts(pack: Pack) -> str:
    """The contents of the pack, in a few words."""
    network = (pack.provenance(pack.first_entry)["backbone"] or {}).get("name")
    maps, photos = pack.counts
    parts = [
        count_phrase(photos, "photo"),
        count_phrase(maps, "map"),
        count_phrase(len(pack.methods), "method"),
    ]
    if pack.metrics:
        parts.append(count_phrase(len(pack.metrics), "metric"))
    return " · ".join([*parts, *([f"network {network}"] if network else [])])


def pack_options(infos: list[PackInfo], selected: str | None) -> dict[str, Any]:
    """The packs for the list, newest first; for a pack that cannot be opened, the reason is given."""
    good = sorted((i for i in infos if i.problem is None), key=lambda i: (-i.modified, i.name))
    page = state.current_page()
    return {
        "packs": [
            {
                "id": info.id,
                "title": info.name,
                "line": _line(info),
                "src": _thumbnail(info),
                "href": state.link(page, pack=info.id),
                "selected": info.id == selected,
            }
            for info in good
        ],
        "problems": [
            {"title": info.name, "line": info.problem} for info in infos if info.problem is not None
        ],
        "search": len(infos) >= SEARCHED,
    }


def _line(info: PackInfo) -> str:
    when = time.strftime("%d %b %Y, %H:%M", time.localtime(info.modified))
    return (
        f"{when} · {count_phrase(info.images, 'photo')} · {count_phrase(info.entries, 'map')} · "
        f"{', '.join(info.methods[:3])}"
        + (f" and {len(info.methods) - 3} more" if len(info.methods) > 3 else "")
    )


def _thumbnail(info: PackInfo) -> str:
    query = {"pack": info.id, "image": info.photo, "side": SIDE, "v": info.version}
    return f"{PICTURE}?{urlencode(query)}"


HERE = "bottom-bar-here"  # the CSS class of the page that is shown
FIRST = ("gallery", "image", "mistakes", "live", "compare")


def bottom_bar(pack_id: str | None) -> None:
    """Show the bar of pages; wide screens hide it (``components/theme.py``), since they have a header."""
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


KEYS = {
    "/": "search the gallery",
    "J, K": "next, previous photo",
    "Shift+→, Shift+←": "next, previous photo or page",
    "arrow keys, Enter": "move among pictures, open one",
    "Page Down, Page Up": "next, previous page of pictures",
    "1 to 9": "add a tag, or remove it",
    "X": "choose a photo, also Ctrl or Shift and a click",
    "Escape": "choose no photo",
    "Z, Shift+Z": "undo, redo",
    "+, −, 0": "zoom maps in and out, show the whole photo",
}


def watch_keys() -> None:
    """Show the list of keys when ? is pressed, and go to the search when / is pressed; also make links to
    other pages work while a popover is open."""
    component("page", "acts")(data=list(KEYS.items()), key="page-keys")
