"""Whether the page stands on a narrow screen, and where its controls go there."""

from __future__ import annotations

from typing import Any

import streamlit as st

from xattn.app.components import component

NARROW = 640  # pixels: the widest screen whose toolbars are folded
_KEY = "screen"


def watch() -> None:
    """Ask the browser; a narrow one runs the page once more. Links to other pages work while a popover is
    open. For :mod:`xattn.app.main`."""
    component("screen")(data={"most": NARROW}, key=_KEY, on_narrow_change=lambda: None)


def narrow() -> bool:
    """Whether the screen was narrow when the browser last said so."""
    return bool(getattr(st.session_state.get(_KEY), "narrow", False))


def place(bar: Any, name: str, **popover: Any) -> Any:
    """Where controls of a toolbar go: ``bar`` itself, or on a narrow screen its popover ``name``.

    Args:
        bar: the container of the toolbar.
        name: what the popover is called: "Look" for how pictures are drawn, "Filters" for what is shown.
        popover: further arguments of ``st.popover``.
    """
    return bar.popover(name, **popover) if narrow() else bar
