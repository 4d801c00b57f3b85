"""How charts tell methods apart: by colour, and without it by dashes and shapes."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

LIGHT = ["#b4441f", "#2f6f9f", "#6a8f2f", "#8a5aa8", "#b07a10", "#2f8579", "#a0527c", "#6f6a62"]
DARK = ["#f08a4b", "#74b3e0", "#a5c964", "#c39ae0", "#e3b64c", "#63c3b4", "#e08fbb", "#b5afa6"]
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def palette() -> list[str]:
    """The colours of methods on the ground of the current theme."""
    return DARK if st.context.theme.type == "dark" else LIGHT


def method_colour(names: list[str], legend: alt.Legend) -> alt.Color:
    """The colour of each method; ``names`` in the order of the palette."""
    colours_of_theme = palette()
    colours = [colours_of_theme[i % len(colours_of_theme)] for i in range(len(names))]
    return alt.Color("method:N", scale=alt.Scale(domain=names, range=colours), legend=legend)


def method_legend(**symbol: Any) -> alt.Legend:
    """A legend of methods below a chart."""
    return alt.Legend(
        title=None, orient="bottom", columns=2, labelLimit=220, symbolOpacity=1, **symbol
    )
