"""The control for how maps are drawn: style, the model's crop or the whole photo, scale and colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from xattn.app import state
from xattn.app.pictures.rendering import Look

# Streamlit writes the label of a bound choice to the URL, so these names are part of links.
STYLES = {"overlay": "Overlay", "outline": "Outline", "spotlight": "Spotlight"}
PARTS = {"crop": "Model's crop", "whole": "Whole photo"}
SCALES = {"auto": "Automatic", "map": "Min to max", "clip": "1 to 99 %", "shared": "Shared"}
COLOURS = {
    "auto": "Automatic",
    "inferno": "Inferno",
    "diverging": "Diverging",
    "viridis": "Viridis",
    "cividis": "Cividis",
    "gray": "Grey",
}
WIDTH = 300  # width of the control in pixels
_ABOUT = {
    "overlay": "Colours over the photo. Point at a picture to see the photo without them.",
    "outline": "A line around the smallest region that holds half of the map.",
    "spotlight": "The photo keeps its colours, and is dark where the map is low.",
    "photo": "The photo without its map.",
}


def look_control(
    bar: Any,
    prefix: str = "",
    *,
    bound: bool = False,
    styles: Mapping[str, str] = STYLES,
    style: str = "style",
    first: Mapping[str, str] | None = None,
) -> Look:
    """Show the popover "Look" and return the choices. If the maps do not have the chosen style, they
    are drawn as an overlay.

    Args:
        bar: the container for the popover.
        prefix: prefix of the widgets' keys, which are ``style``, ``part``, ``scale`` and ``colours``, and
            if ``bound`` also ``opacity`` and ``threshold``.
        bound: whether the widgets' values are in the URL; otherwise they are already in the session.
        styles: the available styles: values with their names.
        style: the key of the style.
        first: default values by key, if they are not the first options.
    """
    first = first or {}
    if not bound:  # the popover can be opened at any time
        state.restore_widgets(*(prefix + key for key in (style, "part", "scale", "colours")))

    def choose(label: str, names: Mapping[str, str], key: str, **rest: Any) -> str:
        if bound:
            rest |= {"default": first.get(key, next(iter(names))), "bind": "query-params"}
        return st.segmented_control(
            label,
            list(names),
            key=prefix + key,
            format_func=lambda value: names[value],
            required=True,
            **rest,
        )

    # Narrow, so that pictures beside it show what a choice does.
    with bar.popover("Look", icon=":material/palette:"), st.container(width=WIDTH):
        chosen = choose("Style", styles, style)
        st.caption(_ABOUT[chosen])
        part = choose("Part of the photo", PARTS, "part")
        scale = choose(
            "Colour scale",
            SCALES,
            "scale",
            disabled=chosen not in ("overlay", "spotlight"),
            help="Min to max: each map from its smallest to its largest value. 1 to 99 %: between these "
            "percentiles of its values, for maps with a few extreme values. Automatic: one of the two. "
            "Shared: raw scores on one scale for all maps; methods can be compared on it only if their "
            "scores have the same unit.",
        )
        cmap = st.selectbox(
            "Colours",
            list(COLOURS),
            key=f"{prefix}colours",
            format_func=lambda value: COLOURS[value],
            bind="query-params" if bound else None,
            disabled=chosen != "overlay",
            help="Automatic is Inferno, and blue to orange for maps with negative values.",
        )
        opacity, threshold = _sliders(chosen) if bound else (Look.opacity, Look.threshold)
    return Look(
        opacity,
        threshold,
        scale,
        cmap,
        style=chosen if chosen in STYLES else "overlay",
        crop=part == "crop",
    )


def _sliders(style: str) -> tuple[float, float]:
    """Opacity and threshold, bound to the URL."""

    def slider(label: str, usual: float, about: str) -> float:
        rest: dict[str, Any] = {
            "key": label.lower(),
            "bind": "query-params",
            "disabled": style == "outline",
        }
        return float(st.slider(label, 0.0, 1.0, usual, 0.05, help=about, **rest))

    below = "Where the map is below this share of the scale, the photo is left as it is, or is dark in a "
    return (
        slider("Opacity", Look.opacity, "For a spotlight, how dark the rest of the photo is."),
        slider("Threshold", Look.threshold, f"{below}spotlight."),
    )
