"""Whether the page stands on a narrow screen, and where its controls go there."""

from __future__ import annotations

from typing import Any

import streamlit as st

from xattn.app.components import component

NARROW = 640  # pixels: the widest screen whose toolbars are folded
_KEY, _SAID = "screen", "_narrow"


def watch() -> None:
    """Ask the browser, for :mod:`xattn.app.main`; a narrow one runs its first page once more.

    It also makes links to other pages work while a popover is open.
    """
    component(_KEY)(
        data={"most": NARROW, "narrow": narrow()}, key=_KEY, on_narrow_change=lambda: None
    )


def narrow() -> bool:
    """Whether the screen was narrow when the browser last said so, on this page or an earlier one."""
    said = getattr(st.session_state.get(_KEY), "narrow", None)
    if said is not None:
        st.session_state[_SAID] = bool(said)
    return bool(st.session_state.get(_SAID, False))


def place(bar: Any, name: str, **popover: Any) -> Any:
    """Where controls of a toolbar go: ``bar`` itself, or on a narrow screen its popover ``name``.

    Args:
        bar: the container of the toolbar.
        name: what the popover is called: "Look" for how pictures are drawn, "Filters" for what is shown.
        popover: further arguments of ``st.popover``.
    """
    return bar.popover(name, **popover) if narrow() else bar
