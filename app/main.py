"""One run of the viewer: choose the pack, then run the page; errors of input become messages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import streamlit as st

from xattn.app import state
from xattn.app.state import Context, plain

# name: title, and whether the page shows a pack (without one it is not called)
PAGES = {
    "gallery": ("Gallery", True),
    "image": ("Image", True),
    "attention": ("Attention", True),
    "live": ("Live", False),
    "compare": ("Compare", False),
    "train": ("Train", False),
}


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"xattn.app.pages.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"xattn.app.pages.{name}":
            raise
        return None


def _run(name: str) -> None:
    from xattn.app.library import PackError

    st.session_state["_page"] = name
    module = _module(name)
    page: Callable[[Context], None] | None = getattr(module, "page", None)
    if page is None:
        st.info(f"The page {name} is not built yet.")
        return
    try:
        context = _context()
        if context.pack is None and PAGES[name][1]:
            st.info("There is no pack yet: run `xattn explain` and open its folder.")
            return
        page(context)
    except (PackError, ValueError) as error:
        st.error(plain(error))


def _context() -> Context:
    """The library and the pack that the URL names, else the last one, else the first that opens."""
    library = state.library()
    packs = library.packs()
    names = {p.id: p.name for p in packs if p.problem is None}
    wanted = st.query_params.get("pack") or st.session_state.get("_pack")
    picked = st.session_state.pop("_picked_pack", None)
    if picked is not None and picked != wanted:
        st.session_state["_pack"] = picked
        state.go(state.current_page(), pack=picked)
    if wanted is None:
        wanted = next(iter(names), None)
    if wanted is None:
        return Context(library, None, st.query_params.to_dict())
    pack = library.open(wanted)
    names.setdefault(pack.id, pack.name)
    st.session_state["_pack"] = st.session_state["pack"] = pack.id
    st.sidebar.selectbox(
        "Pack", list(names), format_func=lambda i: names[i], key="pack", on_change=_pick
    )
    if st.query_params.get("pack") != pack.id:
        st.query_params["pack"] = pack.id
    return Context(library, pack, st.query_params.to_dict())


def _pick() -> None:
    st.session_state["_picked_pack"] = st.session_state["pack"]


def main() -> None:
    """Show the page that the URL names."""
    st.set_page_config(page_title="xattn", layout="wide")
    pages = [
        st.Page(partial(_run, name), title=title, url_path=name, default=name == state.DEFAULT_PAGE)
        for name, (title, _) in PAGES.items()
    ]
    st.navigation(pages, position="top").run()


if __name__ == "__main__":  # streamlit run app/main.py
    main()
