"""The compare page: a leaderboard of ``xattn compare``, its curves, and where two methods differ."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import streamlit as st

from xattn.app import state
from xattn.app.demo import pack_offer
from xattn.app.navigation import address
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pages.compare.curves import curves_tab
from xattn.app.pages.compare.leaderboard import leaderboard_tab
from xattn.app.pages.compare.leaderboard_file import Board
from xattn.app.pages.compare.pairs import pairs_tab
from xattn.app.pages.compare.photos import photos_tab
from xattn.app.state import Context, plain
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.app.library import ComparisonInfo
    from xattn.packs.reader import Pack


PARTS = ("Leaderboard", "Curves", "Photos", "Pairs")
FIRST = 2  # warnings above the chart


def page(context: Context) -> None:
    """Show the comparison that the URL names, or the first."""
    st.title("Compare methods", anchor=False)
    found = context.library.comparisons()
    if not found:
        _nothing(context)
        return
    info = _choose(found, context.pack)
    try:
        with st.spinner("Reading the comparison", show_time=True):
            board = leaderboard_file.read(context.library, info.id)
    except PackError as error:
        st.error(plain(error))
        return
    _about(board)
    pack, problem = _pack(context, info)
    tabs = st.tabs(list(PARTS), key="part", bind="query-params")
    draw = (
        lambda: leaderboard_tab(board),
        lambda: curves_tab(board),
        lambda: photos_tab(board, pack),
        lambda: pairs_tab(board, pack, problem),
    )
    for tab, part in zip(tabs, draw, strict=True):
        if tab.open:
            with tab:
                part()
    _notes(board)


def _nothing(context: Context) -> None:
    with st.container(border=True):
        st.markdown("**There is no comparison yet.**")
        st.markdown("Measure several methods on your photos and this page shows who is ahead:")
        output = shlex.quote(str(state.settings().local_root / "comparison"))
        st.code(f"xattn compare PHOTOS --output {output}", language="sh", wrap_lines=True)
        st.caption("A folder of an earlier run can be put below the viewer's folder as it is.")
        pack_offer.offer()


def _choose(found: list[ComparisonInfo], pack: Pack | None) -> ComparisonInfo:
    """The comparison of the URL, or that of the open pack, or the first."""
    by_id = {info.id: info for info in found}
    own = [info.id for info in found if pack is not None and info.pack_id == pack.id]
    wanted = st.query_params.get("board")
    if wanted is not None and wanted not in by_id:
        st.warning("The comparison of this address is not here any more; this is another one.")
    chosen = address.selectbox(
        "Comparison",
        list(by_id),
        "board",
        default=own[0] if own else None,
        format_func=lambda i: by_id[i].name,
        width=420,
    )
    return by_id[chosen]


def _about(board: Board) -> None:
    """What was measured, and the first of what the run warns about."""
    results = board.results
    protocol = results.protocol
    left_out = f", {len(results.skipped)} unreadable left out" if results.skipped else ""
    st.caption(
        plain(
            f"{len(results.images)} photos{left_out} on {results.backbone.get('name', '?')}; "
            f"{protocol.score} of {protocol.explained}; means with 95 % bootstrap "
            f"intervals ({results.n_resamples:,} resamples); protocol {protocol.id}"
        )
    )
    for line in board.warnings[:FIRST]:
        st.warning(plain(line))


def _notes(board: Board) -> None:
    """The warnings that do not stand above the chart."""
    rest = board.warnings[FIRST:]
    if rest:
        with st.expander(f"{len(rest)} more note{'s' * (len(rest) > 1)} about these results"):
            st.markdown("\n".join(f"- {plain(line)}" for line in rest))


def _pack(context: Context, info: ComparisonInfo) -> tuple[Pack | None, str]:
    """The comparison's pictures, or why there are none."""
    if info.pack_id is None:
        return None, (
            "This comparison has no pictures: it was made without a pack. Run xattn compare again "
            "with the same arguments to add one; what was measured is not measured again."
        )
    try:
        return context.library.open(info.pack_id), ""
    except PackError as error:
        return None, str(error)
