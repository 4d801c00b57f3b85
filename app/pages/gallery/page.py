"""The gallery: a pack's maps as pages of pictures, sorted, filtered and searched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent
from xattn.app.components.look import STYLES, look_control
from xattn.app.navigation import address, last_view, selection
from xattn.app.navigation.selection import NAMES, Choices, Selection, View
from xattn.app.pages.gallery import exports, marking, slices
from xattn.app.pages.gallery.cells import cell, look_of
from xattn.app.pages.gallery.chips import chips
from xattn.app.pages.gallery.filters import toolbar
from xattn.app.pages.gallery.widgets import KEY, clear, from_widgets, go_to, to_widgets
from xattn.app.pictures.rendering import blank_maps, legends
from xattn.app.state import Context, plain
from xattn.app.triage import keyboard
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

CELLS = f"{KEY}cells"


def page(context: Context) -> None:
    """Show one page of the open pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    table = selection.table(pack)
    view, messages, seeded = _from_url(pack, table.choices)
    st.title(plain(pack.name), anchor=False)
    if messages:
        st.warning("  \n".join(map(plain, messages)))
    marking.check(pack)
    keyboard.say()
    view = toolbar(pack, view, table.choices)
    chips(view, table.choices)
    found = selection.selected(pack, view)
    count = selection.pages(found.count, view.size)
    beyond = view.page > count
    if beyond:
        view = replace(view, page=count)
        to_widgets(view, ["page"])
    start = (view.page - 1) * view.size
    shown = found.rows(start, view.size)
    view = _line(pack, view, table.choices, found, start, list(shown["image_id"]))
    text = selection.to_text(view, table.choices)
    if shown.empty:
        _nothing(table.choices)
    else:
        look = look_of(pack, view, list(shown.index))
        if view.show != "photo":
            st.html(legends_html(legends(pack, list(shown.index), look)))
        last = _last(pack)
        marks = marking.marks(pack, shown["image_id"])
        chosen = set(marking.chosen(pack))
        cells = [
            cell(pack, view, look, table.choices, text, last, entry_id, row)
            | {
                "photo": row["image_id"],
                "chosen": row["image_id"] in chosen,
                "marks": marking.badges(marks.get(row["image_id"])),
            }
            for entry_id, row in zip(shown.index, shown.to_dict("records"), strict=True)
        ]
        label = f"Maps, page {view.page} of {count}"
        grid(
            cells,
            CELLS,
            label=label,
            aspect=1 if look.crop else 4 / 3,
            cover=look.crop,
            scroll=view.page,
            on_open=partial(_opened, pack, table.choices),
            on_turn=_turned,
            on_act=partial(marking.acted, pack, CELLS),
        )
        if note := blank_maps(pack, shown.index, table.title) if view.show != "photo" else "":
            st.caption(plain(note))
        _below(pack, view, found, count)
    if messages or beyond or not seeded:
        _to_url(pack, view, table.choices)
    last_view.remember(pack, text)


# ---------------------------------------------------------------------- the URL


def _from_url(pack: Pack, choices: Choices) -> tuple[View, list[str], bool]:
    """The view, what was wrong with the URL, and whether it is the URL's and not the widgets'.

    It is where the URL is a new one. The address of an image that was opened here, on this page, is
    what Back may lead to; its ``view`` is this page's own. The menu's address has no parameters: it
    leads to the view that was left.
    """
    url = _url()
    subject = (pack.id, pack.version)
    known = f"{KEY}sort" in st.session_state and st.session_state.get("_gallery") == subject
    st.session_state["_gallery"] = subject
    if not address.is_new("gallery", url, known):
        return from_widgets(choices), [], False
    messages: list[str] = []
    left = "" if url or address.back() else last_view.remembered(pack)
    if left or "view" in url:
        view = selection.from_text(left or url["view"][-1], choices)
    else:
        view, messages = selection.parse(url, choices)
    to_widgets(view, NAMES)
    address.wrote("gallery", url)
    return view, messages, not left


def _url() -> dict[str, list[str]]:
    """The URL's parameters but the pack."""
    return {name: st.query_params.get_all(name) for name in st.query_params if name != "pack"}


def _to_url(pack: Pack, view: View, choices: Choices) -> None:
    """Write the view into the URL, unless it is there."""
    wanted = view.params(choices)
    address.wrote("gallery", wanted)
    if _url() != wanted:
        st.query_params.from_dict({"pack": pack.id, **wanted})


def _last(pack: Pack) -> str | None:
    """The image that was opened last, to be marked when the person comes back."""
    of, image_id = st.session_state.get("_opened", (None, None))
    return st.query_params.get("image", image_id if of == pack.id else None)


# ---------------------------------------------------------------------- what a person does


def _opened(pack: Pack, choices: Choices) -> None:
    """Go to the image, before this page runs again."""
    opened = sent(CELLS, "open")
    image_id = selection.table(pack).image_of_map(opened) if isinstance(opened, str) else None
    if image_id is not None:
        text = selection.to_text(from_widgets(choices), choices)
        st.session_state["_opened"] = (pack.id, image_id)
        last_view.remember(pack, text)
        state.go("image", image=image_id, view=text or None)


def _turned() -> None:
    by = sent(CELLS, "turn")
    if by is not None:
        _turn(by)


def _turn(by: Any) -> None:
    go_to(max(1, st.session_state.get(f"{KEY}page", 1) + (1 if by == 1 else -1)))


def _jump() -> None:
    go_to(int(st.session_state[f"{KEY}jump"]))


# ---------------------------------------------------------------------- the page's parts


def _line(
    pack: Pack, view: View, choices: Choices, found: Selection, start: int, shown: list[str]
) -> View:
    """How many maps there are, which photos are chosen, and how maps are drawn; returns the view.
    ``shown`` are the photos of the page's maps."""
    text = _count(found.count, start, len(shown))
    if view.filters:
        text += f", filtered from {selection.selected(pack, view.unfiltered()).count:,}"
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.caption(text, width="content")
    line.space("stretch")
    marking.tools(line, pack, list(dict.fromkeys(shown)), found)
    slices.tools(line, pack, view)
    look_control(line, KEY, styles=STYLES | {"photo": "Photo"}, style="show")
    return from_widgets(choices)


def _count(count: int, start: int, shown: int) -> str:
    """How many maps there are, and which of them the page shows if not all."""
    if count == 0:
        return "No maps"
    maps = "1 map" if count == 1 else f"{count:,} maps"
    if shown == count:
        return maps
    if shown == 1:
        return f"Map {start + 1:,} of {count:,}"
    return f"{start + 1:,} to {start + shown:,} of {maps}"


def _nothing(choices: Choices) -> None:
    with st.container(border=True):
        st.markdown("**No map passes these filters.**")
        st.caption(
            "Search for less, or widen the range. A map without a value of the chosen measure is "
            "never in its range."
        )
        st.button("Show all maps", key=f"{KEY}all_maps", on_click=clear)


def _below(pack: Pack, view: View, found: Selection, count: int) -> None:
    """The way to other pages, and files of the selection."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    if count > 1:
        _pager(bar, view, count)
    bar.space("stretch")
    with bar.popover("Export"):
        exports.files(pack, view, found)
    st.caption(
        "In the pictures the arrow keys or J and K move, Enter opens, X chooses, 1 to 9 tag, Z undoes, and "
        "Page Up and Page Down turn the page."
    )


def _pager(bar: Any, view: View, count: int) -> None:
    st.session_state[f"{KEY}jump"] = view.page
    for text, by, keys, end in (
        ("Previous", -1, "Shift+Left", 1),
        ("Next", 1, "Shift+Right", count),
    ):
        bar.button(
            text,
            key=KEY + text.lower(),
            on_click=_turn,
            args=(by,),
            disabled=view.page == end,
            shortcut=keys,
        )
    bar.number_input(
        f"Page of {count:,}",
        min_value=1,
        max_value=count,
        key=f"{KEY}jump",
        on_change=_jump,
        width=140,
    )
