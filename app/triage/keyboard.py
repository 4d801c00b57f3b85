"""What keys and buttons do to photos, told in a few words at the next run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app.state import plain
from xattn.app.triage import tag_files
from xattn.app.triage.journal import Undone
from xattn.app.triage.store import Store, TagsError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

SAID = "_triage_said"  # the session's key of (what to tell, whether it went wrong)


def press(pack: Pack, key: str, image_ids: Sequence[str]) -> None:
    """Do what a key says: "1" to "9" toggle a tag, "undo" and "redo" are of the person's steps."""
    change(pack, lambda store, person: _press(store, person, key, image_ids))


def change(pack: Pack, act: Callable[[Store, str], str | None]) -> bool:
    """Call ``act(store, person)`` and keep what it returns to be told; whether it succeeded."""
    try:
        tell(act(tag_files.store_of(pack), tag_files.person()))
        return True
    except TagsError as error:
        tell(str(error), wrong=True)
        return False


def tell(text: str | None, wrong: bool = False) -> None:
    """Keep something to be told by :func:`say`."""
    if text:
        st.session_state.setdefault(SAID, []).append((text, wrong))


def say() -> None:
    """Tell what was kept: what went wrong stays on the page, the rest is gone in a moment."""
    for text, wrong in st.session_state.pop(SAID, []):
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
