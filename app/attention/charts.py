"""Shows a model's attention on one image by layer and head, and charts of sinks, distance and entropy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st
from torch import Tensor

from xattn.app.attention.view import (
    KEY,
    MEAN,
    NUMBER,
    SHARE,
    Colours,
    View,
    alt_text,
    legend,
    name_of,
    png,
    select_head,
    set_view,
    shares,
    token_of,
)
from xattn.app.components import grid, sent_value
from xattn.app.state import plain
from xattn.attention.statistics import bits, kept_keys, perplexity, row_entropy, uniform_distance
from xattn.pictures.scales import make_scale

if TYPE_CHECKING:
    from xattn.app.attention.attention_pass import ImageAttention


SIDE = 160  # smallest side of a small picture, in pixels
SMALL = 96  # smallest width of a small picture on the page, in pixels


def heads(seen: ImageAttention, view: View, rows: Sequence[Tensor]) -> None:
    """Show the heads of the view's layer; ``rows`` are the query's rows, (H, N) per layer."""
    label = f"Heads of layer {view.layer}"
    unit = "share of a head's attention that a patch gets"
    _rows("head", dict(enumerate(rows[view.layer])), label, unit, seen, view)


def layers(seen: ImageAttention, view: View, rows: Sequence[Tensor]) -> None:
    """Show the view's head, or the mean of all heads, in each layer."""
    what = "Mean of all heads" if view.head == MEAN else f"Head {view.head}"
    there = [i for i in range(seen.layers) if view.head == MEAN or int(view.head) < seen.heads(i)]
    shown = {i: select_head(rows[i], view.head) for i in there}
    unit = "share of the attention that a patch gets"
    _rows("layer", shown, f"{what}, layer by layer", unit, seen, view)


def _rows(
    name: str, rows: Mapping[int, Tensor], label: str, unit: str, seen: ImageAttention, view: View
) -> None:
    """Show rows (N,) of the query with a shared scale, one for each value of the view's field ``name``.

    A click selects one of them.
    """
    st.header(label, anchor=False)
    token = token_of(view.patch, seen)
    maps = {i: row[len(seen.prefix) :].unflatten(0, seen.grid) for i, row in rows.items()}
    scale = shares(list(maps.values()), view.scale)
    title = name.capitalize()
    cells = [
        {
            "id": str(i),
            "src": png(m, scale, kept_keys(m) if seen.hides else None, SIDE),
            "alt": alt_text(f"{title} {i}, from {name_of(token, seen)}", m, seen),
            "title": f"{title} {i}",
            "lines": _lines(rows[i], seen),
            "selected": str(getattr(view, name)) == str(i),
        }
        for i, m in maps.items()
    ]
    _grid(cells, name, label, seen, partial(_opened, name))
    legend(scale, unit)


def _grid(
    cells: list[dict[str, Any]], key: str, label: str, seen: ImageAttention, on_open: Any = None
) -> None:
    # If possible, all rows of the grid are full.
    columns = next((n for n in (6, 8, 7) if len(cells) % n == 0), 6)
    grid(
        cells,
        f"{KEY}grid of {key}",
        label=label,
        columns=columns,
        width=SMALL,
        aspect=seen.grid[1] / seen.grid[0],
        on_open=on_open,
    )


def _opened(name: str) -> None:
    opened = sent_value(f"{KEY}grid of {name}", "open")
    if opened is not None:
        set_view(**{name: opened if name == "head" else int(opened)})


def _lines(row: Tensor, seen: ImageAttention) -> list[str]:
    nats = float(row_entropy(row.double()))
    lines = [f"{nats:.2f} nats"]
    if seen.prefix:
        lines.append(f"{float(row[: len(seen.prefix)].sum()):.0%} to prefix")
    return lines


def own_maps(seen: ImageAttention, view: View) -> None:
    """Show the maps that a mechanism provides in addition to its attention."""
    if not any(seen.maps):
        return
    st.header("The mechanism's own maps", anchor=False)
    token, found = token_of(view.patch, seen), seen.maps[view.layer]
    lines: dict[int, list[str]]
    if not found:
        st.caption(f"Layer {view.layer} has no such maps; it keeps its trained attention.")
    if "received" in found:
        maps = {i: m["received"][0] for i, m in enumerate(seen.maps) if "received" in m}
        text = "What each patch receives from all queries together, mean over heads."
        _strip("Layer", maps, {}, seen, view, text, "received; 1 is an even share")
    if "agents" in found:
        read = seen.agent_shares(view.layer, token)
        part = [] if read is None else select_head(read, view.head).tolist()
        lines = {i: [f"read {share:.1%}"] for i, share in enumerate(part)}
        text = (
            f"What each agent of layer {view.layer} reads, mean over heads, and how much "
            f"{name_of(token, seen)} reads of it."
        )
        maps = dict(enumerate(found["agents"]))
        _strip("Agent", maps, lines, seen, view, text, "share of an agent's attention", SHARE)
    if "importance" in found:
        text = f"What each head of layer {view.layer} adds to the scores of a key, for all queries."
        maps = dict(enumerate(found["importance"]))
        _strip("Head", maps, {}, seen, view, text, "added to a score; 0 also for keys left out")
    if "region" in found:
        text = f"What each region gets from all queries of layer {view.layer}, head by head."
        maps = dict(enumerate(found["mass"]))
        _strip("Head", maps, {}, seen, view, text, "mass of a region", SHARE)
        text = "The share of each patch's attention that goes to its leading region, head by head."
        maps = dict(enumerate(found["leading"]))
        _strip("Rows of head", maps, {}, seen, view, text, "mass of its leading region", SHARE)
    if "prior" in found:
        text = (
            f"What the patch in the middle would attend to by positions alone in layer {view.layer}: all "
            f"patches have the mean query and key, rotated to their places."
        )
        maps = dict(enumerate(found["prior"]))
        _strip("Prior of head", maps, {}, seen, view, text, "share of the attention", SHARE)
    if "kept" in found:
        maps = dict(enumerate(found["kept"]))
        lines = {i: [f"keeps {int(m.sum())}"] for i, m in maps.items()}
        text = f"The keys that each head of layer {view.layer} keeps, for all queries."
        _strip("Kept by head", maps, lines, seen, view, text, "1 is kept")


def _strip(
    title: str,
    maps: dict[int, Tensor],
    lines: dict[int, list[str]],
    seen: ImageAttention,
    view: View,
    text: str,
    unit: str,
    number: str = NUMBER,
) -> None:
    """Show numbered maps of one kind with a shared scale."""
    st.caption(plain(text))
    ends = [(min(0.0, float(m.min())), float(m.max())) for m in maps.values()]
    scale = Colours(make_scale(ends), view.scale)
    cells = [
        {
            "id": str(i),
            "src": png(m, scale, None, SIDE),
            "alt": alt_text(f"{title} {i}", m, seen, number),
            "title": f"{title} {i}",
            "lines": lines.get(i, []),
        }
        for i, m in maps.items()
    ]
    _grid(cells, f"own {title}", text, seen)
    legend(scale, unit, number)


SINKS = 5  # number of patches that are treated as the most attended ones
PARTS = ("prefix tokens", f"top {SINKS} patches")
PICKED = "pick"  # the name of the charts' selection
_ACCENT, _GREY = "#c9602f", "#8a857e"  # visible on light and dark backgrounds


def heads_table(reading: ImageAttention) -> pd.DataFrame:
    """A table with one row per head: layer, head, entropy in nats and bits, perplexity in tokens, mean
    distance in patches, and share of the prefix tokens."""
    rows = []
    for layer, found in enumerate(reading.statistics):
        for head in range(reading.heads(layer)):
            nats = float(found.entropy[0, head])
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "entropy": nats,
                    "bits": bits(nats),
                    "tokens": perplexity(nats),
                    "distance": float(found.distance[0, head]),
                    "prefix": float(found.prefix_mass[0, head]),
                }
            )
    table = pd.DataFrame(rows)
    table["name"] = "layer " + table["layer"].astype(str) + ", head " + table["head"].astype(str)
    return table


def sinks_table(reading: ImageAttention) -> pd.DataFrame:
    """A table with one row per layer and kind of sink, with the mean share of attention over heads."""
    rows = []
    for layer, found in enumerate(reading.statistics):
        prefix = float(found.prefix_mass[0].mean())
        most = float(found.sinks(SINKS)[1][0].sum())
        for order, share in enumerate((prefix, most)):
            rows.append({"layer": layer, "part": PARTS[order], "share": share, "order": order})
    table = pd.DataFrame(rows)
    return table if reading.prefix else table[table["order"] == 1]


def sinks_chart(table: pd.DataFrame, layer: int) -> alt.Chart:
    """A bar chart of the shares by layer; all layers except the one that the page shows are faded."""
    parts = [part for part in PARTS if part in set(table["part"])]
    return (
        alt.Chart(table, height=260, description="Share of attention on sinks, layer by layer")
        .mark_bar(strokeWidth=1.5)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of attention", axis=alt.Axis(format="%")),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=parts, range=[_ACCENT, _GREY][-len(parts) :]),
                legend=alt.Legend(orient="top", labelLimit=300),
            ),
            order="order:Q",
            opacity=alt.condition(alt.datum.layer == layer, alt.value(1), alt.value(0.6)),
            tooltip=["layer:O", "part:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )


def _by_head(table: pd.DataFrame, layer: int, head: str) -> pd.DataFrame:
    shown = (table["layer"] == layer) & (table["head"].astype(str) == head)
    return table.assign(shown=shown)


def distance_chart(table: pd.DataFrame, grid: tuple[int, int], layer: int, head: str) -> Any:
    """A chart with one point per head, a line for the layer means, and a rule for uniform attention."""
    points = _by_head(table, layer, head)
    uniform = pd.DataFrame({"distance": [uniform_distance(grid)], "text": ["uniform attention"]})
    x = alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0))
    y = alt.Y("distance:Q", title="mean distance in patches", scale=alt.Scale(zero=True))
    dots = (
        alt.Chart(points)
        .mark_point(filled=True, opacity=0.9)
        .encode(
            x=x,
            y=y,
            color=alt.condition(alt.datum.shown, alt.value(_ACCENT), alt.value(_GREY)),
            size=alt.condition(alt.datum.shown, alt.value(170), alt.value(55)),
            shape=alt.condition(alt.datum.shown, alt.value("diamond"), alt.value("circle")),
            tooltip=["layer:O", "head:O", alt.Tooltip("distance:Q", format=".2f")],
        )
        .add_params(alt.selection_point(name=PICKED, fields=["layer", "head"]))
    )
    mean = (
        alt.Chart(table)
        .mark_line(color=_GREY, strokeWidth=2, opacity=0.6)
        .encode(x=x, y=alt.Y("mean(distance):Q", title="mean distance in patches"))
    )
    rule = alt.Chart(uniform).mark_rule(color=_GREY, strokeDash=[4, 4]).encode(y="distance:Q")
    text = (
        alt.Chart(uniform)
        .mark_text(align="right", baseline="bottom", dy=-3, color=_GREY)
        .encode(x=alt.value("width"), y="distance:Q", text="text:N")
    )
    about = "Mean distance of attention of each head, layer by layer"
    return alt.layer(mean, rule, text, dots).properties(height=260, description=about)


def entropy_chart(table: pd.DataFrame, most: float, layer: int, head: str) -> alt.Chart:
    """A bar chart of the heads by entropy, lowest first; ``most`` is the entropy of uniform attention."""
    ranked = _by_head(table, layer, head).sort_values("entropy")
    return (
        alt.Chart(
            ranked, height=22 * len(ranked) + 70, description="Heads by mean entropy of a row"
        )
        .mark_bar(cornerRadius=1)
        .encode(
            x=alt.X(
                "entropy:Q",
                title="mean entropy of a row in nats",
                scale=alt.Scale(domain=[0, most]),
                axis=alt.Axis(orient="top", tickCount=6),
            ),
            y=alt.Y(
                "name:N", title=None, sort=None, axis=alt.Axis(labelLimit=160, labelOverlap=False)
            ),
            color=alt.condition(alt.datum.shown, alt.value(_ACCENT), alt.value(_GREY)),
            tooltip=[
                alt.Tooltip("name:N", title="head"),
                alt.Tooltip("entropy:Q", format=".2f", title="nats"),
                alt.Tooltip("bits:Q", format=".2f"),
                alt.Tooltip("tokens:Q", format=".1f", title="as wide as tokens"),
            ],
        )
        .add_params(alt.selection_point(name=PICKED, fields=["layer", "head"]))
    )


# ---------------------------------------------------------------------- on the page


def show(seen: ImageAttention, view: View) -> None:
    """Show the charts with explanations; a click on a head selects it."""
    st.header("All layers and heads on this photo", anchor=False)
    found = seen.statistics[0]
    count = seen.grid[0] * seen.grid[1]
    rows = (
        f"all {count} patches as queries"
        if found.queries == count
        else f"a random sample of {found.queries} of the {count} patches as queries"
    )
    st.caption(f"Means over {rows}; they do not depend on the picked patch.")
    heads = heads_table(seen)
    left, right = st.columns(2, gap="large")
    with left:
        _show_sinks(seen, view)
    with right:
        _show_distance(seen, view, heads)
    _show_entropy(seen, view, heads)
    with st.expander("The figures as a table"):
        _show_table(heads)


def _show_sinks(seen: ImageAttention, view: View) -> None:
    st.subheader("Sinks: where attention goes", anchor=False)
    st.vega_lite_chart(
        seen.chart(
            ("sinks", view.layer),
            lambda: sinks_chart(sinks_table(seen), view.layer).to_dict(),
        )
    )
    st.caption(plain(_sinks_text(seen, view)))


def _show_distance(seen: ImageAttention, view: View, heads: pd.DataFrame) -> None:
    shown = (view.layer, view.head)
    st.subheader("Locality: how far heads look", anchor=False)
    st.vega_lite_chart(
        seen.chart(
            ("distance", *shown),
            lambda: distance_chart(heads, seen.grid, *shown).to_dict(),
        ),
        key=f"{KEY}distance",
        on_select=partial(_point_picked, "distance"),
        selection_mode=PICKED,
    )
    st.caption(
        "Distance between patch centres, weighted by attention, without prefix tokens. Each "
        "point is a head, and the line is the mean of a layer; click a point to show its head."
    )


def _show_entropy(seen: ImageAttention, view: View, heads: pd.DataFrame) -> None:
    shown = (view.layer, view.head)
    st.subheader("Heads by entropy, narrowest first", anchor=False)
    which = st.segmented_control(
        "Heads of",
        ["layer", "all"],
        key=f"{KEY}ranked",
        default="layer",
        required=True,
        format_func=lambda w: f"Layer {view.layer}" if w == "layer" else "All layers",
        label_visibility="collapsed",
    )
    most = math.log(seen.operators[0].shape[3])
    chosen = heads if which == "all" else heads[heads["layer"] == view.layer]
    with st.container(height=420 if len(chosen) > 18 else "content", border=False):
        st.vega_lite_chart(
            seen.chart(
                ("entropy", which, *shown),
                lambda: entropy_chart(chosen, most, *shown).to_dict(),
            ),
            key=f"{KEY}entropy",
            on_select=partial(_point_picked, "entropy"),
            selection_mode=PICKED,
        )
    st.caption(
        f"Entropy of a row over all tokens, including prefix tokens, averaged over queries; uniform "
        f"attention has {most:.2f} nats. Click a bar to show its head."
    )


def _show_table(heads: pd.DataFrame) -> None:
    st.dataframe(
        heads.drop(columns="name").sort_values("entropy"),
        hide_index=True,
        column_config={
            "layer": "Layer",
            "head": "Head",
            "entropy": st.column_config.NumberColumn("Entropy, nats", format="%.3f"),
            "bits": st.column_config.NumberColumn("Entropy, bits", format="%.3f"),
            "tokens": st.column_config.NumberColumn("As wide as tokens", format="%.1f"),
            "distance": st.column_config.NumberColumn("Distance, patches", format="%.2f"),
            "prefix": st.column_config.NumberColumn("To prefix tokens", format="percent"),
        },
    )


def _sinks_text(seen: ImageAttention, view: View) -> str:
    tokens, shares = seen.statistics[view.layer].sinks(SINKS)
    listed = "; ".join(
        f"{name_of(int(t), seen)} ({float(s):.1%})"
        for t, s in zip(tokens[0], shares[0], strict=True)
    )
    even = 1 / seen.operators[0].shape[3]
    return (
        f"Mean over heads and queries. Most attended patches of layer {view.layer}: {listed}. "
        f"An even share is {even:.2%}. Prefix tokens come before the patches: the class token and "
        "registers."
    )


def _point_picked(chart: str) -> None:
    selection = sent_value(f"{KEY}{chart}", "selection")
    points = (selection or {}).get(PICKED) or []
    if points:
        set_view(layer=int(points[0]["layer"]), head=str(int(points[0]["head"])))
