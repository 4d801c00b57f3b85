"""The compare page: a leaderboard of ``xattn compare``, its curves, and where methods differ; or a board
of ``xattn board``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import components, state
from xattn.app.components import command, grid
from xattn.app.navigation import address
from xattn.app.pages import demo_offer
from xattn.app.pages.compare import board_folder, leaderboard_file
from xattn.app.pages.compare.leaderboard import curves_tab, leaderboard_tab, methods_box
from xattn.app.pages.compare.photos import open_photo, photos_tab
from xattn.app.pictures.rendering import Look, legends, overlay_url, photo_url
from xattn.app.state import Context, cache_by_version, plain, short
from xattn.eval.report.differences import ImageDifference, rank_by_maps, rank_by_metric
from xattn.eval.report.standings import Board, format_number
from xattn.explainers.base import method_title
from xattn.packs.contained_files import PackError
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.app.library import ComparisonInfo
    from xattn.packs.reader import Pack


MAPS = "maps"  # sort photos by the order of their maps' values
SIDE = 320  # pixels of a picture's longer side
SHOWN = 12  # photos on which methods differ most
MOST = 1000  # most photos whose maps are compared


def maps_tab(board: Board, pack: Pack | None, problem: str) -> None:
    """Show the photos on which methods differ most, a row for each photo and a column for each method;
    ``problem`` says why there is no pack."""
    left, right = st.columns([3, 1])
    with left:
        names = methods_box(board, "shown", board.ranked)
    if len(names) < 2:
        st.info("Choose two or more methods; this page shows where they differ.")
        return
    orders = {key: board.title_with_arrow(key) for key in board.columns}
    if pack is not None:
        orders[MAPS] = "Order of their maps"
    with right:
        by = address.selectbox("Differ by", orders, "by", default=board.first_key)
    if by != MAPS and (trained := board.training(names, [by])):
        st.caption(plain(trained))
    if pack is None:
        st.caption(plain(problem))
        _without_pictures(board, names, by)
        return
    if by != MAPS and by not in pack.entries:
        st.info("The pack of this comparison does not hold this metric.")
        return
    groups = _groups(pack, tuple(names))
    if groups.empty:
        st.info("The pack of this comparison has no photo with maps of all these methods.")
        return
    if by == MAPS:
        with st.spinner("Comparing maps", show_time=True):
            found, damaged = _by_maps(pack, tuple(names))
        if damaged:
            _by_maps.clear(pack, tuple(names))  # the maps may be repaired later
            count = "One photo has" if damaged == 1 else f"{damaged:,} photos have"
            st.warning(f"{count} a map that cannot be read, and is left out.")
        if len(groups) > MOST:
            st.caption(f"Of the first {MOST:,} photos.")
    else:
        values = pack.entries[by]
        found = rank_by_metric([values.loc[groups[name]] for name in names])
    if not found:
        st.info("No photo has a value of all these methods.")
        return
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.caption(
        f"The {min(SHOWN, len(found))} of {len(found)} photos on which they differ most.",
        width="content",
    )
    bar.button(
        "All photos",
        key="maps.runs",
        on_click=lambda: state.go("runs", pack=pack.id, other=pack.id, by=names[0], by2=names[1]),
        help="The first two methods on the page Two runs; another pack can be chosen there",
    )
    look = Look(side=SIDE)
    shown = [(groups.iloc[apart.position], apart.distance) for apart in found[:SHOWN]]
    st.html(legends_html(legends(pack, [row[name] for row, _ in shown for name in names], look)))
    cells = [cell for row, apart in shown for cell in _cells(board, pack, row, names, by, apart)]
    opened = grid(
        cells, "maps-grid", label="Maps by photo and method", columns=1 + len(names), rows=2
    )
    if opened is not None:
        open_photo(pack, opened.removeprefix("photo "), names)


@cache_by_version(16)
def _groups(pack: Pack, names: tuple[str, ...]) -> pd.DataFrame:
    """A row for each photo and class that all methods explain: the entry of each method."""
    entries = pack.entries[pack.entries["method"].isin(names)].reset_index()
    found = entries.pivot(index=["image_id", "target"], columns="method", values="entry_id")
    return found.reindex(columns=list(names)).dropna()


@cache_by_version(16)
def _by_maps(pack: Pack, names: tuple[str, ...]) -> tuple[list[ImageDifference], int]:
    """The groups sorted by their maps' difference, and how many have a map that cannot be read."""
    damaged = 0

    def maps() -> Iterator[list[Any]]:
        nonlocal damaged
        for entry_ids in _groups(pack, names).head(MOST).itertuples(index=False):
            try:
                yield [pack.explanation(entry_id).map for entry_id in entry_ids]
            except PackError:
                damaged += 1
                yield []  # left out

    return rank_by_maps(maps()), damaged


def _cells(
    board: Board, pack: Pack, row: pd.Series, names: list[str], by: str, apart: float
) -> list[dict[str, Any]]:
    """The photo, a heading, and the maps of a photo."""
    image_id = row.name[0]
    file_name = pack.images.at[image_id, "title"]
    first = pack.entries.loc[row[names[0]]]
    target = short(str(first["target_name"]))
    if by == MAPS:
        how = f"rank correlation {1 - apart:.2f}"
    else:
        how = f"difference {format_number(apart, board.forms[by])}"
    href = state.link("image", pack=pack.id, image=image_id, methods=names)
    cells: list[dict[str, Any]] = [
        {
            "id": f"photo {row[names[0]]}",
            "src": photo_url(pack, image_id, SIDE),
            "alt": f"Photo {file_name}",
            "title": file_name,
            "href": href,
            "span": 2,
        },
        {"id": f"row {row[names[0]]}", "title": f"{target} · {how}", "wide": True},
    ]
    for name in names:
        cell = {
            "id": row[name],
            "src": overlay_url(pack, row[name], Look(side=SIDE)),
            "alt": f"Map by {method_title(name)} of {target} on {file_name}",
            "title": method_title(name),
            "href": href,
        }
        if by != MAPS:
            value = format_number(pack.entries.at[row[name], by], board.forms[by])
            cell["lines"] = [f"{by}: {value}"]
        cells.append(cell)
    return cells


def _without_pictures(board: Board, names: list[str], by: str) -> None:
    """Show the photos by name if there is no pack with their pictures."""
    images, form = board.results.images, board.forms[by]
    values = {n: board.results.methods[n].values[board.columns[by]] for n in names}
    rows = [
        {
            "photo": images[at].id.rpartition("/")[2],
            "class": images[at].target_name,
            **{method_title(n): format_number(v[at], form) for n, v in values.items()},
            "difference": format_number(distance, form),
        }
        for at, distance in rank_by_metric(list(values.values()))[:100]
    ]
    if rows:
        components.table(pd.DataFrame(rows))
    else:
        st.info("No photo has a value of all these methods.")


PARTS = ("Leaderboard", "Curves", "Photos", "Maps")
FIRST = 2  # warnings above the chart


def page(context: Context) -> None:
    """Show the comparison in the URL, or the first one."""
    st.title("Compare methods", anchor=False)
    found, boards = context.library.comparisons(), context.library.boards()
    if not found and not boards:
        _nothing()
        return
    chosen = _choose(found, boards, context.pack)
    if chosen in boards:
        board_folder.show(boards[chosen][0])
        return
    info = next(info for info in found if info.id == chosen)
    try:
        with st.spinner("Reading the comparison", show_time=True):
            board = leaderboard_file.read(context.library, info.id)
    except PackError as error:
        st.error(plain(error))
        return
    pack, problem = _pack(context, info)
    if pack is not None and context.pack is not None and pack.id != context.pack.id:
        st.query_params["pack"] = pack.id  # the header names the pack that is shown
        st.rerun()
    _about(board)
    tabs = st.tabs(list(PARTS), key="part", bind="query-params")
    draw = (
        lambda: leaderboard_tab(board),
        lambda: curves_tab(board),
        lambda: photos_tab(board, pack),
        lambda: maps_tab(board, pack, problem),
    )
    for tab, part in zip(tabs, draw, strict=True):
        if tab.open:
            with tab:
                part()
    _notes(board)


def _nothing() -> None:
    with st.container(border=True):
        st.markdown("**There is no comparison yet.**")
        st.markdown("Measure several methods on your photos, and this page shows which is ahead:")
        output = shlex.quote(str(state.settings().local_root / "comparison"))
        command(f"xattn compare PHOTOS --output {output}")
        st.caption(
            "You can also move the folder of an earlier run below the viewer's folder, unchanged."
        )
        demo_offer.show_offer()


def _choose(
    found: list[ComparisonInfo], boards: Mapping[str, tuple[Path, str]], pack: Pack | None
) -> str:
    """The id of the comparison or board in the URL, else of the open pack's comparison, else the first."""
    names = {info.id: info.name for info in found}
    names |= {key: f"{name} (board)" for key, (_, name) in boards.items()}
    own = [info.id for info in found if pack is not None and info.pack_id == pack.id]
    wanted = st.query_params.get("board")
    if wanted is not None and wanted not in names:
        st.warning("The comparison of this address no longer exists; another one is shown.")
    return address.selectbox(
        "Comparison", names, "board", default=own[0] if own else None, width=420
    )


def _about(board: Board) -> None:
    """Show what was measured, and the run's first warnings."""
    results, protocol = board.results, board.results.protocol
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
    """Show the warnings that are not shown above the chart."""
    rest = board.warnings[FIRST:]
    if rest:
        with st.expander(f"{len(rest)} more note{'s' * (len(rest) > 1)} about these results"):
            st.markdown("\n".join(f"- {plain(line)}" for line in rest))


def _pack(context: Context, info: ComparisonInfo) -> tuple[Pack | None, str]:
    """The pack with the comparison's pictures, or why there is none."""
    if info.pack_id is None:
        return None, (
            "This comparison has no pictures: it was made without a pack. Run xattn compare again "
            "with the same arguments to add one; nothing is measured a second time."
        )
    try:
        return context.library.open(info.pack_id), ""
    except PackError as error:
        return None, str(error)
