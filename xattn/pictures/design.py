"""The design of the viewer, reports and contact sheets: light and dark colours, corners and distances.

Pages use the CSS variables of :data:`VARIABLES`, such as ``var(--quiet)``; each colour follows the
browser's choice of light or dark where ``color-scheme: light dark`` is set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Colours:
    """The colours of one theme, each ``#rrggbb``."""

    ground: str
    """Behind everything."""
    panel: str
    """Background of boxes, fields and the bars above and below a page."""
    text: str
    quiet: str
    """Text of captions, units and asides."""
    accent: str
    """For what can be pressed, is selected, or matters most."""
    on_accent: str
    """Text on ``accent``."""
    link: str
    line: str
    """For borders that only separate."""
    good: str
    wrong: str


LIGHT = Colours(
    ground="#fbfaf8",
    panel="#f1efeb",
    text="#22201d",
    quiet="#625d56",
    accent="#b4441f",
    on_accent="#ffffff",
    link="#8f3415",
    line="#dcd8d1",
    good="#2f6f4f",
    wrong="#a11d1d",
)
DARK = Colours(
    ground="#171614",
    panel="#23211e",
    text="#ebe8e3",
    quiet="#a9a49c",
    accent="#f08a4b",
    on_accent="#22201d",
    link="#f5a876",
    line="#3a3733",
    good="#7cc4a0",
    wrong="#ffa39b",
)

# Lines and dots that must be distinguishable, for each background.
SERIES_LIGHT = (
    *("#b4441f", "#2f6f9f", "#6a8f2f", "#8a5aa8"),
    *("#b07a10", "#2f8579", "#a0527c", "#6f6a62"),
)
SERIES_DARK = (
    *("#f08a4b", "#74b3e0", "#a5c964", "#c39ae0"),
    *("#e3b64c", "#63c3b4", "#e08fbb", "#b5afa6"),
)

LENGTHS = {
    "corner": "6px",
    "corner-large": "12px",
    "gap-small": "0.25rem",
    "gap": "0.5rem",
    "gap-large": "1rem",
    "touch": "44px",  # smallest height and width of what a thumb presses
}

_colours = ";".join(
    f"--{name.replace('_', '-')}:light-dark({light},{asdict(DARK)[name]})"
    for name, light in asdict(LIGHT).items()
)
_series = "".join(
    f";--c{i}:light-dark({light},{dark})"
    for i, (light, dark) in enumerate(zip(SERIES_LIGHT, SERIES_DARK, strict=True))
)
VARIABLES = _colours + _series + "".join(f";--{name}:{length}" for name, length in LENGTHS.items())
"""The colours and lengths as CSS declarations, for ``:root{...}``."""

LEGENDS = """
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.1rem .6rem;font-size:.8125rem;
color:var(--quiet);font-variant-numeric:tabular-nums}
.legend+.legend{margin-top:.35rem}
.legend i{width:160px;height:10px;border-radius:5px;border:1px solid #8885;
background-origin:border-box!important}
.legend i.line{width:40px;height:7px;border:solid #101010;border-width:2px 0;border-radius:0;
background:#fff;outline:1px solid #8885}
.legend em{font-style:normal}
"""
"""The style of ``contact_sheet.legends_html``."""
