"""The open pack as a chip in the header; it opens the list of all packs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import streamlit as st

from xattn.app import state
from xattn.app.components import component, sent
from xattn.app.pictures.rendering import PICTURE
from xattn.app.state import plain

if TYPE_CHECKING:
    from xattn.app.library import Library, PackInfo
    from xattn.packs.reader import Pack

LIST, OPEN = "packs-list", "packs-open"  # keys of the list, and of whether it is shown
SEARCHED = 8  # packs from which on there is a search field
SIDE = 128  # pixels of a thumbnail's longer side


def chosen() -> str | None:
    """The pack that was just chosen in the list, until :func:`taken`."""
    return st.session_state.get("_picked")


def taken() -> None:
    """The chosen pack is open."""
    st.session_state["_picked"] = None


@st.fragment
def chip(library: Library, pack: Pack | None) -> None:
    """Show the chip. The list is made when it is opened, without a run of the page."""
    if chosen() is not None:
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
                data=listed(infos, here), key=LIST, on_open_change=lambda: _choose(infos, here)
            )
        else:
            st.caption(f"There is no pack below {plain(library.root.name)} yet.")


def _choose(infos: list[PackInfo], here: str | None) -> None:
    picked = sent(LIST, "open")
    if any(info.id == picked and info.problem is None for info in infos):
        st.session_state["_picked"] = picked if picked != here else None
        st.session_state[OPEN] = False


def facts(pack: Pack) -> str:
    """What is in the pack, in a few words."""
    network = (pack.provenance(pack.first_entry)["backbone"] or {}).get("name")
    maps, photos = pack.counts
    parts = [_count(photos, "photo"), _count(maps, "map"), _count(len(pack.methods), "method")]
    if pack.metrics:
        parts.append(_count(len(pack.metrics), "metric"))
    return " · ".join([*parts, *([f"network {network}"] if network else [])])


def listed(infos: list[PackInfo], selected: str | None) -> dict[str, Any]:
    """What the list shows: packs, the newest first, and those that cannot be opened with the reason."""
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
        f"{when} · {_count(info.images, 'photo')} · {_count(info.entries, 'map')} · "
        f"{', '.join(info.methods[:3])}"
        + (f" and {len(info.methods) - 3} more" if len(info.methods) > 3 else "")
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _thumbnail(info: PackInfo) -> str:
    query = {"pack": info.id, "image": info.photo, "side": SIDE, "v": info.version}
    return f"{PICTURE}?{urlencode(query)}"
