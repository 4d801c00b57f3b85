"""Shows a folder of ``xattn board``: its ranks, its report card and its maps.

The page is made anew from the checked values, since the HTML file in the folder may come from anyone.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from xattn.app.library import BOARD
from xattn.app.state import plain
from xattn.eval.board.folder import Board
from xattn.eval.board.page import board_html
from xattn.eval.board.ranks import board_ranks
from xattn.packs.contained_files import PackError
from xattn.runtime.files import Signature
from xattn.runtime.lru_cache import LRUCache

_PAGES = LRUCache(4)  # boards of size 1


def show(folder: Path) -> None:
    """Show the board in ``folder``, or why it cannot be shown."""
    try:
        with st.spinner("Reading the board", show_time=True):
            text = read(folder)
    except PackError as error:
        st.error(plain(error))
    else:
        st.html(text)


def read(folder: Path) -> str:
    """The HTML of the board, kept until its ``board.json`` changes.

    Raises:
        PackError: the board is damaged or of another version, or one of its files cannot be read.
    """
    try:
        key = folder, Signature.of((folder / BOARD).stat())
        return _PAGES.kept(key, lambda: _made(Board.open(folder)))
    except (ValueError, OSError, LookupError) as error:
        raise PackError(f"The board cannot be shown ({error}); see xattn board check") from None


def _made(board: Board) -> str:
    return board_html(board, board_ranks(board))
