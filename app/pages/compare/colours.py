"""How charts tell methods apart: by colour, and without it by dashes and shapes."""

from __future__ import annotations

from typing import Any

import altair as alt
import streamlit as st

from xattn.pictures.design import SERIES_DARK, SERIES_LIGHT

DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def palette() -> list[str]:
    """The colours of methods on the ground of the current theme."""
    return list(SERIES_DARK if st.context.theme.type == "dark" else SERIES_LIGHT)


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
