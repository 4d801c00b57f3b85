"""Scrub through frames: a slider, play and pause, all in the browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from xattn.app.components import component


def film(
    source: str,
    titles: Sequence[str],
    key: str,
    *,
    rate: float = 25.0,
    start: int = 0,
    label: str = "Frame",
    on_rest: Any = None,
) -> None:
    """Show frame after frame; the arrow keys, Home and End move, Space plays and pauses.

    Args:
        source: URL of a frame up to its number, which is put behind it.
        titles: what each frame shows, in words; their number is the number of frames.
        rate: frames a second while playing.
        start: the frame to begin with.
        label: what the slider is called by a screen reader.
        on_rest: called before the script runs again, when the slider has come to rest;
            :func:`resting` of ``key`` is the frame then.
    """
    data = {
        "source": source,
        "titles": list(titles),
        "rate": rate,
        "start": start,
        "label": label,
    }
    component("film")(data=data, key=key, on_rest_change=on_rest or (lambda: None))


def resting(key: str, count: int) -> int | None:
    """The frame that the slider of ``key`` has come to rest at, inside its ``on_rest``."""
    found = getattr(st.session_state.get(key), "rest", None)
    return found if type(found) is int and 0 <= found < count else None
