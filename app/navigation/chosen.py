"""The selection: the photos of the open pack that a person has chosen, which are the same on every page.

Photos can be chosen with a lasso, a filter, a cell of the confusion matrix, a group, a list on the page Two
runs, or single clicks. The session holds their ids. At the end of each run, the ids are stored in the
pack's tag file under a digest, and the digest is written to the address, so that a reload, another tab or a
link finds the same photos.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import state
from xattn.app.navigation import address, exports, last_view
from xattn.app.state import CHOSEN, plain
from xattn.app.triage import selection, tag_files
from xattn.app.triage.selection import View
from xattn.app.triage.store import MOST_AT_ONCE, TagsError
from xattn.app.triage.tag_files import Person
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

KEY = "chosen."  # prefix of the widgets' keys
HELD = "_chosen"  # the session's key of its :class:`ChosenPhotos`
STARS = "_stars"  # the session's key of the :class:`_Stars` of the bar


@dataclass
class ChosenPhotos:
    """The chosen photos of a pack in a session."""

    pack: str
    ids: list[str] = field(default_factory=list)  # in the order of choosing
    saved: list[str] = field(default_factory=list)  # what ``digest`` is of
    digest: str = ""  # "" for no photo, and if the tag file cannot be used
    known: set[str] = field(default_factory=set)  # digests that this session has shown


def _held(pack: Pack) -> ChosenPhotos:
    held: ChosenPhotos | None = st.session_state.get(HELD)
    if held is None or held.pack != pack.id:
        held = st.session_state[HELD] = ChosenPhotos(pack.id)
    return held


def chosen_photos(pack: Pack) -> list[str]:
    """The chosen photos of this pack, in the order of choosing; this is the session's own list, which may
    be changed in place."""
    return _held(pack).ids


def follow_address(pack: Pack) -> None:
    """Choose the photos that the address names if it comes from another tab, a link or Back."""
    held, digest = _held(pack), st.query_params.get(CHOSEN)
    if not digest or (digest in held.known and not address.back()):
        return
    ids = None
    with suppress(TagsError):  # the page says why
        ids = tag_files.store_of(pack).set_of(digest[:100])
    known = selection.table(pack).known_images(ids or [])
    held.known.add(digest)
    if known:
        held.ids[:] = [i for i in ids or [] if i in known]
    else:
        st.warning("The photos chosen in this address are no longer kept; none is chosen.")


def digest(pack: Pack) -> str:
    """Store the chosen photos in the tag file, and return their digest for the address; "" if that fails or
    no photo is chosen."""
    held = _held(pack)
    if held.ids != held.saved:
        ids, found = list(held.ids), ""
        with suppress(TagsError):  # the gallery says why
            found = tag_files.store_of(pack).keep_set(ids)
        held.saved, held.digest = ids, found if ids else ""
        held.known.add(held.digest)
    return held.digest


def choose(person: Person, ids: list[str], wanted: Sequence[str], count: int = 0) -> None:
    """Replace the chosen photos ``ids`` of a pack by ``wanted``; ``count`` is the number of all photos to
    choose if ``wanted`` lists only some of them."""
    if len(wanted) > MOST_AT_ONCE:
        text = (
            f"{max(len(wanted), count):,} photos are in this selection; at most {MOST_AT_ONCE:,} can be "
            f"chosen at once. Filter for fewer."
        )
        person.messages.append((text, True))
    else:
        ids[:] = wanted


def button(pack: Pack, photos: Sequence[str], key: str, place: Any = st) -> None:
    """A button that chooses these photos."""
    now = chosen_photos(pack)
    place.button(
        f"Choose these {len(photos):,} photos" if len(photos) > 1 else "Choose this photo",
        key=key,
        disabled=set(now) == set(photos),
        on_click=lambda: choose(Person.of(pack), now, list(photos)),
    )


def show_bar(pack: Pack, page: str) -> None:
    """Show the bar of the chosen photos, and write their digest to the address; called after the page has
    run."""
    wanted = digest(pack)
    if now := chosen_photos(pack):
        _bar(pack, page, now)
    tag_files.show_messages()
    held = _held(pack)
    if held.ids and not wanted:
        held.saved = []  # they could not be kept, perhaps for a moment; the next run tries again
    if st.query_params.get(CHOSEN, "") != wanted:
        if wanted:
            st.query_params[CHOSEN] = wanted
        else:
            st.query_params.pop(CHOSEN, None)


def view_of(pack: Pack) -> View:
    """A gallery view of only the chosen photos, which are drawn and sorted as in the last view."""
    choices = selection.table(pack).choices
    last = selection.from_text(last_view.last_text(pack), choices)
    return replace(last.unfiltered(), only=digest(pack))


# ---------------------------------------------------------------------- the bar


def _bar(pack: Pack, page: str, now: list[str]) -> None:
    with st.container(key="chosen-bar"):
        bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    photo = st.query_params.get("image")
    number = now.index(photo) + 1 if photo in now else 0
    text = f"{number:,} of {len(now):,} chosen" if number else f"{len(now):,} chosen"
    bar.markdown(f"**{text}**", width="content")
    if held := digest(pack):
        for name, label in (("gallery", "Gallery"), ("image", "One by one"), ("photomap", "Map")):
            if name != page or name != "photomap":
                bar.button(
                    label, key=f"{KEY}{name}", on_click=_show, args=(pack, name, held, now[0])
                )
    if STARS in st.session_state:
        _rate(Person.of(pack), st.session_state[STARS])  # its callback may have been cut off
    tags = bar.popover("Tag", key=f"{KEY}tags", on_change="rerun")
    if tags.open:
        with tags:
            try:
                _tagging(Person.of(pack), now)
            except TagsError as error:
                st.caption(plain(error))
    if held:
        exported = bar.popover("Export", key=f"{KEY}export", on_change="rerun")
        if exported.open:
            with exported:
                exports.files(pack, view_of(pack), KEY)
    bar.button("Clear", key=f"{KEY}none", type="tertiary", on_click=now.clear)


def _show(pack: Pack, page: str, digest: str, first: str) -> None:
    """Show the chosen photos on another page."""
    choices, view = selection.table(pack).choices, view_of(pack)
    if page == "gallery":
        last_view.to_gallery(pack, view)
    elif page == "image":
        state.go(page, image=first, view=selection.to_text(view, choices), **{CHOSEN: digest})
    state.go(page, **{CHOSEN: digest})


def _tagging(person: Person, now: Sequence[str]) -> None:
    """Show widgets for tags and stars of the chosen photos."""
    known = dict.fromkeys((*person.store.keys().values(), *person.store.counts()))
    st.selectbox(
        "Tag for the chosen photos",
        list(known),
        key=f"{KEY}tag_name",
        index=None,
        accept_new_options=True,
        placeholder="Choose a tag, or type a new one",
    )
    row = st.container(horizontal=True, gap="small", vertical_alignment="center")
    for text, on in (("Add tag", True), ("Remove tag", False)):
        row.button(text, key=f"{KEY}tag_{on}", on_click=_tag, args=(person, now, on))
    for text, key in (("Undo", "undo"), ("Redo", "redo")):
        row.button(text, key=KEY + key, type="tertiary", on_click=person.press, args=(key, []))
    _rating(person, now)


@dataclass
class _Stars:
    """A stars widget for some photos that is used once and then replaced by a new one.

    The browser sends a widget's value with every request, so old stars would be given to whichever photos
    are chosen by then.
    """

    number: int
    ids: list[str]
    given: bool = False

    @property
    def key(self) -> str:
        return f"{KEY}stars {self.number}"


def _rating(person: Person, now: Sequence[str]) -> None:
    """Show stars for the chosen photos, and a button that removes them."""
    last: _Stars | None = st.session_state.get(STARS)
    held = _Stars(0 if last is None else last.number + last.given, list(now))
    st.session_state[STARS] = held
    row = st.container(horizontal=True, gap="small", vertical_alignment="center")
    row.feedback("stars", key=held.key, on_change=_rate, args=(person, held))
    row.button(
        "No stars",
        key=f"{KEY}no_stars",
        type="tertiary",
        on_click=_give,
        args=(person, held.ids, 0),
    )


def _rate(person: Person, held: _Stars) -> None:
    stars = st.session_state.get(held.key)
    if stars is not None and not held.given:
        held.given = True
        _give(person, held.ids, int(stars) + 1)


def _give(person: Person, ids: Sequence[str], rating: int) -> None:
    text = f"{'★' * rating or 'No stars'}: {count_phrase(len(ids), 'photo')}"
    person.change(lambda store, name: store.set_rating(name, ids, rating), text)


def _tag(person: Person, ids: Sequence[str], on: bool) -> None:
    tag = str(st.session_state.get(f"{KEY}tag_name") or "")
    add, drop = ([tag], []) if on else ([], [tag])
    text = f"{'' if on else 'no longer '}{tag}: {count_phrase(len(ids), 'photo')}"
    person.change(lambda store, name: store.change_tags(name, ids, add, drop), text)
