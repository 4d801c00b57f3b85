"""Tags, stars and a note of the photo that is shown, and the keys that set them and move on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import streamlit as st

from xattn.app import components
from xattn.app.navigation import address, last_view, selection
from xattn.app.navigation.selection import View
from xattn.app.state import plain
from xattn.app.triage import keyboard
from xattn.app.triage.journal import Mark
from xattn.app.triage.keyboard import Person
from xattn.app.triage.store import KEYS, NOTE_LENGTH, Store, TagsError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

PRESSED = "image.keys"  # the component of the keys
BESIDE = "_beside"  # the session's key of the photos before and after one, by its id
REPLACED = "_replaced"  # the session's key of how often each widget was replaced
HELD = "_note"  # the session's key of the :class:`_Held` of the page's note
PLACE = (
    "_place"  # the session's key of where keys are: {"at": photo, "keys": whether they led there}
)


def neighbours(pack: Pack, view: View, image_id: str) -> tuple[str | None, str | None, int, int]:
    """:func:`selection.neighbours`; of a photo that has just left the selection, because its tags were
    changed, those that it had."""
    before, after, number, count = selection.neighbours(pack, view, image_id)
    kept: dict[str, tuple[str | None, str | None]] = st.session_state.setdefault(BESIDE, {})
    if number:
        kept.clear()
        kept[image_id] = before, after
    return *kept.get(image_id, (before, after)), number, count


def image_of_page(pack: Pack, show: Callable[[str], None]) -> str:
    """The photo to show: that of the URL, unless keys have led on from there. The next key may be pressed
    before the browser knows the URL of the photo to which the ones before led."""
    place = _place()
    with place.lock:
        if st.query_params.get("image") in place.passed and not address.back():
            show(place.at)
        else:
            place.passed.clear()
        place.at = last_view.image_of_url(pack)
        return place.at


def leave() -> None:
    """Forget where keys have led: somebody goes on by other ways."""
    _place().passed.clear()


@dataclass
class _Place:
    """Where keys are: at a photo, having passed others whose URL the browser may still have. While a run
    takes up keys, the one before may be under way."""

    at: str = ""
    passed: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)  # type: ignore[valid-type]


def _place() -> _Place:
    found: _Place = st.session_state.setdefault(PLACE, _Place())
    return found


@dataclass
class _Held:
    """What a widget of a photo was given, or what was taken up from it since."""

    image_id: str
    key: str
    value: Any


def marks(pack: Pack, view: View, image_id: str) -> None:
    """What people say of this photo, and the keys for it."""
    keyboard.say()
    person = Person.of(pack)
    _late_note(person)
    try:
        mark = person.store.marks([image_id]).get(image_id, Mark())
        tags = person.store.keys()
        known = dict.fromkeys((*tags.values(), *person.store.counts(), *mark.tags))
    except TagsError as error:
        st.warning(plain(error))
        return
    bar = st.container(horizontal=True, vertical_alignment="bottom", gap="small")
    held = _Held(image_id, _key(f"tags of {image_id}", list(mark.tags)), list(mark.tags))
    bar.multiselect(
        "Tags",
        list(known),
        default=held.value,
        key=held.key,
        accept_new_options=True,
        placeholder="Choose tags, or type a new one",
        on_change=_tag,
        args=(person, held),
        width=420,
    )
    held = _Held(image_id, _key(f"note of {image_id}", mark.note), mark.note)
    st.session_state[HELD] = held
    bar.text_area(
        "Note",
        held.value,
        key=held.key,
        height=68,
        max_chars=NOTE_LENGTH,
        on_change=_note,
        args=(person, held),
        width="stretch",
    )
    stars = mark.rating - 1 if mark.rating else None
    held = _Held(image_id, _key(f"stars of {image_id}", stars), stars)
    bar.feedback("stars", key=held.key, default=stars, on_change=_rate, args=(person, held))
    names = [f"{number} {tag}" for number, tag in tags.items()]
    st.caption(plain(" · ".join([*names, "J next", "K previous", "Z undo", "Shift+Z redo"])))
    components.keys(
        [*map(str, KEYS), "j", "k", "undo", "redo"],
        PRESSED,
        on_act=lambda: _pressed(pack, view),
    )


def _key(what: str, value: object) -> str:
    """The key of the widget that holds what the tag file has.

    A widget is replaced when its value was changed by other ways than itself: the browser may still send
    what it held before, and that would be taken for a change.
    """
    replaced: dict[str, int] = st.session_state.setdefault(REPLACED, {})
    key = f"{what}, {replaced.get(what, 0)}"
    if key in st.session_state and not _same(st.session_state[key], value):
        replaced[what] = replaced.get(what, 0) + 1
        key = f"{what}, {replaced[what]}"
    return key


def _same(held: Any, value: Any) -> bool:
    """Whether a widget holds what the tag file has, which keeps tags sorted and texts trimmed."""
    if isinstance(held, list) and isinstance(value, list):
        return {" ".join(tag.split()) for tag in held} == set(value)
    return (held.strip() if isinstance(held, str) else held) == value


def _tag(person: Person, held: _Held) -> None:
    wanted = list(st.session_state[held.key])
    was, held.value = held.value, wanted
    add, drop = [t for t in wanted if t not in was], [t for t in was if t not in wanted]
    if add or drop:
        person.change(lambda store, name: store.change_tags(name, [held.image_id], add, drop))


def _note(person: Person, held: _Held) -> None:
    note = str(st.session_state[held.key] or "").strip()
    was, held.value = held.value, note

    def act(store: Store, name: str) -> str | None:
        alone = store.set_note(name, held.image_id, note, was)
        return None if alone else "Somebody else wrote a note meanwhile; both are kept."

    if note != was:
        person.change(act)


def _late_note(person: Person) -> None:
    """Take up a note whose callback ended where it read the session, because a key was pressed next."""
    held: _Held | None = st.session_state.get(HELD)
    if held is not None and held.key in st.session_state:
        _note(person, held)


def _rate(person: Person, held: _Held) -> None:
    stars = st.session_state[held.key]
    was, held.value = held.value, stars
    rating = 0 if stars is None else int(stars) + 1
    if stars != was:
        person.change(lambda store, name: store.set_rating(name, [held.image_id], rating))


def _pressed(pack: Pack, view: View) -> None:
    """Take up keys: each is of the photo to which the keys before it led."""
    person, place = Person.of(pack), _place()
    kept, found = st.session_state.get(BESIDE, {}), selection.selected(pack, view)
    with place.lock:
        for act in components.acts(PRESSED):
            key = act.get("key")
            if key in ("j", "k"):
                before, after, number, _ = found.neighbours(place.at)
                if not number:
                    before, after = kept.get(place.at, (None, None))
                if to := after if key == "j" else before:
                    place.passed.add(place.at)
                    place.passed.discard(to)
                    place.at = to
                else:
                    person.said.append(
                        (f"This is the {'last' if key == 'j' else 'first'} photo.", False)
                    )
            elif key in (*map(str, KEYS), "undo", "redo"):
                person.press(key, [place.at])
