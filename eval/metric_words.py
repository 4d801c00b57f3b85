"""Plain words for the columns of tables: the titles and sentences that metrics declare, with their levels.

A pack carries both, so that the viewer shows them by :func:`named` and :func:`directed` without loading
metrics, and torch with them; :func:`metric_title` and the others do. A key that is not known is its own
title.
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
    said = f"{about.format(kept=kept, removed=removed)}." if about else ""
    return directed(said, higher_is_better)


def named_metric(key: str) -> str:
    """A column's key with its title, for lists: "AD@50: average drop, top half"."""
    return named(key, metric_title(key))


def named(key: str, title: str) -> str:
    """A column's key with a title, which is "" or the key where there is none."""
    if title in ("", key):
        return key
    return f"{key}: {title if title[1:2].isupper() else title[0].lower() + title[1:]}"


def directed(about: str, higher_is_better: bool | None) -> str:
    """A sentence about a metric, which may be "", and which direction is better."""
    said = [about] if about else []
    if higher_is_better is not None:
        said.append("Higher is better." if higher_is_better else "Lower is better.")
    return " ".join(said)


def _words(key: str) -> tuple[str, str, str]:
    """Title, sentence and level of a column."""
    from xattn.eval.metrics.registry import WORDS

    name, _, level = key.partition("@")
    return (*WORDS.get(name, ("", "")), level)


def _part(level: str) -> str:
    return {"100": "whole map", "50": "top half"}.get(level, f"top {level} %")
