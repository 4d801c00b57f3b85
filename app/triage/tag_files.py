"""Where the tags of a pack are kept, and who is changing them.

What keys and buttons do to photos, told in a few words at the next run.

Streamlit may end a callback wherever it reads the session, because the next key is there. So a
:class:`Person` is made of the session first; what it does then reads the session no more. See
:func:`xattn.app.components.acts`.
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
from xattn.app.triage.store import Store, TagsError, Undone, identity
from xattn.runtime.names import counted

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


SUFFIX = ".tags.sqlite"
PERSON = "_person"  # the session's key of a name that nobody else has


def store_of(pack: Pack) -> Store:
    """The tag file of a pack: beside its folder; where nothing can be written, in a folder of the viewer's
    own, by what photos the pack has."""
    known = partial(_identity, pack, ref(maps_table.table(pack)))
    beside = _beside(pack)
    if beside is not None and os.access(beside.parent, os.W_OK):
        return Store(beside, known)
    own = own_folder() / f"{known()[:32]}{SUFFIX}"
    with suppress(OSError):  # what cannot be made here is told when it is written to
        own.parent.mkdir(parents=True, exist_ok=True)
        if beside is not None and beside.is_file() and not beside.is_symlink() and not own.exists():
            shutil.copyfile(beside, own)
    return Store(own, known)


def usable_store(pack: Pack) -> Store | None:
    """:func:`store_of`, None where the file cannot be used."""
    store = store_of(pack)
    try:
        store.revision()
    except TagsError:
        return None
    return store


def place(pack: Pack) -> str:
    """Where a pack's tags are kept, in a sentence for the page."""
    path = store_of(pack).path
    if pack.id.startswith("scratch-"):
        return "This pack is a live result: its tags end with it, when the viewer stops."
    if path != _beside(pack):
        return f"Nothing can be written beside this pack, so its tags are kept in {path}."
    return f"Tags, notes and ratings are kept in {path.name}, beside the pack."


def own_folder() -> Path:
    """The viewer's own folder for tags: ``xattn/tags`` below XDG_DATA_HOME, by default ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "xattn" / "tags"


def person() -> str:
    """Whose steps this session can undo."""
    return str(st.session_state.setdefault(PERSON, secrets.token_hex(8)))


def filtered(pack: Pack, view: Any) -> tuple[str, Collection[str]] | None:
    """The photos that pass a view's filters of tags, rating and note, with the revision of the tag file;
    None if it has no such filter. Of a file that cannot be used no photo passes."""
    if not (view.tag or view.rating or view.note != "any"):
        return None
    store = store_of(pack)
    try:
        return store.revision(), store.photos(view.tag, view.rating, view.note == "with")
    except TagsError:
        return "unusable", ()


def _beside(pack: Pack) -> Path | None:
    return None if pack.folder is None else pack.folder.with_name(pack.folder.name + SUFFIX)


_IDENTITIES: WeakKeyDictionary[Pack, str] = WeakKeyDictionary()


def _identity(pack: Pack, table: ref[MapsTable]) -> str:
    """What tells the pack from others. Callbacks ask for it, so it must not use a cache of Streamlit; and a
    session must not keep the table alive."""
    if (found := _IDENTITIES.get(pack)) is None:
        kept = table()
        found = identity(pack.image_ids if kept is None else kept.every_image_id())
        _IDENTITIES[pack] = found
    return found


SAID = "_triage_said"  # the session's key of (what to tell, whether it went wrong)


@dataclass(frozen=True)
class Person:
    """Somebody at a page of a pack: whose steps can be undone, and what is to be told."""

    name: str
    store: Store
    said: list[tuple[str, bool]]

    @classmethod
    def of(cls, pack: Pack) -> Person:
        """The person of this session."""
        said = st.session_state.setdefault(SAID, [])
        return cls(person(), store_of(pack), said)

    def press(self, key: str, image_ids: Sequence[str]) -> None:
        """Do what a key says: "1" to "9" toggle a tag, "undo" and "redo" are of the person's steps."""
        self.change(lambda store, name: _press(store, name, key, image_ids))

    def change(self, act: Callable[[Store, str], object], text: str = "") -> bool:
        """Call ``act(store, name)``, and keep ``text``, or the text that it returns, to be told; whether it
        succeeded."""
        try:
            told = act(self.store, self.name)
        except TagsError as error:
            self.said.append((str(error), True))
            return False
        if text := told if isinstance(told, str) else text:
            self.said.append((text, False))
        return True


def say() -> None:
    """Tell what was kept: what went wrong stays on the page, the rest is gone in a moment."""
    said = st.session_state.get(SAID, [])
    while said:  # callbacks of earlier runs write into this very list
        text, wrong = said.pop(0)
        (st.warning if wrong else st.toast)(plain(text))


def _press(store: Store, person: str, key: str, image_ids: Sequence[str]) -> str:
    if key in ("undo", "redo"):
        return _turned(store.undo(person) if key == "undo" else store.redo(person), key)
    tag = store.keys().get(int(key))
    if tag is None:
        return f"Key {key} has no tag yet. Give it one under Tags in the gallery."
    if not image_ids:
        return "No photo is chosen. Move to one with J, or choose some."
    on = store.toggle(person, image_ids, tag)
    return f"{'' if on else 'no longer '}{tag}: {counted(len(image_ids), 'photo')}"


def _turned(done: Undone | None, key: str) -> str:
    if done is None:
        return f"There is nothing to {key}."
    text = f"{'Undone' if key == 'undo' else 'Done again'}: {counted(len(done.photos), 'photo')}"
    if done.stayed:
        text += f"; {counted(done.stayed, 'photo')} stay as somebody else has changed them since"
    return text
