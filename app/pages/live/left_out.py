"""What was left out of a run, and why."""

from __future__ import annotations

import streamlit as st

from xattn.app.live import uploads
from xattn.app.state import plain

REASONS, NAMED = 4, 2  # lines, and names in a line, about what was left out


def left_out(problems: list[uploads.Problem], what: str) -> None:
    """One line per reason, as plain text, and a folded list of names that do not fit on a line."""
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
    """The first names, and how many more."""
    more = len(names) - NAMED
    return ", ".join(map(plain, names[:NAMED])) + (f" and {more} more" if more > 0 else "")
