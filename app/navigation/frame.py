"""Detects narrow screens and places controls on them; shows the pack list and the bar of pages."""

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
    """Show the chip with the open pack's name. Its list is made when it is opened, without running the
    page."""
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


NARROW = 640  # widest screen, in pixels, on which toolbars are folded
_KEY, _SAID = "screen", "_narrow"


def watch_width() -> None:
    """Ask the browser for its width, for :mod:`xattn.app.main`; a narrow one runs its first page again.

    This also makes links to other pages work while a popover is open.
    """
    component(_KEY)(
        data={"most": NARROW, "narrow": is_narrow()}, key=_KEY, on_narrow_change=lambda: None
    )


def is_narrow() -> bool:
    """Whether the screen was narrow when the browser last reported it, on this page or an earlier one."""
    said = getattr(st.session_state.get(_KEY), "narrow", None)
    if said is not None:
        st.session_state[_SAID] = bool(said)
    return bool(st.session_state.get(_SAID, False))


def toolbar_place(bar: Any, name: str, **popover: Any) -> Any:
    """The container for a toolbar's controls: ``bar``, or on a narrow screen its popover ``name``.

    Args:
        bar: the container of the toolbar.
        name: the popover's label: "Look" for how pictures are drawn, "Filters" for what is shown.
        popover: further arguments of ``st.popover``.
    """
    return bar.popover(name, **popover) if is_narrow() else bar
