"""The losses of a job as charts."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from xattn.app.jobs.jobs import Job

POINTS = 1000  # of a curve
ACCENT = "#d4622f"  # between the accents of the light and the dark theme
COLOURS = [
    ACCENT,
    "#3f86b8",
    "#8a8f3c",
    "#a35fa8",
    "#3f9a82",
    "#b08440",
]  # told apart by dashes, too
TERMS = {
    "loss": "Loss",
    "cross_entropy": "Cross-entropy of the masked photo",
    "area": "Area of the mask",
    "variation": "Variation of the mask",
    "validation_loss": "Loss on validation photos",
    "accuracy": "Accuracy on validation photos",
}


def losses_view(job: Job, logs: dict[str, list[dict[str, float]]]) -> None:
    """Show the loss, and in a folded part its terms."""
    tables = _tables(logs)
    steps = max(int(t["step"].iloc[-1]) for t in tables.values())
    epochs = [t["epoch"].max() for t in tables.values() if "epoch" in t]
    epoch = f", epoch {int(max(epochs)) + 1:,}" if epochs else ""
    st.markdown(f"**Loss**, step {steps:,}{epoch}")
    st.altair_chart(_curve(tables, "loss"), width="stretch")
    st.caption("A dot is a step, the line the mean over an epoch.")
    others = [c for c in TERMS if c != "loss" and any(c in t for t in tables.values())]
    if others:
        with st.expander("Terms of the loss" if job.spec.kind == "train" else "More of the log"):
            for column in others:
                st.caption(TERMS[column])
                st.altair_chart(_curve(tables, column, 140), width="stretch")


def overlay_view(logs: dict[str, list[dict[str, float]]]) -> None:
    """The losses of several jobs in one chart; ``logs`` by what the legend calls them."""
    tables = {name: table for name, table in _tables(logs).items() if "loss" in table}
    if not tables:
        st.info("None of these jobs has written a loss yet.")
        return
    st.markdown(f"**Losses of {len(tables)} runs**")
    st.altair_chart(_curve(tables, "loss"), width="stretch")
    st.caption(
        "A dot is a step, the line the mean over an epoch. Losses of one kind of head can be compared; "
        "different kinds measure different things."
    )


def _tables(logs: dict[str, list[dict[str, float]]]) -> dict[str, pd.DataFrame]:
    """The logs that have begun; of a step that was done again after a kill the last record."""
    return {
        name: pd.DataFrame(records).drop_duplicates("step", keep="last")
        for name, records in logs.items()
        if records
    }


def _curve(tables: dict[str, pd.DataFrame], column: str, height: int = 240) -> alt.Chart:
    """Each step as a dot, and their mean over an epoch as a line."""
    parts = []
    for name, table in tables.items():
        if column not in table:
            continue
        part = table[["step", column]].dropna().rename(columns={column: "value"})
        width = int(table["epoch"].value_counts().max()) if "epoch" in table else 1
        part["mean"] = part["value"].rolling(max(width, 1), min_periods=1).mean()
        part["head"] = name or TERMS[column]
        parts.append(part.iloc[:: max(1, len(part) // POINTS)])
    if not parts:
        raise ValueError(f"log.jsonl of this job holds no {column}; look at what it printed.")
    data = pd.concat(parts)
    base = alt.Chart(data, height=height, description=f"{TERMS[column]} by step").encode(
        x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format=",d")),
    )
    colour: Any = alt.value(ACCENT)
    dash: Any = alt.value([1, 0])
    if len(parts) > 1:
        heads = [part["head"].iloc[0] for part in parts]
        legend = alt.Legend(orient="top", symbolType="stroke", symbolStrokeWidth=2)
        colour = alt.Color(
            "head:N", title=None, sort=heads, scale=alt.Scale(range=COLOURS), legend=legend
        )
        dash = alt.StrokeDash("head:N", title=None, sort=heads, legend=legend)
    tip = [
        alt.Tooltip("step:Q"),
        alt.Tooltip("value:Q", format=".4g"),
        alt.Tooltip("mean:Q", format=".4g"),
    ]
    value = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    dots = base.mark_circle(size=28, opacity=0.6).encode(y=value, color=colour, tooltip=tip)
    line = base.mark_line(strokeWidth=2).encode(y="mean:Q", color=colour, strokeDash=dash)
    return dots + line
