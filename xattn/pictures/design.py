"""What the viewer, reports and contact sheets look like: colours for light and dark, corners and distances.

Pages use the CSS variables of :data:`VARIABLES`, such as ``var(--quiet)``; each colour follows the
browser's choice of light or dark where ``color-scheme: light dark`` is set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"


@dataclass(frozen=True)
class Colours:
    """The colours of one theme, ``#rrggbb`` each."""

    ground: str
    """Behind everything."""
    panel: str
    """Of boxes, fields and the bars above and below a page."""
    text: str
    quiet: str
    """Of captions, units and what is said in passing."""
    accent: str
    """What can be pressed, is chosen, or matters most."""
    on_accent: str
    """Text on ``accent``."""
    link: str
    line: str
    """Of borders that only separate."""
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

LENGTHS = {
    "corner": "6px",
    "corner-large": "12px",
    "gap-small": "0.25rem",
    "gap": "0.5rem",
    "gap-large": "1rem",
    "touch": "44px",  # the least height and width of what a thumb presses
}

_colours = ";".join(
    f"--{name.replace('_', '-')}:light-dark({light},{asdict(DARK)[name]})"
    for name, light in asdict(LIGHT).items()
)
VARIABLES = _colours + "".join(f";--{name}:{length}" for name, length in LENGTHS.items())
"""The colours and lengths as CSS declarations, for ``:root{...}``."""
