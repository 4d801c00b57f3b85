"""The gallery's view as its widgets hold it in the session."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import streamlit as st

from xattn.app.navigation import selection
from xattn.app.navigation.selection import NAMES, Choices, View

# Before every key of this page in the session: the names of a view are keys of other pages' widgets, and
# a value whose widget this page does not show would stay in their place.
KEY = "gallery."


def to_widgets(view: View, names: Iterable[str]) -> None:
    """Put these of the view's values where the next widgets read them."""
    for name in names:
        value = getattr(view, name)
        st.session_state[KEY + name] = list(value) if isinstance(value, tuple) else value


def from_widgets(choices: Choices) -> View:
    kept = {name: KEY + name for name in NAMES}
    values = {n: st.session_state[key] for n, key in kept.items() if key in st.session_state}
    for name in ("label", "predicted", "tag"):
        values[name] = tuple(values.get(name) or ())
    values["q"] = " ".join(str(values.get("q") or "").split())[: selection.SEARCH_LENGTH]
    return replace(selection.defaults(choices), **values)


def go_to(number: int) -> None:
    st.session_state[f"{KEY}page"] = number


def restart() -> None:
    go_to(1)


def clear() -> None:
    """No filter; the next run reads the widgets from these values."""
    to_widgets(View(), selection.UNFILTERED)
    new_range()


def drop(name: str, value: str) -> None:
    """Take one filter away: a class by its key, else the whole filter."""
    if name in ("label", "predicted", "tag"):
        kept = [key for key in st.session_state[KEY + name] if key != value]
        st.session_state[KEY + name] = kept
        restart()
    elif name == "measure":
        new_range()
    else:
        to_widgets(View(), [name])
        restart()


def new_range() -> None:
    """No range, and no brush."""
    to_widgets(View(), ("low", "high"))
    typed_range()


def typed_range() -> None:
    """A range that no brush shows any more."""
    turn = f"{KEY}brush"
    st.session_state[turn] = st.session_state.get(turn, 0) + 1
    restart()


def brush_key(measure: str) -> str:
    """The key of a measure's histogram; another one after each range that was typed."""
    return f"{KEY}brush {measure} {st.session_state.get(f'{KEY}brush', 0)}"
