"""What keys and buttons do to photos, told in a few words at the next run.

Streamlit may end a callback wherever it reads the session, because the next key is there. So a
:class:`Person` is made of the session first; what it does then reads the session no more. See
:func:`xattn.app.components.acts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app.state import plain
from xattn.app.triage import tag_files
from xattn.app.triage.journal import Undone
from xattn.app.triage.store import Store, TagsError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

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
        return cls(tag_files.person(), tag_files.store_of(pack), said)

    def press(self, key: str, image_ids: Sequence[str]) -> None:
        """Do what a key says: "1" to "9" toggle a tag, "undo" and "redo" are of the person's steps."""
        self.change(lambda store, name: _press(store, name, key, image_ids))

    def change(self, act: Callable[[Store, str], str | None]) -> bool:
        """Call ``act(store, name)`` and keep what it returns to be told; whether it succeeded."""
        try:
            text = act(self.store, self.name)
        except TagsError as error:
            self.said.append((str(error), True))
            return False
        if text:
            self.said.append((text, False))
        return True


def change(pack: Pack, act: Callable[[Store, str], str | None]) -> bool:
    """:meth:`Person.change` of this session's person."""
    return Person.of(pack).change(act)


def say() -> None:
    """Tell what was kept: what went wrong stays on the page, the rest is gone in a moment."""
    said = st.session_state.get(SAID, [])
    while said:  # callbacks of earlier runs write into this very list
        text, wrong = said.pop(0)
        (st.warning if wrong else st.toast)(plain(text))


def photos(count: int) -> str:
    """A number of photos in words."""
    return "1 photo" if count == 1 else f"{count:,} photos"


def _press(store: Store, person: str, key: str, image_ids: Sequence[str]) -> str:
    if key in ("undo", "redo"):
        return _turned(store.undo(person) if key == "undo" else store.redo(person), key)
    tag = store.keys().get(int(key))
    if tag is None:
        return f"Key {key} has no tag yet. Give it one under Tags in the gallery."
    if not image_ids:
        return "No photo is chosen. Move to one with J, or choose some."
    on = store.toggle(person, image_ids, tag)
    return (
        f"{tag}: {photos(len(image_ids))}" if on else f"no longer {tag}: {photos(len(image_ids))}"
    )


def _turned(done: Undone | None, key: str) -> str:
    if done is None:
        return f"There is nothing to {key}."
    text = f"{'Undone' if key == 'undo' else 'Done again'}: {photos(len(done.photos))}"
    if done.stayed:
        text += f"; {photos(done.stayed)} stay as somebody else has changed them since"
    return text
