"""Where the tags of a pack are stored, and who is changing them.

The effect of keys and buttons on photos is reported in a few words at the next run.

If the next key has arrived, Streamlit may end a callback wherever it reads the session. A :class:`Person`
is therefore created from the session first, and its actions do not read the session again. See
:func:`xattn.app.components.key_actions`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import streamlit as st

from xattn.app.state import plain
from xattn.app.triage import maps_table
from xattn.app.triage.maps_table import MapsTable
from xattn.app.triage.store import StepResult, Store, TagsError, identity
from xattn.runtime.names import count_phrase

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


SUFFIX = ".tags.sqlite"
PERSON = "_person"  # the session's key of its unique name


def store_of(pack: Pack, known: Callable[[], str] | None = None) -> Store:
    """The tag file of a pack: beside its folder, or if that is not writable, in the viewer's own folder
    under a name that depends on the pack's photos; ``known`` returns their identity."""
    known = known or partial(_identity, pack, ref(maps_table.table(pack)))
    beside = _beside(pack)
    if beside is not None and os.access(beside.parent, os.W_OK):
        return Store(beside, known)
    own = own_folder() / f"{known()[:32]}{SUFFIX}"
    with suppress(OSError):  # if this fails, the error is reported when the file is written
        own.parent.mkdir(parents=True, exist_ok=True)
        if beside is not None and beside.is_file() and not beside.is_symlink() and not own.exists():
            shutil.copyfile(beside, own)
    return Store(own, known)


def usable_store(pack: Pack) -> Store | None:
    """:func:`store_of`, or None if the file cannot be used."""
    store = store_of(pack)
    try:
        store.revision()
    except TagsError:
        return None
    return store


def place(pack: Pack) -> str:
    """A sentence for the page that says where a pack's tags are kept."""
    path = store_of(pack).path
    if pack.id.startswith("scratch-"):
        return "This pack is a live result: it is deleted with its tags when the viewer stops."
    if path != _beside(pack):
        return f"The folder of this pack is not writable, so its tags are kept in {path}."
    return f"Tags, notes and ratings are kept in {path.name}, beside the pack."


def own_folder() -> Path:
    """The viewer's folder for tags: ``xattn/tags`` in XDG_DATA_HOME, by default in ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "xattn" / "tags"


def session_person() -> str:
    """The name of the person whose steps this session can undo."""
    return str(st.session_state.setdefault(PERSON, secrets.token_hex(8)))


def filter_photos(pack: Pack, view: Any) -> tuple[str, Collection[str]] | None:
    """The revision of the tag file and the photos that pass a view's filters of tags, rating, note and
    selection.

    None if the view has no such filter. If the file cannot be used, no photo passes."""
    marked = bool(view.tag or view.rating or view.note != "any")
    if not (marked or view.only):
        return None
    store = store_of(pack)
    try:
        own = store.set_of(view.only) or () if view.only else None
        if not marked:  # a selection never changes under its digest
            return ("" if own else "none"), own or ()
        found = store.photos(view.tag, view.rating, view.note == "with")
        return store.revision(), found if own is None else found.intersection(own)
    except TagsError:
        return "unusable", ()


def _beside(pack: Pack) -> Path | None:
    return None if pack.folder is None else pack.folder.with_name(pack.folder.name + SUFFIX)


_IDENTITIES: WeakKeyDictionary[Pack, str] = WeakKeyDictionary()


def _identity(pack: Pack, table: ref[MapsTable]) -> str:
    """A key that identifies the pack. Callbacks use it, so it must not use Streamlit's caches, and a
    session must not keep the table alive."""
    if (found := _IDENTITIES.get(pack)) is None:
        kept = table()
        found = identity(pack.image_ids if kept is None else kept.every_image_id())
        _IDENTITIES[pack] = found
    return found


SAID = "_triage_said"  # the session's key of (message, whether something went wrong)


@dataclass(frozen=True)
class Person:
    """The person using a page of a pack, with the messages to show; steps are undone per person."""

    name: str
    store: Store
    messages: list[tuple[str, bool]]

    @classmethod
    def of(cls, pack: Pack) -> Person:
        """The person of this session."""
        said = st.session_state.setdefault(SAID, [])
        return cls(session_person(), store_of(pack), said)

    def press(self, key: str, image_ids: Sequence[str]) -> None:
        """Process a key: "1" to "9" toggle a tag, "undo" and "redo" apply to the person's own steps."""
        self.change(lambda store, name: _press(store, name, key, image_ids))

    def change(self, act: Callable[[Store, str], object], text: str = "") -> bool:
        """Call ``act(store, name)`` and store ``text``, or the text that it returns, as a message.

        Returns whether it succeeded."""
        try:
            told = act(self.store, self.name)
        except TagsError as error:
            self.messages.append((str(error), True))
            return False
        if text := told if isinstance(told, str) else text:
            self.messages.append((text, False))
        return True


def show_messages() -> None:
    """Show the stored messages: errors stay on the page, the rest disappears after a moment."""
    said = st.session_state.get(SAID, [])
    while said:  # callbacks of earlier runs append to this same list
        text, wrong = said.pop(0)
        (st.warning if wrong else st.toast)(plain(text))


def _press(store: Store, person: str, key: str, image_ids: Sequence[str]) -> str:
    if key in ("undo", "redo"):
        return _turned(store.undo(person) if key == "undo" else store.redo(person), key)
    tag = store.keys().get(int(key))
    if tag is None:
        return f"Key {key} has no tag yet. Give it one under Choose in the gallery."
    if not image_ids:
        return "No photo is chosen. Move to one with J, or choose some."
    on = store.toggle(person, image_ids, tag)
    return f"{'' if on else 'no longer '}{tag}: {count_phrase(len(image_ids), 'photo')}"


def _turned(done: StepResult | None, key: str) -> str:
    if done is None:
        return f"There is nothing to {key}."
    text = f"{'Undone' if key == 'undo' else 'Redone'}: {count_phrase(len(done.photos), 'photo')}"
    if done.n_kept:
        photos = count_phrase(done.n_kept, "photo")
        text += f"; {photos} unchanged, because somebody else has changed them since"
    return text
