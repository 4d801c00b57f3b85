"""Whether the URL of a script run is followed, or the state that the page holds.

A click may be sent before the browser knows the URL that the last run wrote. Such a URL is not new, and
following it would undo what was chosen since.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

ADDRESSES = "_addresses"  # the session's key of what pages wrote
WRITTEN = 50  # addresses that are remembered as a page's own


def is_new(key: str, address: Any, known: bool = True) -> bool:
    """Whether ``address`` is to be shown: the first of a page, after a link, a reload or Back.

    It stays new until it is ``wrote``, so that a run that ends early takes nothing from the next one.

    Args:
        key: what the address, or this part of it, belongs to.
        known: False where the page holds nothing yet, or something of another subject.
    """
    written = _written(key)
    if not known:
        written.clear()
    return not (written and (address == written[-1] or (address in written and not back())))


def wrote(key: str, address: Any) -> None:
    """Record that the page shows ``address``, or has asked for it."""
    written = _written(key)
    if not written or written[-1] != address:
        written.append(address)


def forget() -> None:
    """Forget all addresses, because another page is shown."""
    st.session_state.pop(ADDRESSES, None)


def _written(key: str) -> deque[Any]:
    pages: dict[str, deque[Any]] = st.session_state.setdefault(ADDRESSES, {})
    return pages.setdefault(key, deque(maxlen=WRITTEN))


def back() -> bool:
    """Whether the person went back or forward."""
    run = get_script_run_ctx()
    return run is not None and run.is_history_navigation
