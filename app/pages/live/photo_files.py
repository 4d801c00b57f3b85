"""Photos that a person sends, here or on the first page, which hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from xattn.app.live import uploads
from xattn.app.live.uploads import Upload
from xattn.app.pages.live.left_out import left_out
from xattn.app.state import plain

_HANDED = "_handed_over"  # the session's key of photos that another page took in


def photos() -> list[Upload]:
    """The photos that are chosen here, else those that were handed over."""
    sent = photo_uploader(f"Photos, up to {uploads.MAX_PHOTOS}", key="photos")[0]
    if sent:
        st.session_state.pop(_HANDED, None)
    handed: list[Upload] = st.session_state.get(_HANDED, [])
    if handed:
        more = f" and {len(handed) - 1} more" if len(handed) > 1 else ""
        st.caption(f"Ready: {plain(handed[0].name)}{more}. Press Explain, or choose other photos.")
    return sent or handed


def hand_over(sent: Sequence[Upload]) -> None:
    """Give photos to the page Live."""
    st.session_state[_HANDED] = list(sent)


def photo_uploader(label: str, key: str, **rest: Any) -> tuple[list[Upload], bool]:
    """A place for photos; returns those that can be read, and whether that is all of them."""
    files = st.file_uploader(
        label,
        type=uploads.PHOTO_TYPES,
        accept_multiple_files=True,
        key=key,
        max_upload_size=megabytes(uploads.MAX_BYTES),
        **rest,
    )
    good, problems = uploads.accept(files)
    if problems:
        left_out(problems, "left out")
    return good, not problems


def megabytes(limit: int) -> int:
    """A limit of bytes, or the server's where that is lower."""
    return min(limit >> 20, int(st.get_option("server.maxUploadSize")))
