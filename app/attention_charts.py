"""Charts of a model's attention on one image: sinks, distance and entropy, by layer and head."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from xattn.app.reading import Reading
from xattn.attention.statistics import bits, breadth, uniform_distance

SINKS = 5  # patches that count as the most attended ones
PARTS = ("prefix tokens", f"{SINKS} most attended patches")
PICKED = "pick"  # the charts' selection
_ACCENT, _GREY = "#c9602f", "#8a857e"  # on light and dark ground alike
_PART_COLOURS = ("#c9602f", "#8a857e")


def heads_table(reading: Reading) -> pd.DataFrame:
    """One row a head: layer, head, entropy (nats), bits, tokens, distance (patches), prefix share."""
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
                    "tokens": breadth(nats),
                    "distance": float(found.distance[0, head]),
                    "prefix": float(found.prefix_mass[0, head]),
                }
            )
    table = pd.DataFrame(rows)
    table["name"] = "layer " + table["layer"].astype(str) + ", head " + table["head"].astype(str)
    return table


def sinks_table(reading: Reading) -> pd.DataFrame:
    """One row a layer and kind of sink: its share of the attention, mean over heads."""
    rows = []
    for layer, found in enumerate(reading.statistics):
        prefix = float(found.prefix_mass[0].mean())
        most = float(found.sinks(SINKS)[1][0].sum())
        for order, share in enumerate((prefix, most)):
            rows.append({"layer": layer, "part": PARTS[order], "share": share, "order": order})
    table = pd.DataFrame(rows)
    return table if reading.prefix else table[table["order"] == 1]


def sinks_chart(table: pd.DataFrame, layer: int) -> alt.Chart:
    """Stacked shares by layer; the layer that is shown is the full-coloured one."""
    parts = [part for part in PARTS if part in set(table["part"])]
    return (
        alt.Chart(table, height=260)
        .mark_bar(strokeWidth=1.5)
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="share of attention", axis=alt.Axis(format="%")),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=parts, range=list(_PART_COLOURS[-len(parts) :])),
                legend=alt.Legend(orient="bottom", labelLimit=300),
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
    """A point a head, a line for the mean of a layer, a rule for uniform attention."""
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
    return alt.layer(mean, rule, text, dots).properties(height=260)


def entropy_chart(table: pd.DataFrame, most: float, layer: int, head: str) -> alt.Chart:
    """Heads from the narrowest to the broadest; ``most`` is the entropy of uniform attention."""
    ranked = _by_head(table, layer, head).sort_values("entropy")
    return (
        alt.Chart(ranked, height=22 * len(ranked) + 70)
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
