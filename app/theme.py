"""The viewer's look: colours and type for Streamlit's light and dark themes."""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

LIGHT = {
    "primaryColor": "#b4441f",
    "backgroundColor": "#fbfaf8",
    "secondaryBackgroundColor": "#f1efeb",
    "textColor": "#22201d",
    "linkColor": "#8f3415",
    "borderColor": "#dcd8d1",
}
DARK = {
    "primaryColor": "#f08a4b",
    "backgroundColor": "#171614",
    "secondaryBackgroundColor": "#23211e",
    "textColor": "#ebe8e3",
    "linkColor": "#f5a876",
    "borderColor": "#3a3733",
}

CONFIG: dict[str, Any] = {
    "theme.font": FONT,
    "theme.headingFont": FONT,
    "theme.baseRadius": "6px",
    "theme.showWidgetBorder": True,
    **{f"theme.light.{name}": value for name, value in LIGHT.items()},
    **{f"theme.dark.{name}": value for name, value in DARK.items()},
}
"""Options for ``streamlit.starlette.App.run(config=...)``."""
