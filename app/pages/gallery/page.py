"""The gallery: a pack's maps as pages of pictures, sorted, filtered and searched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.components import grid, sent_value, verdict
from xattn.app.components.look import STYLES as TITLES
from xattn.app.components.look import look_control
from xattn.app.navigation import address, chosen, exports, last_view
from xattn.app.navigation.exports import SIDE, look_of
from xattn.app.pages.gallery import marking
from xattn.app.pages.gallery.filters import chips, toolbar
from xattn.app.pages.gallery.marking import KEY, clear, from_widgets, go_to, to_widgets
from xattn.app.pictures.rendering import Look, blank_maps, legends, overlay_url, photo_url
from xattn.app.state import Context, plain, short
from xattn.app.triage import selection, tag_files
from xattn.app.triage.selection import ALL, NAMES, Choices, Selection, View
from xattn.app.triage.store import SLICE_LENGTH, TagsError
from xattn.app.triage.tag_files import Person
from xattn.pictures.contact_sheet import legends_html
from xattn.pictures.explained import probability_text
from xattn.runtime.names import count_phrase, visible

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def tools(bar: Any, pack: Pack, view: View) -> None:
    """Show a popover that saves this view, and opens, renames and deletes saved views."""
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
            on_click=lambda: Person.of(pack).change(
                lambda store, _: store.delete_slice(name), "Deleted."
            ),
        )
        st.text_input("New name", key=f"{KEY}slice_new", max_chars=SLICE_LENGTH)
        st.button("Rename", key=f"{KEY}slice_rename", on_click=_rename, args=(pack, name))


def _save(pack: Pack, text: str) -> None:
    name = str(st.session_state.get(f"{KEY}slice_name") or "")
    if Person.of(pack).change(lambda s, _: s.save_slice(name, text), f"Saved: {name}"):
        st.session_state[f"{KEY}slice_name"] = ""


def _rename(pack: Pack, name: str) -> None:
    new = str(st.session_state.get(f"{KEY}slice_new") or "")
    if Person.of(pack).change(lambda s, _: s.rename_slice(name, new), f"Renamed: {new}"):
        st.session_state[f"{KEY}slice_new"] = ""


def cell(
    pack: Pack,
    view: View,
    look: Look,
    choices: Choices,
    text: str,
    last: str | None,
    entry_id: str,
    row: dict[str, Any],
) -> dict[str, Any]:
    explained = short(row["target_name"])
    name, method = row["title"], pack.title_of(row["method"])
    lines = [method] if view.method == ALL else []
    if row["label_name"] and short(row["label_name"]) != explained:
        lines.append(f"true: {short(row['label_name'])}")
    lines.append(name)
    for key in dict.fromkeys(
        (view.sort, view.measure if view.low is not None or view.high is not None else "")
    ):
        if key == "confidence" and row["measure:confidence"] == row["probability"]:
            continue  # already shown
        if key in choices.measures and key != "probability":
            lines.append(f"{choices.measures[key].name}: {_figure(key, row[f'measure:{key}'])}")
    photo = photo_url(pack, row["image_id"], SIDE, entry_id if look.crop else None)
    source, alt = photo, f"Photo {name}"
    if view.show != "photo":
        source = overlay_url(pack, entry_id, look)
        alt = f"Map by {method} of {explained} on {name}"
    return {
        "id": entry_id,
        "src": source,
        "bare": None if view.show == "photo" else photo,
        "alt": alt,
        "title": explained,
        "value": probability_text(row["probability"], row["is_value"]),
        "lines": lines,
        "badge": verdict(row["right"]),
        "selected": row["image_id"] == last,
        "href": state.link("image", pack=pack.id, image=row["image_id"], view=text or None),
    }


def _figure(key: str, value: float) -> str:
    if value != value:
        return "none"
    return f"{value:.1%}" if key == "confidence" else f"{value:.3g}"


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
    tag_files.show_messages()
    view = toolbar(pack, view, table.choices)
    chips(view, table.choices)
    found = selection.select(pack, view)
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
        _nothing()
    else:
        look = look_of(pack, view, list(shown.index))
        if view.show != "photo":
            st.html(legends_html(legends(pack, list(shown.index), look)))
        last = _last(pack)
        marks = marking.marks(pack, shown["image_id"])
        now = set(chosen.chosen_photos(pack))
        cells = [
            cell(pack, view, look, table.choices, text, last, entry_id, row)
            | {
                "photo": row["image_id"],
                "chosen": row["image_id"] in now,
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
            on_act=partial(marking.apply_actions, pack, CELLS),
        )
        if note := blank_maps(pack, shown.index, table.title) if view.show != "photo" else "":
            st.caption(plain(note))
        _below(pack, view, found, count)
    if messages or beyond or not seeded:
        _to_url(pack, view, table.choices)
    last_view.remember(pack, text)


# ---------------------------------------------------------------------- the URL


def _from_url(pack: Pack, choices: Choices) -> tuple[View, list[str], bool]:
    """The view, messages about the URL, and whether the view comes from the URL instead of the widgets.

    It comes from the URL if the URL is new. Back may lead to the address of an image that was opened on
    this page; its ``view`` is the view of this page. The menu's address has no parameters and leads to
    the last view of the gallery.
    """
    url = _url()
    subject = (pack.id, pack.version)
    known = f"{KEY}sort" in st.session_state and st.session_state.get("_gallery") == subject
    st.session_state["_gallery"] = subject
    if not address.is_new("gallery", url, known):
        return from_widgets(choices), [], False
    messages: list[str] = []
    left = "" if url or address.back() else last_view.last_text(pack)
    if left or "view" in url:
        view = selection.from_text(left or url["view"][-1], choices)
    else:
        view, messages = selection.parse(url, choices)
    to_widgets(view, NAMES)
    address.record_address("gallery", url)
    return view, messages, not left


def _url() -> dict[str, list[str]]:
    """The URL's parameters without the pack and the chosen photos."""
    others = [name for name in st.query_params if name not in ("pack", state.CHOSEN)]
    return {name: st.query_params.get_all(name) for name in others}


def _to_url(pack: Pack, view: View, choices: Choices) -> None:
    """Write the view to the URL, unless it is already there."""
    wanted = view.params(choices)
    address.record_address("gallery", wanted)
    if _url() != wanted:
        kept = {n: st.query_params[n] for n in (state.CHOSEN,) if n in st.query_params}
        st.query_params.from_dict({"pack": pack.id, **kept, **wanted})


def _last(pack: Pack) -> str | None:
    """The image that was opened last; it is marked when the person comes back."""
    of, image_id = st.session_state.get("_opened", (None, None))
    return st.query_params.get("image", image_id if of == pack.id else None)


# ---------------------------------------------------------------------- actions


def _opened(pack: Pack, choices: Choices) -> None:
    """Go to the image, before this page runs again."""
    opened = sent_value(CELLS, "open")
    image_id = selection.table(pack).image_of_map(opened) if isinstance(opened, str) else None
    if image_id is not None:
        text = selection.to_text(from_widgets(choices), choices)
        st.session_state["_opened"] = (pack.id, image_id)
        last_view.remember(pack, text)
        state.go("image", image=image_id, view=text or None)


def _turned() -> None:
    by = sent_value(CELLS, "turn")
    if by is not None:
        go_to(max(1, st.session_state.get(f"{KEY}page", 1) + (1 if by == 1 else -1)))


# ---------------------------------------------------------------------- the page's parts


def _line(
    pack: Pack, view: View, choices: Choices, found: Selection, start: int, shown: list[str]
) -> View:
    """Show the number of maps, the chosen photos, and how maps are drawn; returns the view.
    ``shown`` are the photos of the page's maps."""
    text = _count(found.count, start, len(shown))
    if view.filters:
        text += f", filtered from {selection.select(pack, view.unfiltered()).count:,}"
    line = st.container(horizontal=True, vertical_alignment="center", gap="small")
    line.caption(text, width="content")
    line.space("stretch")
    marking.tools(line, pack, list(dict.fromkeys(shown)), found)
    tools(line, pack, view)
    look_control(line, KEY, styles=TITLES | {"photo": "Photo"}, style="show")
    return from_widgets(choices)


def _count(count: int, start: int, shown: int) -> str:
    """The number of maps as text, and which of them the page shows if not all."""
    if count == 0:
        return "No maps"
    maps = count_phrase(count, "map")
    if shown == count:
        return maps
    if shown == 1:
        return f"Map {start + 1:,} of {count:,}"
    return f"{start + 1:,} to {start + shown:,} of {maps}"


def _nothing() -> None:
    with st.container(border=True):
        st.markdown("**No map passes these filters.**")
        st.caption(
            "Shorten the search, or widen the range. A map without a value of the chosen measure is always "
            "outside its range."
        )
        st.button("Show all maps", key=f"{KEY}all_maps", on_click=clear)


def _below(pack: Pack, view: View, found: Selection, count: int) -> None:
    """Show links to other pages, and files of the selection."""
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    if count > 1:
        _pager(bar, view, count)
    bar.space("stretch")
    with bar.popover("Export"):
        exports.files(pack, view, KEY)
    st.caption("Press ? for a list of the keys, / to search.")


def _pager(bar: Any, view: View, count: int) -> None:
    st.session_state[f"{KEY}jump"] = view.page
    before, after = (n if 1 <= n <= count else None for n in (view.page - 1, view.page + 1))
    last_view.steps(bar, KEY, before, after, go_to)
    bar.number_input(
        f"Page of {count:,}",
        min_value=1,
        max_value=count,
        key=f"{KEY}jump",
        on_change=lambda: go_to(int(st.session_state[f"{KEY}jump"])),
        width=140,
    )
