"""Titles and descriptions of table columns, made from each metric's declaration and the column's level.

A pack stores both, so the viewer can show them with :func:`name_and_title` and :func:`with_direction`,
which do not need torch. The other functions, such as :func:`metric_title`, import the metrics and torch.
The title of an unknown key is the key itself.
"""

from __future__ import annotations


def metric_title(key: str) -> str:
    """The title of a column's metric with its level; an unknown key is returned unchanged.

    >>> metric_title("AD@50"), metric_title("AD@15"), metric_title("Gini")
    ('Average drop, top half', 'Average drop, top 15 %', 'Concentration (Gini)')
    """
    title, _, level = _words(key)
    return title + (f", {_part(level)}" if level else "") if title else key


def metric_about(key: str, higher_is_better: bool | None = None) -> str:
    """One sentence on what a column measures and which direction is better; "" for an unknown key.

    >>> metric_about("AD@50", False)
    'How much confidence is lost when only the top half is kept. Lower is better.'
    """
    _, about, level = _words(key)
    removed = f"the {_part(level)}" if level else "what the map marks"
    kept = f"only {removed}"
    if level == "100":  # no threshold: each pixel is weighted by the map's value
        kept = removed = "as much of each pixel as the map says"
    said = f"{about.format(kept=kept, removed=removed)}." if about else ""
    return with_direction(said, higher_is_better)


def named_metric(key: str) -> str:
    """A column's key followed by its title, for lists: "AD@50: average drop, top half"."""
    return name_and_title(key, metric_title(key))


def name_and_title(key: str, title: str) -> str:
    """A column's key followed by ``title``; the key alone if ``title`` is "" or the key itself."""
    if title in ("", key):
        return key
    return f"{key}: {title if title[1:2].isupper() else title[0].lower() + title[1:]}"


def with_direction(about: str, higher_is_better: bool | None) -> str:
    """Return ``about`` (a description or "") and a sentence on which direction is better."""
    said = [about] if about else []
    if higher_is_better is not None:
        said.append("Higher is better." if higher_is_better else "Lower is better.")
    return " ".join(said)


def _words(key: str) -> tuple[str, str, str]:
    """The title, description and level of a column."""
    from xattn.eval.metrics.registry import WORDS

    name, _, level = key.partition("@")
    return (*WORDS.get(name, ("", "")), level)


def _part(level: str) -> str:
    return {"100": "whole map", "50": "top half"}.get(level, f"top {level} %")
