"""Widgets whose value is also in the URL, and the decision whether a run follows its URL or the widgets.

A browser may send a click before it knows the URL that the last run wrote. The URL that comes with the
click is then outdated, and following it would undo later choices.

The URL holds the value itself, whereas Streamlit's ``bind`` writes the label. A choice that equals its
default is not in the URL. A new value in the URL (a link, a reload, Back) overrides the widget; a value
that is not an option is ignored. Every run sets the value, not only the run that changes it: if two runs
follow each other quickly, the browser may see only the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from xattn.app import state

Options = Sequence[str] | Mapping[str, str]  # values, or values with their names
ADDRESSES = "_addresses"  # the session's key of the addresses that pages wrote
WRITTEN = 50  # addresses remembered per page


def is_new(key: str, address: Any, known: bool = True) -> bool:
    """Whether to show ``address``, because it is a page's first address or comes from a link, a reload
    or Back.

    The address counts as new until :func:`record_address` is called, so that a run that ends early does not
    affect the next one.

    Args:
        key: identifies the page, or the part of a page, that the address belongs to.
        known: False if the page is still empty, or shows another subject.
    """
    written = _written(key)
    if not known:
        written.clear()
    return not (written and (address == written[-1] or (address in written and not back())))


def record_address(key: str, address: Any) -> None:
    """Record that the page shows ``address`` or has requested it."""
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
    """Whether the person used Back or Forward."""
    run = get_script_run_ctx()
    return run is not None and run.is_history_navigation


def _named(options: Options, rest: dict[str, Any]) -> list[str]:
    """The values of a widget; their names are added to the widget's arguments."""
    if isinstance(options, Mapping):
        rest["format_func"] = lambda value: options.get(value, value)
    return list(options)


def selectbox(
    label: str, choices: Options, key: str, *, default: str | None = None, **rest: Any
) -> str:
    """An ``st.selectbox`` whose choice is also in the URL, under ``key``; ``rest`` is passed to the widget.

    With ``accept_new_options=True``, any value of at most 200 characters is accepted from the URL.
    """
    options = _named(choices, rest)
    first = options[0] if default is None else default
    free = bool(rest.get("accept_new_options"))

    def valid(value: Any) -> bool:
        return value in options or (free and isinstance(value, str) and 0 < len(value) <= 200)

    url = st.query_params.get(key)
    if _changed(key, url):
        _follow(key, url, url if valid(url) else first)
    else:
        kept = st.session_state[key]
        st.session_state[key] = kept if valid(kept) else first
    chosen = st.selectbox(label, options, key=key, **rest)
    _write(key, None if chosen == first or chosen is None else chosen)
    return chosen


def method_box(
    pack: Any,
    methods: Sequence[str],
    width: int,
    key: str = "method",
    label: str = "Maps by",
    default: str | None = None,
) -> str:
    """The method whose maps a page shows; if there are several methods, the person chooses."""
    if len(methods) == 1:
        return methods[0]
    return selectbox(label, methods, key, default=default, format_func=pack.title_of, width=width)


def segmented(label: str, choices: Options, key: str, **rest: Any) -> str:
    """An ``st.segmented_control`` whose choice is also in the URL, under ``key``; its default is the first
    option."""
    options = _named(choices, rest)
    url = st.query_params.get(key)
    if _changed(key, url) or st.session_state[key] not in options:
        _follow(key, url, url if url in options else options[0])
    else:
        state.restore_widgets(key)
    chosen = st.segmented_control(label, options, key=key, required=True, **rest)
    _write(key, None if chosen == options[0] else chosen)
    return chosen


def multiselect(
    label: str, options: Sequence[str], key: str, *, default: Sequence[str] = (), **rest: Any
) -> list[str]:
    """An ``st.multiselect`` whose choice is also in the URL, under ``key``; ``rest`` is passed to the
    widget."""
    url = st.query_params.get_all(key)
    if _changed(key, url):
        _follow(key, url, [v for v in dict.fromkeys(url) if v in options] or list(default))
    else:
        kept = [value for value in st.session_state[key] if value in options]
        st.session_state[key] = kept if kept or not st.session_state[key] else list(default)
    chosen = st.multiselect(label, options, key=key, **rest)
    _write(key, [] if chosen == list(default) else list(chosen))
    return list(chosen)


def _changed(key: str, url: Any) -> bool:
    return is_new(key, url, known=key in st.session_state)


def _follow(key: str, url: Any, value: Any) -> None:
    """Set the widget to the URL's value."""
    st.session_state[key] = value
    record_address(key, url)


def _write(key: str, wanted: str | list[str] | None) -> None:
    """Write a choice to the URL, unless it is already there."""
    record_address(key, wanted)
    now: Any = (
        st.query_params.get_all(key) if isinstance(wanted, list) else st.query_params.get(key)
    )
    if now == wanted:
        return
    if wanted:
        st.query_params[key] = wanted
    else:
        st.query_params.pop(key, None)
