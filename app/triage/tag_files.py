"""Finds the tag file of a pack, and applies the changes that a user makes with keys and buttons.

A short message about the effect of a change is shown in the next run.

If the next key has already arrived, Streamlit may end a callback wherever the callback reads the session
state. Therefore, a :class:`Person` is first created from the session state, and its methods do not read the
session state again. See :func:`xattn.app.components.key_actions`.
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
PERSON = "_person"  # the session state contains the person's unique name under this key


def store_of(pack: Pack, known: Callable[[], str] | None = None) -> Store:
    """The tag file of a pack.

    It is next to the folder of the pack. If that place is not writable, it is in the viewer's own folder,
    under a name derived from the identity of the pack's photos, which ``known`` returns.
    """
    known = known or partial(_identity, pack, ref(maps_table.table(pack)))
    beside = _beside(pack)
    if beside is not None and os.access(beside.parent, os.W_OK):
        return Store(beside, known)
    own = own_folder() / f"{known()[:32]}{SUFFIX}"
    with suppress(OSError):  # an error is reported later, when the file is written
        own.parent.mkdir(parents=True, exist_ok=True)
        if beside is not None and beside.is_file() and not beside.is_symlink() and not own.exists():
            shutil.copyfile(beside, own)
    return Store(own, known)


def usable_store(pack: Pack) -> Store | None:
    """The tag file of a pack, see :func:`store_of`; None if the file cannot be used."""
    store = store_of(pack)
    try:
        store.revision()
    except TagsError:
        return None
    return store


def place(pack: Pack) -> str:
    """A sentence for the page about the place where the tags of a pack are stored."""
    path = store_of(pack).path
    if pack.id.startswith("scratch-"):
        return "This pack is a live result: it is deleted with its tags when the viewer stops."
    if path != _beside(pack):
        return f"The folder of this pack is not writable, so its tags are kept in {path}."
    return f"Tags, notes and ratings are kept in {path.name}, beside the pack."


def own_folder() -> Path:
    """The viewer's folder for tags, ``xattn/tags`` in XDG_DATA_HOME or, by default, in ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "xattn" / "tags"


def session_person() -> str:
    """The unique name of this session's person, whose steps the session can undo."""
    return str(st.session_state.setdefault(PERSON, secrets.token_hex(8)))


def filter_photos(pack: Pack, view: Any) -> tuple[str, Collection[str]] | None:
    """The revision of the tag file, and the photos that pass the filters of a view for tags, rating, note
    and selection.

    The result is None if the view has no such filter. If the file cannot be used, no photo passes.
    """
    marked = bool(view.tag or view.rating or view.note != "any")
    if not (marked or view.only):
        return None
    store = store_of(pack)
    try:
        own = store.set_of(view.only) or () if view.only else None
        if (
            not marked
        ):  # no revision is needed, since the digest of a changed selection is different
            return ("" if own else "none"), own or ()
        found = store.photos(view.tag, view.rating, view.note == "with")
        return store.revision(), found if own is None else found.intersection(own)
    except TagsError:
        return "unusable", ()


def _beside(pack: Pack) -> Path | None:
    return None if pack.folder is None else pack.folder.with_name(pack.folder.name + SUFFIX)


_IDENTITIES: WeakKeyDictionary[Pack, str] = WeakKeyDictionary()


def _identity(pack: Pack, table: ref[MapsTable]) -> str:
    """The identity of a pack, see :func:`~xattn.app.triage.store.identity`.

    Since callbacks use it, it does not use Streamlit's caches. ``table`` is a weak reference, so that a
    session does not keep the table alive.
    """
    if (found := _IDENTITIES.get(pack)) is None:
        kept = table()
        found = identity(pack.image_ids if kept is None else kept.every_image_id())
        _IDENTITIES[pack] = found
    return found


SAID = "_triage_said"  # the session state contains pairs (message, whether it is an error) under this key


@dataclass(frozen=True)
class Person:
    """The person who uses a page of a pack, with the messages to show.

    Each person can undo only their own steps.
    """

    name: str
    store: Store
    messages: list[tuple[str, bool]]

    @classmethod
    def of(cls, pack: Pack) -> Person:
        """The person of the current session."""
        said = st.session_state.setdefault(SAID, [])
        return cls(session_person(), store_of(pack), said)

    def press(self, key: str, image_ids: Sequence[str]) -> None:
        """Handle a key: "1" to "9" toggle a tag; "undo" and "redo" affect the person's own steps."""
        self.change(lambda store, name: _press(store, name, key, image_ids))

    def change(self, act: Callable[[Store, str], object], text: str = "") -> bool:
        """Call ``act(store, name)``, and add a message: the text that it returns, or else ``text``.

        If it raises a :class:`TagsError`, the error becomes the message. Returns whether it succeeded.
        """
        try:
            told = act(self.store, self.name)
        except TagsError as error:
            self.messages.append((str(error), True))
            return False
        if text := told if isinstance(told, str) else text:
            self.messages.append((text, False))
        return True


def show_messages() -> None:
    """Show the stored messages; errors stay on the page, and other messages disappear after a moment."""
    said = st.session_state.get(SAID, [])
    while said:  # callbacks of earlier runs also append to this list
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
