"""The filters that are set, each as a chip that takes it away."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from xattn.app.navigation.selection import NOTES, RATINGS, RIGHT
from xattn.app.pages.gallery.widgets import KEY, clear, drop
from xattn.app.state import plain, short

if TYPE_CHECKING:
    from xattn.app.navigation.selection import Choices, View

LONGEST = 40  # characters of a chip's text


def chips(view: View, choices: Choices) -> None:
    """Show them in a row, nothing where no filter is set."""
    found = _filters(view, choices)
    if not found:
        return
    row = st.container(
        horizontal=True, vertical_alignment="center", gap="xsmall", key=f"{KEY}chips"
    )
    for text, name, value in found:
        shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        row.button(
            plain(shown),
            key=f"{KEY}chip {name} {value}",
            on_click=drop,
            args=(name, value),
            icon=":material/close:",
            icon_position="right",
        )
    row.button("Clear all", key=f"{KEY}clear", on_click=clear, type="tertiary")


def _filters(view: View, choices: Choices) -> list[tuple[str, str, str]]:
    """(what a chip says, the view's name of the filter, its value) of each filter."""
    found = [(f"“{view.q}”", "q", "")] if view.q else []
    for name, word, names in (
        ("label", "true", choices.labels),
        ("predicted", "predicted", choices.predicted),
    ):
        found += [(f"{word}: {short(names[key])}", name, key) for key in getattr(view, name)]
    if view.right != "any":
        found.append((RIGHT[view.right], "right", ""))
    if view.low is not None or view.high is not None:
        found.append((f"{choices.measures[view.measure].name}: {_range(view)}", "measure", ""))
    found += [(f"tag: {tag}", "tag", tag) for tag in view.tag]
    if view.rating:
        found.append((RATINGS[view.rating], "rating", ""))
    if view.note != "any":
        found.append((NOTES[view.note], "note", ""))
    return found


def _range(view: View) -> str:
    if view.low is None:
        return f"to {view.high:g}"
    return f"from {view.low:g}" if view.high is None else f"{view.low:g} to {view.high:g}"
