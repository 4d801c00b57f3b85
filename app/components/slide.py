"""A before/after slider: two pictures of one size, the second shown left of a movable edge."""

from __future__ import annotations

from xattn.app.components import component


def slide(
    before: tuple[str, str], after: tuple[str, str], *, label: str, alt: str, key: str
) -> None:
    """Show two pictures over each other; the edge moves with the pointer and with the arrow keys.

    Args:
        before: URL and name of the picture on the right of the edge.
        after: of the one on the left.
        label: what the slider is called by a screen reader.
        alt: what the pictures show.
    """
    data = {
        "before": {"src": before[0], "name": before[1]},
        "after": {"src": after[0], "name": after[1]},
        "label": label,
        "alt": alt,
    }
    component("slide")(data=data, key=key)
