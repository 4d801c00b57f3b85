"""Plain words for the columns of tables: the titles and sentences that metrics declare, with their levels.

Metrics, and torch with them, are loaded by the first call and not by the import, so that the viewer starts
without them. A key that is not known, such as that of a metric of your own, is its own title.
"""

from __future__ import annotations


def metric_title(key: str) -> str:
    """What a column's metric is called, with its level; an unknown key as it is.

    >>> metric_title("AD@50"), metric_title("AD@15"), metric_title("Gini")
    ('Average drop, top half', 'Average drop, top 15 %', 'Concentration (Gini)')
    """
    title, _, level = _words(key)
    return title + (f", {_part(level)}" if level else "") if title else key


def metric_about(key: str, higher_is_better: bool | None = None) -> str:
    """What a column says, in one sentence, and which direction is better; "" of an unknown key.

    >>> metric_about("AD@50", False)
    'How much confidence is lost when only the top half is kept. Lower is better.'
    """
    _, about, level = _words(key)
    removed = f"the {_part(level)}" if level else "what the map marks"
    kept = f"only {removed}"
    if level == "100":  # pixels count as much as the map says
        kept = removed = "as much of each pixel as the map says"
    said = [f"{about.format(kept=kept, removed=removed)}."] if about else []
    if higher_is_better is not None:
        said.append("Higher is better." if higher_is_better else "Lower is better.")
    return " ".join(said)


def named_metric(key: str) -> str:
    """A column's key with its title, for lists: "AD@50: average drop, top half"."""
    title = metric_title(key)
    if title == key:
        return key
    return f"{key}: {title if title[1:2].isupper() else title[0].lower() + title[1:]}"


def _words(key: str) -> tuple[str, str, str]:
    """Title, sentence and level of a column."""
    from xattn.eval.metrics.registry import WORDS

    name, _, level = key.partition("@")
    return (*WORDS.get(name, ("", "")), level)


def _part(level: str) -> str:
    return {"100": "whole map", "50": "top half"}.get(level, f"top {level} %")
