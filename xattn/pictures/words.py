"""Plain words for what packs and tables call by a key: a title and a sentence for each metric.

They stand here and not on the classes, since the viewer shows them without loading a network's library.
A key that is not listed, such as a metric of your own, is its own title.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """A title, and one sentence without its full stop; ``{kept}`` or ``{removed}`` in it is the part of
    the photo that is meant at the metric's level."""

    title: str
    about: str


_REPLACED = "pixels are replaced by what is around them"
METRICS = {
    "AD": Words("Average drop", "How much confidence is lost when {kept} is kept"),
    "IC": Words("Increase in confidence", "How often confidence rises when {kept} is kept"),
    "ADD": Words(
        "Average drop in deletion", "How much confidence is lost when {removed} is removed"
    ),
    "AG": Words("Average gain", "How much of the missing confidence is won when {kept} is kept"),
    "drop": Words("Drop", "How many points of confidence are lost when {kept} is kept"),
    "deletion": Words(
        "Deletion", "How much confidence is left while pixels are removed, the most important first"
    ),
    "insertion": Words(
        "Insertion", "How much confidence there is while pixels come back, the most important first"
    ),
    "ROAD-MoRF": Words(
        "ROAD, most important first",
        f"How much confidence is left when the most important {_REPLACED}",
    ),
    "ROAD-LeRF": Words(
        "ROAD, least important first",
        f"How much confidence is left when the least important {_REPLACED}",
    ),
    "ROAD": Words(
        "ROAD", "How much more confidence the most important pixels carry than the least important"
    ),
    "AOPC": Words(
        "Pixel flipping",
        "How much confidence is lost while patches are removed, the most important first",
    ),
    "IROF": Words(
        "Removal of superpixels",
        "How fast confidence falls while superpixels are removed, the most important first",
    ),
    "infidelity": Words(
        "Infidelity", "How badly the map foretells what a change of the photo does"
    ),
    "monotonicity": Words(
        "Monotonicity", "How well a patch's value in the map goes with its effect on the score"
    ),
    "Gini": Words("Concentration (Gini)", "How much the map concentrates on a few places"),
    "entropy": Words("Entropy", "How widely the map is spread over the photo"),
    "pointing": Words("Pointing game", "How often the map's highest point lies on the object"),
    "energy-pointing": Words("Share on the object", "How much of the map lies on the object"),
    "IoU": Words(
        "Overlap with the object", "How well the map's highest part covers the object alone"
    ),
    "coherency": Words("Coherency", "How alike the map stays when the photo is masked with it"),
    "complexity": Words("Extent", "How much of the photo the map marks"),
    "ADCC": Words("ADCC", "Average drop, coherency and extent in one number"),
    "max-sensitivity": Words(
        "Greatest change", "How much the map changes when the photo changes a little, at most"
    ),
    "randomization-Spearman": Words(
        "Likeness on random weights, by ranks",
        "How alike the map stays when the network forgets what it learned",
    ),
    "randomization-SSIM": Words(
        "Likeness on random weights, by structure",
        "How alike the map looks when the network forgets what it learned",
    ),
}


def metric_title(key: str) -> str:
    """What a column's metric is called, with its level; an unknown key as it is.

    >>> metric_title("AD@50"), metric_title("AD@15"), metric_title("Gini")
    ('Average drop, top half', 'Average drop, top 15 %', 'Concentration (Gini)')
    """
    name, _, level = key.partition("@")
    if name not in METRICS:
        return key
    return METRICS[name].title + (f", {_part(level)}" if level else "")


def metric_about(key: str, higher_is_better: bool | None = None) -> str:
    """What a column says, in one sentence, and which direction is better; "" of an unknown key.

    >>> metric_about("AD@50", False)
    'How much confidence is lost when only the top half is kept. Lower is better.'
    """
    name, _, level = key.partition("@")
    about = METRICS[name].about if name in METRICS else ""
    removed = f"the {_part(level)}" if level else "what the map marks"
    kept = f"only {removed}"
    if level == "100":  # pixels count as much as the map says
        kept = removed = "as much of each pixel as the map says"
    better = {True: "Higher is better.", False: "Lower is better.", None: ""}[higher_is_better]
    sentence = about and f"{about.format(kept=kept, removed=removed)}."
    return f"{sentence} {better}".strip()


def named_metric(key: str) -> str:
    """A column's key with its title, for lists: "AD@50: average drop, top half"."""
    title = metric_title(key)
    if title == key:
        return key
    return f"{key}: {title if title[1:2].isupper() else title[0].lower() + title[1:]}"


def _part(level: str) -> str:
    return {"100": "whole map", "50": "top half"}.get(level, f"top {level} %")
