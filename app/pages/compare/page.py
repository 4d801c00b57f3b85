"""The compare page: a leaderboard of ``xattn compare``, its curves, and where two methods differ."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import command, grid
from xattn.app.navigation import address
from xattn.app.pages import demo_offer
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pages.compare.leaderboard import curves_tab, leaderboard_tab
from xattn.app.pages.compare.photos import open_photo, photos_tab
from xattn.app.pictures.rendering import Look, legends, overlay_url
from xattn.app.state import Context, cache_by_version, plain
from xattn.eval.report.differences import ImageDifference, rank_by_maps, rank_by_metric
from xattn.eval.report.standings import Board, case_columns, format_number, number_form
from xattn.packs.contained_files import PackError
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.app.library import ComparisonInfo
    from xattn.packs.reader import Pack


MAPS = "maps"  # compare two methods by the order of their maps
PAIR_SIDE = 320  # pixels of a picture's longer side
SHOWN = 12  # images on which two methods differ most
MAX_PAIRS = 1000  # most pairs of maps whose order is compared


def pairs_tab(board: Board, pack: Pack | None, problem: str) -> None:
    """Show where two methods differ most; ``problem`` says why there is no pack."""
    names = board.ranked
    if len(names) < 2:
        st.info("This comparison has only one method; at least two are needed.")
        return
    first, second, third = st.columns(3)
    with first:
        a = address.selectbox("Method", names, "a")
    with second:
        b = address.selectbox("and method", names, "b", default=names[1])
    orders = {key: board.title_with_arrow(key) for key in board.columns}
    if pack is not None:
        orders[MAPS] = "Order of their maps"
    with third:
        first = case_columns(board.results)[0].key
        by = address.selectbox("Differ by", orders, "by", default=first)
    if a == b:
        st.info("Choose two different methods.")
        return
    if by != MAPS and (trained := board.training([a, b], [by])):
        st.caption(plain(trained))
    if pack is None:
        st.caption(plain(problem))
        _without_pictures(board, a, b, by)
        return
    pairs = _pairs(pack, a, b)
    if pairs.empty:
        st.info(f"The pack of this comparison holds no maps of both {plain(a)} and {plain(b)}.")
        return
    if by == MAPS:
        with st.spinner("Comparing maps", show_time=True):
            found, damaged = _by_maps(pack, a, b)
        if damaged:
            _by_maps.clear(pack, a, b)  # the maps may be repaired later
            count = "One photo has" if damaged == 1 else f"{damaged:,} photos have"
            st.warning(f"{count} a map that cannot be read, and is left out.")
        if len(pairs) > MAX_PAIRS:
            st.caption(f"Of the first {MAX_PAIRS:,} photos.")
    elif f"{by}_a" in pairs:
        found = rank_by_metric(pairs[f"{by}_a"], pairs[f"{by}_b"])
    else:
        st.info("The pack of this comparison does not hold this metric.")
        return
    if not found:
        st.info("No photo has a value of both methods.")
        return
    bar = st.container(horizontal=True, vertical_alignment="center", gap="small")
    bar.caption(
        f"The {min(SHOWN, len(found))} of {len(found)} photos on which they differ most.",
        width="content",
    )
    bar.button(
        "All photos",
        key="pairs.runs",
        on_click=lambda: state.go("runs", pack=pack.id, other=pack.id, by=a, by2=b),
        help="These two methods on the page Two runs; another pack can be chosen there",
    )
    form = (
        ".2f"
        if by == MAPS
        else number_form(board.info(by), [v for f in found for v in (f.first, f.second)])
    )
    shown = found[:SHOWN]
    entries = [pairs.iloc[f.position][f"entry_{side}"] for f in shown for side in "ab"]
    st.html(legends_html(legends(pack, entries, Look(side=PAIR_SIDE))))
    title = by if by == MAPS else board.title_with_arrow(by)
    columns: list[Any] = []
    for number, apart in enumerate(shown):
        columns = columns or list(st.columns(2))  # row by row: on a phone they keep their order
        with columns.pop(0):
            _pair(pack, pairs.iloc[apart.position], (a, b), title, apart, form, number)


def _pairs(pack: Pack, a: str, b: str) -> pd.DataFrame:
    """One row per photo and class that both methods explain: entry_a, entry_b and their metrics."""
    keys = ["image_id", "target"]
    metrics = [metric.key for metric in pack.metrics]
    sides = [
        pack.entries[pack.entries["method"] == name]
        .reset_index()[["entry_id", "target_name", *keys, *metrics]]
        .rename(columns={"entry_id": "entry"})
        for name in (a, b)
    ]
    return sides[0].merge(sides[1], on=keys, suffixes=("_a", "_b"))


@cache_by_version(16)
def _by_maps(pack: Pack, a: str, b: str) -> tuple[list[ImageDifference], int]:
    """The pairs sorted by their maps' difference, and how many are left out because a map is unreadable."""
    pairs = _pairs(pack, a, b).head(MAX_PAIRS)
    readable: list[int] = []

    def maps() -> Iterator[list[Any]]:
        for position, pair in enumerate(zip(pairs["entry_a"], pairs["entry_b"], strict=True)):
            try:
                both = [pack.explanation(entry_id).map for entry_id in pair]
            except PackError:
                continue
            readable.append(position)
            yield both

    found = [apart._replace(position=readable[apart.position]) for apart in rank_by_maps(maps())]
    return found, len(pairs) - len(readable)


def _pair(
    pack: Pack,
    row: pd.Series,
    names: tuple[str, str],
    by: str,
    apart: ImageDifference,
    form: str,
    number: int,
) -> None:
    """Show the two maps of one photo side by side."""
    image_id = row["image_id"]
    file_name = pack.images.at[image_id, "title"]
    target = str(row["target_name_a"]).split(",")[0]
    with st.container(key=f"pair-{number}"):
        how = (
            f"rank correlation {1 - apart.distance:.2f}"
            if by == MAPS
            else f"difference {format_number(apart.distance, form)}"
        )
        st.markdown(f"**{plain(target)}** · {plain(how)}")
        cells = []
        for name, side, value in zip(names, "ab", (apart.first, apart.second), strict=True):
            entry_id = row[f"entry_{side}"]
            lines = [] if by == MAPS else [f"{by}: {format_number(value, form)}"]
            cells.append(
                {
                    "id": entry_id,
                    "src": overlay_url(pack, entry_id, Look(side=PAIR_SIDE)),
                    "alt": f"Map by {name} of {target} on {file_name}",
                    "title": name,
                    "lines": [*lines, file_name],
                    "href": state.link("image", pack=pack.id, image=image_id, methods=names),
                }
            )
        opened = grid(
            cells, f"pair-grid-{number}", label=f"Maps of {file_name}", columns=2, width=120
        )
        if opened is not None:
            open_photo(pack, opened, list(names))


def _without_pictures(board: Board, a: str, b: str, by: str) -> None:
    """Show the photos by name if there is no pack with their pictures."""
    values = [board.results.methods[name].values[board.columns[by]] for name in (a, b)]
    found = rank_by_metric(*values)
    if not found:
        st.info("No photo has a value of both methods.")
        return
    form = number_form(board.info(by), [v for image in found for v in (image.first, image.second)])
    images = board.results.images
    table = pd.DataFrame(
        {
            "photo": [images[f.position].id.rpartition("/")[2] for f in found],
            "class": [images[f.position].target_name for f in found],
            a: [format_number(f.first, form) for f in found],
            b: [format_number(f.second, form) for f in found],
            "apart": [format_number(f.distance, form) for f in found],
        }
    )
    st.dataframe(table.head(100), hide_index=True, width="stretch", height="content")


PARTS = ("Leaderboard", "Curves", "Photos", "Pairs")
FIRST = 2  # warnings above the chart


def page(context: Context) -> None:
    """Show the comparison in the URL, or the first one."""
    st.title("Compare methods", anchor=False)
    found = context.library.comparisons()
    if not found:
        _nothing()
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


def _choose(found: list[ComparisonInfo], pack: Pack | None) -> ComparisonInfo:
    """The comparison in the URL, else the comparison of the open pack, else the first."""
    by_id = {info.id: info for info in found}
    own = [info.id for info in found if pack is not None and info.pack_id == pack.id]
    wanted = st.query_params.get("board")
    if wanted is not None and wanted not in by_id:
        st.warning("The comparison of this address no longer exists; another one is shown.")
    chosen = address.selectbox(
        "Comparison",
        {key: info.name for key, info in by_id.items()},
        "board",
        default=own[0] if own else None,
        width=420,
    )
    return by_id[chosen]


def _about(board: Board) -> None:
    """Show what was measured, and the run's first warnings."""
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
