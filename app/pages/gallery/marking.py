"""Handles the choosing, tagging and rating of photos in the gallery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import components
from xattn.app.navigation.chosen import choose, chosen_photos
from xattn.app.state import plain
from xattn.app.triage import selection, tag_files
from xattn.app.triage.selection import NAMES, NOTES, RATINGS, Choices, View
from xattn.app.triage.store import KEYS, MOST_AT_ONCE, TAG_LENGTH, Mark, Store, TagsError
from xattn.app.triage.tag_files import Person
from xattn.runtime.names import count_phrase, visible

if TYPE_CHECKING:
    from xattn.app.triage.selection import Selection
    from xattn.packs.reader import Pack


# Prefix of this page's session keys: the names of a view are also keys of other pages' widgets, and a value
# whose widget this page does not show would remain there.
KEY = "gallery."


def to_widgets(view: View, names: Iterable[str]) -> None:
    """Store these values of the view in the session, where the next widgets read them."""
    for name in names:
        value = getattr(view, name)
        st.session_state[KEY + name] = list(value) if isinstance(value, tuple) else value


def from_widgets(choices: Choices) -> View:
    kept = {name: KEY + name for name in NAMES}
    values = {n: st.session_state[key] for n, key in kept.items() if key in st.session_state}
    for name in ("label", "predicted", "tag"):
        values[name] = tuple(values.get(name) or ())
    values["q"] = " ".join(str(values.get("q") or "").split())[: selection.SEARCH_LENGTH]
    return replace(selection.defaults(choices), **values)


def go_to(number: int) -> None:
    st.session_state[f"{KEY}page"] = number


def restart() -> None:
    go_to(1)


def clear() -> None:
    """Clear all filters; the widgets of the next run show this."""
    to_widgets(View(), selection.UNFILTERED)
    new_range()


def drop(name: str, value: str) -> None:
    """Remove a filter; of a filter by class or tag, remove only the value ``value``."""
    if name in ("label", "predicted", "tag"):
        kept = [key for key in st.session_state[KEY + name] if key != value]
        st.session_state[KEY + name] = kept
        restart()
    elif name == "measure":
        new_range()
    else:
        to_widgets(View(), [name])
        restart()


def new_range() -> None:
    """Clear the range and the brush."""
    to_widgets(View(), ("low", "high"))
    typed_range()


def typed_range() -> None:
    """Clear the brush of the histogram because a range was typed."""
    turn = f"{KEY}brush"
    st.session_state[turn] = st.session_state.get(turn, 0) + 1
    restart()


def brush_key(measure: str) -> str:
    """The key of a measure's histogram, which changes whenever a range is typed."""
    return f"{KEY}brush {measure} {st.session_state.get(f'{KEY}brush', 0)}"


SHOWN = 3  # most tags on a cell


def apply_actions(pack: Pack, cells: str) -> None:
    """Process the keys and clicks of a person in the grid whose key is ``cells``."""
    person, ids, table = Person.of(pack), chosen_photos(pack), selection.table(pack)

    def known(value: Any) -> list[str]:
        """The values that are ids of photos in this pack."""
        found = [i for i in value if isinstance(i, str)] if isinstance(value, list) else []
        own = table.known_images(found)
        return [i for i in dict.fromkeys(found) if i in own]

    for act in components.key_actions(cells):
        if "of" in act:
            of, wanted = set(known(act["of"])), known(act.get("chosen"))
            choose(person, ids, [*(i for i in ids if i not in of), *wanted])
        elif act.get("key") == "escape":
            ids.clear()
        elif act.get("key") in (*map(str, KEYS), "undo", "redo"):
            person.press(act["key"], ids or known([act.get("photo")]))


def badges(mark: Mark | None) -> list[str]:
    """The texts on the picture of a photo."""
    if mark is None:
        return []
    more = len(mark.tags) - SHOWN
    return [
        *mark.tags[:SHOWN],
        *([f"+{more}"] if more > 0 else []),
        *(["★" * mark.rating] if mark.rating else []),
        *(["note"] if mark.note else []),
    ]


def marks(pack: Pack, image_ids: Iterable[str]) -> Mapping[str, Mark]:
    """The marks of photos; empty if the tag file cannot be used, see :func:`check`."""
    try:
        return tag_files.store_of(pack).marks(list(image_ids))
    except TagsError:
        return {}


def check(pack: Pack) -> None:
    """Show a warning if the pack's tag file cannot be used; the page is then shown without tags."""
    try:
        tag_files.store_of(pack).revision()
    except TagsError as error:
        st.warning(plain(error))


# ---------------------------------------------------------------------- the page's parts


def filters(pack: Pack, asked: Sequence[str]) -> None:
    """Show filters by tag, rating and note; ``asked`` are the tags by which the view filters."""
    try:
        counts = tag_files.store_of(pack).counts()
    except TagsError:
        counts = {}
    st.multiselect(
        "Tags",
        list(dict.fromkeys((*counts, *asked))),
        key=f"{KEY}tag",
        format_func=lambda tag: visible(f"{tag} ({counts.get(tag, 0):,})"),
        placeholder="Any tag, or none",
        on_change=restart,
    )
    for name, title, names in (("rating", "Rating", RATINGS), ("note", "Note", NOTES)):
        st.selectbox(
            title, list(names), key=KEY + name, format_func=names.__getitem__, on_change=restart
        )


def tools(bar: Any, pack: Pack, shown: Sequence[str], found: Selection) -> None:
    """Show a popover in which a person chooses photos and assigns tags to keys; ``shown`` lists the photos
    on this page."""
    now, person = chosen_photos(pack), Person.of(pack)
    with bar.popover("Choose", key=f"{KEY}tags"):
        row = st.container(horizontal=True, gap="small")
        row.button(
            f"This page ({len(shown):,})",
            key=f"{KEY}choose_page",
            on_click=lambda: choose(person, now, list(dict.fromkeys((*now, *shown)))),
        )
        row.button(
            f"All {count_phrase(len(found.images), 'photo')} that pass the filters",
            key=f"{KEY}choose_all",
            on_click=lambda: choose(person, now, found.photos(MOST_AT_ONCE + 1), len(found.images)),
        )
        try:
            _keys(pack, person.store)
        except TagsError as error:
            st.caption(plain(error))
        st.caption(plain(tag_files.place(pack)))


def _keys(pack: Pack, store: Store) -> None:
    """Show and change which tags the keys 1 to 9 toggle."""
    now = store.keys()
    st.caption(
        "To choose photos, tick the box on a picture, click with Ctrl or Shift, or press X. The keys "
        "toggle tags on the chosen photos, or on the one in focus."
    )
    with st.expander("Tags of the keys 1 to 9"), st.form(f"{KEY}keys", border=False):
        columns = st.columns(3)
        for key in KEYS:
            columns[(key - 1) % 3].text_input(
                f"Key {key}",
                value=now.get(key, ""),
                key=f"{KEY}key{key} {now.get(key, '')}",
                max_chars=TAG_LENGTH,
            )
        names = {key: f"{KEY}key{key} {now.get(key, '')}" for key in KEYS}
        st.form_submit_button("Save the keys", on_click=_save_keys, args=(pack, names))


def _save_keys(pack: Pack, names: Mapping[int, str]) -> None:
    wanted = {key: str(st.session_state.get(name) or "") for key, name in names.items()}
    Person.of(pack).change(lambda store, _: store.set_keys(wanted), "The keys are saved.")
