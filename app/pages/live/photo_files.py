"""Photos that a person uploads on this page, or on the first page, which hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from xattn.app.live import uploads
from xattn.app.live.uploads import Upload
from xattn.app.state import plain

REASONS, NAMED = 4, 2  # lines, and names in a line, about what was left out


def left_out(problems: list[uploads.Problem], what: str) -> None:
    """Show one line per reason, and an expander with the names that do not fit on a line."""
    names: dict[str, list[str]] = {}
    for name, why in problems:
        names.setdefault(why, []).append(name)
    lines = [f"{_some(found)}: {plain(why)}" for why, found in list(names.items())[:REASONS]]
    if len(names) > REASONS:
        more = sum(map(len, list(names.values())[REASONS:]))
        lines.append(f"and {more} more for other reasons")
    st.warning(f"{len(problems)} {what}:  \n" + "  \n".join(lines))
    if len(names) > REASONS or max(map(len, names.values())) > NAMED:
        with st.expander(f"All {len(problems)} {what}"):
            for why, found in names.items():
                st.markdown(f"{plain(why)}:  \n" + "  \n".join(map(plain, found)))


def _some(names: list[str]) -> str:
    """The first names, and the number of others."""
    more = len(names) - NAMED
    return ", ".join(map(plain, names[:NAMED])) + (f" and {more} more" if more > 0 else "")


_HANDED = "_handed_over"  # the session's key of photos uploaded on another page


def photos() -> list[Upload]:
    """The photos that were uploaded here or, if there are none, those handed over by another page."""
    sent = photo_uploader(f"Photos, up to {uploads.MAX_PHOTOS}", key="photos")[0]
    if sent:
        st.session_state.pop(_HANDED, None)
    handed: list[Upload] = st.session_state.get(_HANDED, [])
    if handed:
        more = f" and {len(handed) - 1} more" if len(handed) > 1 else ""
        st.caption(f"Ready: {plain(handed[0].name)}{more}. Press Explain, or choose other photos.")
    return sent or handed


def hand_over(sent: Sequence[Upload]) -> None:
    """Hand photos over to the Live page."""
    st.session_state[_HANDED] = list(sent)


def photo_uploader(label: str, key: str, **rest: Any) -> tuple[list[Upload], bool]:
    """Show an upload field for photos; return the readable photos, and whether all are readable."""
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
    """The limit ``limit`` (in bytes) in megabytes, or the server's limit if that is lower."""
    return min(limit >> 20, int(st.get_option("server.maxUploadSize")))
