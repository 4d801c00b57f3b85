"""Runs the viewer's script: chooses the pack, shows the page, and turns input errors into messages."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import sys
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app import state
from xattn.app.components import theme
from xattn.app.navigation import address, chosen, frame, last_view
from xattn.app.navigation.frame import bottom_bar
from xattn.app.state import PAGES, Context, plain
from xattn.app.triage import selection
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.app.library import Library
    from xattn.packs.reader import Pack

LISTED = 20  # number of packs that are listed below a message


def main() -> None:
    """Show the page that the URL selects."""
    pages = [
        st.Page(
            partial(_run, name),
            title=about.title,
            url_path=name,
            default=name == state.DEFAULT_PAGE,
        )
        for name, about in PAGES.items()
    ]
    chosen = st.navigation(pages, position="top")
    st.set_page_config(
        page_title=f"{chosen.title} · xattn", layout="wide", initial_sidebar_state="collapsed"
    )
    st.html(theme.STYLE)
    chosen.run()


def preload() -> None:
    """Read the pack for the first view in advance; ``xattn app`` does this in a separate thread."""
    library = state.library()
    for pack_id in library.newest():
        with contextlib.suppress(PackError):
            selection.table(library.open(pack_id))
            for name in (state.DEFAULT_PAGE, "image"):
                _module(name)
            break
    library.packs()  # also caches the entries of the list of packs
    _freeze()


@functools.cache
def _module(name: str) -> ModuleType:
    """The module of the page ``name``, imported when it is first shown, since this can take seconds."""
    found = importlib.import_module(PAGES[name].module)
    _freeze()
    return found


def _freeze() -> None:
    """Exclude all existing objects from garbage collection, since almost all of them stay alive.

    Streamlit runs the garbage collector after every run. With torch and pandas imported, this would delay
    the pictures of a page by a fifth of a second.
    """
    gc.collect()
    gc.freeze()


def _run(name: str) -> None:
    if st.session_state.get("_page") != name:
        address.forget()
    st.session_state["_page"] = name
    shows_pack, pack = PAGES[name].shows_pack, None
    try:
        context = _context()
        if context.pack is None and shows_pack:
            importlib.import_module("xattn.app.pages.first_run").page(context)
        else:
            known = PAGES[name].module in sys.modules
            # Importing a page for the first time can take seconds.
            with contextlib.nullcontext() if known else st.spinner("Opening the page"):
                module = _module(name)
            if context.pack is not None and shows_pack:
                chosen.follow_address(context.pack)
                pack = context.pack
            module.page(context)
    except (PackError, ValueError) as error:
        st.error(plain(error))
        if shows_pack:
            _packs(state.library())
    if pack is not None:
        chosen.show_bar(pack, name)


def show_error(error: Exception) -> bool:
    """Show a short message for an unexpected error, with links by which the user can continue.

    This is called by ``streamlit.starlette.App(on_script_error=...)``, which also logs ``error`` with its
    traceback. The result True keeps Streamlit from showing the error.
    """
    last_view.forget()  # so that the gallery opens even if its last view has failed
    own = f"{state.current_page()}."  # prefix of the page's own state, which is also in the address
    for key in [key for key in st.session_state if str(key).startswith(own)]:
        del st.session_state[key]
    st.error(
        "Something went wrong on this page. The terminal that runs `xattn app` shows the details."
    )
    bar = st.container(horizontal=True, gap="small")
    here = {name: st.query_params.get_all(name) for name in st.query_params}
    for label, name, query in (
        ("Try again", state.current_page(), here),
        ("Open the gallery", state.DEFAULT_PAGE, {}),
    ):
        page = state.page_object(name)
        bar.page_link(page, label=label, query_params=query, width="content")
    return True


# ---------------------------------------------------------------------- the pack


def _context() -> Context:
    """The arguments for the page, with the library and the open pack.

    The open pack is the one in the URL. Without one, it is the pack that was open last, or else the newest
    pack that can be opened.

    Raises:
        PackError: the pack in the URL cannot be opened.
    """
    library = state.library()
    picked = frame.chosen_pack()
    if picked is not None and picked != st.query_params.get("pack"):
        st.session_state["_pack"] = picked
        state.go(state.current_page(), pack=picked)
    frame.mark_opened()  # not earlier, since another click can end a run before it changes the page
    pack, problem = _wanted(library)
    if pack is not None:
        st.session_state["_pack"] = pack.id
        if "pack" not in st.query_params:
            st.query_params["pack"] = pack.id
    frame.chip(library, pack)
    bottom_bar(None if pack is None else pack.id)
    frame.watch_keys()
    if problem is not None:
        raise problem
    return Context(library, pack, st.query_params.to_dict())


def _wanted(library: Library) -> tuple[Pack | None, PackError | None]:
    named = st.query_params.get("pack")
    if named is not None:
        try:
            return library.open(named), None
        except PackError as error:
            return None, error
    last = st.session_state.get("_pack")
    for pack_id in itertools.chain(filter(None, [last]), library.newest()):
        with contextlib.suppress(PackError):  # the list of packs shows the problem
            return library.open(pack_id), None
    return None, None


def _packs(library: Library) -> None:
    """Show links to other packs on a page whose pack or image is missing."""
    good = [info for info in library.packs() if info.problem is None]
    if good:
        st.markdown("Packs that can be shown:")
    for info in good[:LISTED]:
        st.page_link(
            state.page_object(state.DEFAULT_PAGE),
            label=plain(info.name),
            query_params={"pack": info.id},
        )
