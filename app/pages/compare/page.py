"""The compare page: a leaderboard of ``xattn compare``, its curves, and where two methods differ."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app import state
from xattn.app.components import grid
from xattn.app.demo import pack_offer
from xattn.app.navigation import url_widgets
from xattn.app.pages.compare import leaderboard_file
from xattn.app.pages.compare.leaderboard_file import Board, arrow
from xattn.app.pictures.rendering import Look, legends, overlay_url
from xattn.app.state import Context, plain
from xattn.eval.metrics.registry import METRICS
from xattn.eval.report.differences import Apart, by_maps, by_metric
from xattn.eval.report.html_data import MAX_VALUES, case_columns, spread
from xattn.eval.report.html_tables import format_number, number_form
from xattn.packs.contained_files import PackError
from xattn.pictures.contact_sheet import legends_html

if TYPE_CHECKING:
    from xattn.app.library import ComparisonInfo
    from xattn.packs.reader import Pack

PARTS = ("Leaderboard", "Curves", "Photos", "Pairs")
MAPS = "maps"  # compare two methods by the order of their maps
SIDE = 320  # pixels of a picture's longer side
SHOWN = 12  # images on which two methods differ most
MAX_PAIRS = 1000  # of maps whose order is compared
PER_PHOTO = MAX_VALUES // 2000  # at most 2,000 dots a method
LINES = 4  # methods in a chart before anybody chooses
# Methods are told apart without colour as well: by dashes and shapes.
LIGHT = ["#b4441f", "#2f6f9f", "#6a8f2f", "#8a5aa8", "#b07a10", "#2f8579", "#a0527c", "#6f6a62"]
DARK = ["#f08a4b", "#74b3e0", "#a5c964", "#c39ae0", "#e3b64c", "#63c3b4", "#e08fbb", "#b5afa6"]
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


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
        lambda: _leaderboard(board),
        lambda: _curves(board),
        lambda: _scatter(board, pack),
        lambda: _two(board, pack, problem),
    )
    for tab, part in zip(tabs, draw, strict=True):
        if tab.open:
            with tab:
                part()


def _nothing(context: Context) -> None:
    with st.container(border=True):
        st.markdown("**There is no comparison yet.**")
        st.markdown("Measure several methods on your photos and this page shows who is ahead:")
        output = shlex.quote(str(state.settings().root / "comparison"))
        st.code(f"xattn compare --data PHOTOS --output {output}", language="sh", wrap_lines=True)
        st.caption("A folder of an earlier run can be put below the viewer's folder as it is.")
        pack_offer.offer()


def _choose(found: list[ComparisonInfo], pack: Pack | None) -> ComparisonInfo:
    """The comparison of the URL, or that of the open pack, or the first."""
    by_id = {info.id: info for info in found}
    own = [info.id for info in found if pack is not None and info.pack_id == pack.id]
    wanted = st.query_params.get("board")
    if wanted is not None and wanted not in by_id:
        st.warning("The comparison of this address is not here any more; this is another one.")
    chosen = url_widgets.selectbox(
        "Comparison",
        list(by_id),
        "board",
        default=own[0] if own else None,
        format_func=lambda i: by_id[i].name,
        width=420,
    )
    return by_id[chosen]


def _about(board: Board) -> None:
    """What was measured, and what the run warns about."""
    results = board.results
    protocol = results.protocol
    left_out = f", {len(results.skipped)} unreadable left out" if results.skipped else ""
    st.caption(
        plain(
            f"{len(results.images)} photos{left_out} on {results.backbone.get('name', '?')}; "
            f"{protocol.score} of the {protocol.class_policy} class; means with 95 % bootstrap "
            f"intervals ({results.n_resamples:,} resamples); protocol {protocol.id}"
        )
    )
    if board.warnings:
        count = len(board.warnings)
        with st.expander(f"{count} warning{'s' * (count > 1)} about these results"):
            st.markdown("\n".join(f"- {plain(line)}" for line in board.warnings))


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


# ---------------------------------------------------------------------- leaderboard


def _metric(board: Board, key: str, label: str = "Metric", first: str | None = None) -> str:
    """A select box of the columns, with their direction."""
    keys = list(board.columns)
    first = first or case_columns(board.results)[0].key
    return url_widgets.selectbox(
        label, keys, key, default=first, format_func=lambda k: arrow(k, board), width=300
    )


def _leaderboard(board: Board) -> None:
    key = _metric(board, "metric")
    column = board.columns[key]
    about = METRICS[column.metric]
    better = "higher" if about.higher_is_better else "lower"
    st.caption(plain(f"{key}: {about.formula}; {better} is better"))
    table, form = _standings(board, key)
    _intervals(board, key, table, form)
    number = f"%{form}"
    st.dataframe(
        table.drop(columns=["lo", "hi", "said"]),
        hide_index=True,
        width="stretch",
        height="content",
        column_config={
            "method": st.column_config.TextColumn(pinned=True),
            "mean": st.column_config.NumberColumn(
                f"mean {'↑' if about.higher_is_better else '↓'}", format=number
            ),
            "minus best": st.column_config.TextColumn(
                help="Mean difference to the best method, photo by photo, with its interval."
            ),
        },
    )
    with st.expander("All metrics"):
        _everything(board)


def _standings(board: Board, key: str) -> tuple[pd.DataFrame, str]:
    """The methods in a column, the best first, and the column's number format."""
    up = METRICS[board.columns[key].metric].higher_is_better
    cells = [board.standings[name, key] for name in board.results.methods]
    form = number_form(board.columns[key], [s.mean for s in cells])
    measured = sorted((s for s in cells if s.n), key=lambda s: -s.mean if up else s.mean)
    rows = []
    for s in [*measured, *(s for s in cells if not s.n)]:
        interval = f"{format_number(s.lo, form)} to {format_number(s.hi, form)}" if s.n else "-"
        rows.append(
            {
                "method": s.method,
                "row": board.kind(s.method),
                "mean": s.mean if s.n else None,
                "standing": board.verdict(s.method, key),
                "95 % interval": interval,
                "minus best": _difference(s, form),
                "photos": s.n,
                "forward passes": _passes(board, s.method),
                "lo": s.lo,
                "hi": s.hi,
                "said": f"{format_number(s.mean, form)} [{interval}]",
            }
        )
    return pd.DataFrame(rows), form


def _difference(s: Any, form: str) -> str:
    if not math.isfinite(s.diff):
        return "-"
    lo, hi = (format_number(v, form) for v in (s.diff_lo, s.diff_hi))
    return f"{format_number(s.diff, form)} [{lo} to {hi}]"


def _passes(board: Board, name: str) -> int | None:
    passes = board.results.methods[name].forwards
    return passes if type(passes) is int else None


def _intervals(board: Board, key: str, table: pd.DataFrame, form: str) -> None:
    """A dot and its interval for every method, in the table's order."""
    shown = table[table["photos"] > 0]
    if shown.empty:
        st.info("No method has a value of this metric.")
        return
    order = list(shown["method"])
    base = alt.Chart(shown).encode(
        y=alt.Y(
            "method:N",
            sort=order,
            title=None,
            axis=alt.Axis(labelLimit=220, labelFlush=False, labelOverlap=False),
        ),
        tooltip=["method", "row", alt.Tooltip("said:N", title="mean"), "standing"],
    )
    kinds = [kind for kind in ("method", "sanity row", "mask") if kind in set(shown["row"])]
    palette = _palette()
    legend = alt.Legend(title=None, orient="top") if len(kinds) > 1 else None
    colours = {"method": palette[0], "sanity row": palette[7], "mask": palette[1]}
    colour = alt.Color(
        "row:N",
        scale=alt.Scale(domain=kinds, range=[colours[kind] for kind in kinds]),
        legend=legend,
    )
    shapes = {"method": "circle", "sanity row": "square", "mask": "diamond"}
    rules = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("lo:Q", title=arrow(key, board), scale=alt.Scale(zero=False)),
        x2="hi:Q",
        color=colour,
    )
    points = base.mark_point(size=70, filled=True, opacity=1).encode(
        x="mean:Q",
        color=colour,
        shape=alt.Shape(
            "row:N",
            scale=alt.Scale(domain=kinds, range=[shapes[kind] for kind in kinds]),
            legend=legend,
        ),
    )
    about = f"Mean and 95 % interval of {key} by method; the table below has the figures"
    # Room for the axis and the legend, and 26 pixels a method.
    chart = (rules + points).properties(height=26 * len(shown) + 110, description=about)
    st.altair_chart(chart, width="stretch")


def _palette() -> list[str]:
    return DARK if st.context.theme.type == "dark" else LIGHT


def _everything(board: Board) -> None:
    """Every column side by side, with intervals and who is best, in words."""
    rows: list[dict[str, str]] = []
    forms = {
        key: number_form(column, [board.standings[m, key].mean for m in board.results.methods])
        for key, column in board.columns.items()
    }
    marks = {"best": ", best", "not told apart from the best": ", not told apart from the best"}
    for name in board.ranked:
        row = {"method": name, "row": board.kind(name)}
        for key, form in forms.items():
            s = board.standings[name, key]
            lo, hi = format_number(s.lo, form), format_number(s.hi, form)
            mark = marks.get(board.verdict(name, key), "")
            row[arrow(key, board)] = (
                f"{format_number(s.mean, form)} [{lo} to {hi}]{mark}" if s.n else "-"
            )
        rows.append(row)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        height="content",
        column_config={"method": st.column_config.TextColumn(pinned=True)},
    )


# ---------------------------------------------------------------------- curves


def _methods(board: Board, key: str, names: list[str], count: int = LINES) -> list[str]:
    """Which methods a chart shows; the best ones and a sanity row by default."""
    tested = [name for name in names if board.kind(name) == "method"]
    sane = [name for name in names if name == "random"][:1]
    first = [*tested[: count - len(sane)], *sane]
    return url_widgets.multiselect("Methods", names, key, default=first or names[:count])


def _curves(board: Board) -> None:
    with st.spinner("Drawing intervals", show_time=True):
        charts = board.curves
    if not charts:
        st.info(
            "This comparison measured no curves. Run xattn compare with --metrics "
            "insertion-deletion, or direct, to see how the score falls as pixels go."
        )
        return
    names = list(board.results.methods)
    there = {names[int(m)] for chart in charts for m in chart["lines"]}
    chosen = _methods(board, "lines", [name for name in board.ranked if name in there])
    if not chosen:
        st.info("No method is chosen. Choose one or more above.")
        return
    for chart in charts:
        lines = {names[int(m)]: line for m, line in chart["lines"].items()}
        shown = [name for name in chosen if name in lines]
        rows = [
            {"method": name, "x": x, "score": mean, "lo": lo, "hi": hi}
            for name in shown
            for x, mean, lo, hi in zip(chart["x"], *lines[name][:3], strict=True)
            if mean is not None
        ]
        if rows:
            st.subheader(plain(chart["title"]), anchor=False)
            lined = _lines(pd.DataFrame(rows), shown, chart["axis"], board)
            about = f"{chart['title']}: mean score by {', '.join(shown)}, with 95 % intervals"
            st.altair_chart(lined.properties(description=about), width="stretch")
            st.caption(plain(_read_as(chart, lines, shown)))


def _lines(table: pd.DataFrame, names: list[str], axis: str, board: Board) -> alt.LayerChart:
    score = board.results.protocol.score
    legend = _legend(symbolType="stroke", symbolStrokeWidth=2, symbolSize=300)
    colour = _colour(names, legend)
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    share = axis.partition(",")[0]  # which go first stands below the chart
    x = alt.X(
        "x:Q",
        title=share,
        axis=alt.Axis(format="%", tickCount=5),
        scale=alt.Scale(domain=[0, float(table["x"].max())], nice=False),
    )
    base = alt.Chart(table).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.14).encode(y="lo:Q", y2="hi:Q")
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("score:Q", title=score),
        strokeDash=alt.StrokeDash(
            "method:N", scale=alt.Scale(domain=names, range=dashes), legend=legend
        ),
        tooltip=[
            "method",
            alt.Tooltip("x:Q", title="share", format=".2f"),
            alt.Tooltip("score:Q", format=".3f"),
            alt.Tooltip("lo:Q", format=".3f"),
            alt.Tooltip("hi:Q", format=".3f"),
        ],
    )
    return (band + line).properties(height=360)


def _colour(names: list[str], legend: alt.Legend) -> alt.Color:
    palette = _palette()
    colours = [palette[i % len(palette)] for i in range(len(names))]
    return alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), legend=legend)


def _legend(**symbol: Any) -> alt.Legend:
    return alt.Legend(
        title=None, orient="bottom", columns=2, labelLimit=220, symbolOpacity=1, **symbol
    )


def _read_as(chart: dict[str, Any], lines: dict[str, Any], names: list[str]) -> str:
    falls = chart["key"] in ("deletion", "morf")
    counts = sorted({lines[name][3] for name in names})
    photos = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    order = chart["axis"].partition(", ")[2]
    return (
        f"{order.capitalize()}. {'Lower' if falls else 'Higher'} is better. Mean of {photos} photos; "
        f"bands are 95 % intervals."
    )


# ---------------------------------------------------------------------- single images


def _scatter(board: Board, pack: Pack | None) -> None:
    keys = list(board.columns)
    good = [column.key for column in case_columns(board.results)]
    good = list(dict.fromkeys([*good, *keys]))[:2]
    left, right = st.columns(2)
    with left:
        x = _metric(board, "sx", "Across", good[0])
    with right:
        y = _metric(board, "sy", "Up", good[-1])
    names = _methods(board, "dots", board.ranked, 3)
    if not names:
        st.info("No method is chosen. Choose one or more above.")
        return
    table, note = _dots(board, pack, names, x, y)
    dots = len(table)
    table = table.dropna(subset=["x", "y"])
    if table.empty:
        st.info("No photo has a value of both metrics.")
        return
    chart = (
        alt.Chart(table)
        .mark_point(size=50, filled=True)
        .encode(
            x=alt.X("x:Q", title=arrow(x, board), scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=arrow(y, board), scale=alt.Scale(zero=False)),
            color=_colour(names, _legend()),
            shape=alt.Shape(
                "method:N", scale=alt.Scale(domain=names, range=SHAPES), legend=_legend()
            ),
            tooltip=[
                "photo",
                "class",
                alt.Tooltip("p:Q", format=".1%"),
                "method",
                alt.Tooltip("x:Q", title=x.replace(".", ""), format=".4g"),
                alt.Tooltip("y:Q", title=y.replace(".", ""), format=".4g"),
            ],
        )
        .properties(height=420, description=f"{y} against {x}, a dot a photo and method")
    )
    if "entry" in table:
        picked = alt.selection_point(name="dot", fields=["entry"], on="click", clear=False)
        chart = chart.add_params(picked).encode(
            opacity=alt.condition(picked, alt.value(0.8), alt.value(0.5), empty=True)
        )
        event = st.altair_chart(chart, width="stretch", key="dots_chart", on_select="rerun")
        dots_picked = event["selection"].get("dot")  # a list, or {} before the first click
        entry = (
            dots_picked[0].get("entry") if isinstance(dots_picked, list) and dots_picked else None
        )
        if pack is not None and entry in pack.entries.index:
            _open(pack, entry, names)
    else:
        st.altair_chart(chart, width="stretch")
    if dots > len(table):
        note += f" {dots - len(table)} have no value of one of the two."
    st.caption(note)
    with st.expander("The dots as a table"):
        _dots_table(table, pack, names, arrow(x, board), arrow(y, board))


def _dots_table(table: pd.DataFrame, pack: Pack | None, names: list[str], x: str, y: str) -> None:
    """The chart for who does not use a pointer; a row opens its photo, as a dot does."""
    shown = table[["photo", "method", "x", "y", "class"]]
    config = {
        name: st.column_config.NumberColumn(title, format="%.4g")
        for name, title in (("x", x), ("y", y))
    }
    if pack is None or "entry" not in table:
        st.dataframe(shown, hide_index=True, column_config=config)
        return
    st.caption("Choose a row to open its photo.")
    event = st.dataframe(
        shown,
        hide_index=True,
        column_config=config,
        key="dots_table",
        on_select="rerun",
        selection_mode="single-row",
    )
    for row in event["selection"]["rows"][:1]:
        _open(pack, table["entry"].iloc[row], names)


def _open(pack: Pack, entry_id: Any, names: list[str]) -> None:
    """The photo of a map on its own page, with the methods of the chart."""
    image_id = pack.entries.at[entry_id, "image_id"]
    state.go("image", pack=pack.id, image=image_id, methods=names, entry=entry_id)


def _dots(
    board: Board, pack: Pack | None, names: list[str], x: str, y: str
) -> tuple[pd.DataFrame, str]:
    """A row a photo and method, and what to say of them; with the entry's id where a click opens it."""
    results = board.results
    points = spread(len(results.images), PER_PHOTO)
    keys = [metric.key for metric in pack.metrics] if pack is not None else []
    if pack is not None and len(pack.images) == len(results.images) and {x, y} <= set(keys):
        rows = pack.entries[pack.entries["method"].isin(names)]
        rows = rows[rows["image_id"].isin(pack.images.index[points])]
        table = pd.DataFrame(
            {
                "entry": rows.index,
                "method": rows["method"].to_numpy(),
                "x": rows[x].to_numpy(),
                "y": rows[y].to_numpy(),
                "photo": pack.images["title"].loc[rows["image_id"]].to_numpy(),
                "class": rows["target_name"].to_numpy(),
                "p": rows["probability"].to_numpy(),
            }
        )
        note = "A dot is a photo; click one to open it."
    else:
        table = pd.concat(
            pd.DataFrame(
                {
                    "method": name,
                    "x": results.methods[name].values[board.columns[x]][points],
                    "y": results.methods[name].values[board.columns[y]][points],
                    "photo": [results.images[i].id.rpartition("/")[2] for i in points],
                    "class": [results.images[i].target_name for i in points],
                    "p": [results.images[i].p for i in points],
                }
            )
            for name in names
        )
        note = "A dot is a photo."
    if len(points) < len(results.images):
        note += f" {len(points):,} of {len(results.images):,} photos, evenly spread."
    return table, note


# ---------------------------------------------------------------------- two methods


def _two(board: Board, pack: Pack | None, problem: str) -> None:
    names = board.ranked
    if len(names) < 2:
        st.info("This comparison has one method; it takes two to differ.")
        return
    first, second, third = st.columns(3)
    with first:
        a = url_widgets.selectbox("Method", names, "a")
    with second:
        b = url_widgets.selectbox("and method", names, "b", default=names[1])
    by_keys = [*board.columns, *([MAPS] if pack is not None else [])]
    with third:
        by = url_widgets.selectbox(
            "Differ by",
            by_keys,
            "by",
            default=case_columns(board.results)[0].key,
            format_func=lambda k: "Order of their maps" if k == MAPS else arrow(k, board),
        )
    if a == b:
        st.info("Choose two methods that are not the same.")
        return
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
            found, damaged = _by_maps(pack.id, pack.version, a, b, pack)
        if damaged:
            _by_maps.clear(pack.id, pack.version, a, b)  # they may be repaired
            count = "One photo has" if damaged == 1 else f"{damaged:,} photos have"
            st.warning(f"{count} a map that cannot be read, and is left out.")
        if len(pairs) > MAX_PAIRS:
            st.caption(f"Of the first {MAX_PAIRS:,} photos.")
    elif f"{by}_a" in pairs:
        found = by_metric(pairs[f"{by}_a"], pairs[f"{by}_b"])
    else:
        st.info("The pack of this comparison does not hold this metric.")
        return
    if not found:
        st.info("No photo has a value of both methods.")
        return
    st.caption(f"The {min(SHOWN, len(found))} of {len(found)} photos on which they differ most.")
    form = (
        ".2f"
        if by == MAPS
        else number_form(board.columns[by], [v for f in found for v in (f.a, f.b)])
    )
    shown = found[:SHOWN]
    entries = [pairs.iloc[f.position][f"entry_{side}"] for f in shown for side in "ab"]
    st.html(legends_html(legends(pack, entries, Look(side=SIDE))))
    title = by if by == MAPS else arrow(by, board)
    columns: list[Any] = []
    for number, apart in enumerate(shown):
        columns = columns or list(st.columns(2))  # row by row: on a phone they keep their order
        with columns.pop(0):
            _pair(pack, pairs.iloc[apart.position], (a, b), title, apart, form, number)


def _pairs(pack: Pack, a: str, b: str) -> pd.DataFrame:
    """One row a photo and class that both explain: entry_a, entry_b and their metrics."""
    keys = ["image_id", "target"]
    metrics = [metric.key for metric in pack.metrics]
    sides = [
        pack.entries[pack.entries["method"] == name]
        .reset_index()[["entry_id", "target_name", *keys, *metrics]]
        .rename(columns={"entry_id": "entry"})
        for name in (a, b)
    ]
    return sides[0].merge(sides[1], on=keys, suffixes=("_a", "_b"))


@st.cache_data(max_entries=16, show_spinner=False)
def _by_maps(pack_id: str, version: str, a: str, b: str, _pack: Pack) -> tuple[list[Apart], int]:
    """The pairs by their maps, and how many are left out because a map of theirs cannot be read."""
    pairs = _pairs(_pack, a, b).head(MAX_PAIRS)
    readable: list[int] = []

    def maps() -> Iterator[list[Any]]:
        for position, pair in enumerate(zip(pairs["entry_a"], pairs["entry_b"], strict=True)):
            try:
                both = [_pack.explanation(entry_id).map for entry_id in pair]
            except PackError:
                continue
            readable.append(position)
            yield both

    found = [apart._replace(position=readable[apart.position]) for apart in by_maps(maps())]
    return found, len(pairs) - len(readable)


def _pair(
    pack: Pack,
    row: pd.Series,
    names: tuple[str, str],
    by: str,
    apart: Apart,
    form: str,
    number: int,
) -> None:
    """The two maps of one photo, side by side."""
    image_id = row["image_id"]
    file_name = pack.images.at[image_id, "title"]
    target = str(row["target_name_a"]).split(",")[0]
    with st.container(key=f"pair-{number}"):
        how = (
            f"rank correlation {1 - apart.distance:.2f}"
            if by == MAPS
            else f"apart by {format_number(apart.distance, form)}"
        )
        st.markdown(f"**{plain(target)}** · {plain(how)}")
        cells = []
        for name, side, value in zip(names, "ab", (apart.a, apart.b), strict=True):
            entry_id = row[f"entry_{side}"]
            lines = [] if by == MAPS else [f"{by}: {format_number(value, form)}"]
            cells.append(
                {
                    "id": entry_id,
                    "src": overlay_url(pack, entry_id, Look(side=SIDE)),
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
            _open(pack, opened, list(names))


def _without_pictures(board: Board, a: str, b: str, by: str) -> None:
    """The photos by name, where there is no pack to show them from."""
    values = [board.results.methods[name].values[board.columns[by]] for name in (a, b)]
    found = by_metric(*values)
    if not found:
        st.info("No photo has a value of both methods.")
        return
    form = number_form(board.columns[by], [v for image in found for v in (image.a, image.b)])
    images = board.results.images
    table = pd.DataFrame(
        {
            "photo": [images[f.position].id.rpartition("/")[2] for f in found],
            "class": [images[f.position].target_name for f in found],
            a: [format_number(f.a, form) for f in found],
            b: [format_number(f.b, form) for f in found],
            "apart": [format_number(f.distance, form) for f in found],
        }
    )
    st.dataframe(table.head(100), hide_index=True, width="stretch", height="content")
