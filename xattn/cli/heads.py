"""Find the heads that a command's options ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xattn.cli.model import BackboneArgs


def default_head(backbone: Any) -> str | None:
    """Return the shipped head whose backbone has the weight hash of ``backbone``; None if there is none. If
    there are several, a head of type ``evidence`` is preferred."""
    from xattn.heads.base import read_config
    from xattn.runtime.head_files import shipped_heads

    configs = {name: read_config(folder) for name, folder in shipped_heads().items()}
    fitting = [n for n, c in configs.items() if c["backbone"]["sha256"] == backbone.fingerprint]
    return min(fitting, key=lambda name: configs[name]["head"] != "evidence", default=None)


def accepts_head(backbone: Any) -> bool:
    """Return whether :func:`choose_head` finds a head for ``backbone`` without being given one."""
    return hasattr(backbone, "probe") or default_head(backbone) is not None


def load_with_classifier(
    model: BackboneArgs, heads: tuple[str, ...]
) -> tuple[Any, tuple[str, ...]]:
    """Load the backbone, and return it with the heads that remain to be loaded; a head of ``xattn probe``
    becomes its classifier instead."""
    if len(heads) == 1 and model.probe is None and probe_options(heads[0]) is not None:
        return replace(model, probe=heads[0]).load(), ()
    return model.load(), heads


def probe_options(source: str) -> dict[str, Any] | None:
    """Return the options of a head that is a classifier, or None for any other head."""
    from xattn.heads import AttentiveHead, head_class, head_folder, read_config

    config = read_config(head_folder(source))
    return config["options"] if issubclass(head_class(config["head"]), AttentiveHead) else None


def choose_head(source: str | None, backbone: Any) -> Any:
    """Load the head ``source`` on the backbone's device. If ``source`` is None, use the head of a probed
    backbone or a shipped head that fits."""
    from xattn.heads import load_head

    if source is None and hasattr(backbone, "probe"):
        return backbone.probe
    source = source or default_head(backbone)
    if source is None:
        raise ValueError(
            f"head: no shipped head fits {backbone.name} with these weights; train one with "
            f"'xattn train' and give its folder with --heads (xattn explain takes --explainers instead)"
        )
    return load_head(source, backbone).to(backbone.device)


def choose_heads(sources: tuple[str, ...], backbone: Any) -> tuple[list[str], list[Any]]:
    """Return the names and the heads that were given or, if none were, the head of a probed backbone or a
    shipped head that fits."""
    if not sources and hasattr(backbone, "probe"):
        return [backbone.probe.name], [backbone.probe]
    for source in () if hasattr(backbone, "probe") else sources:
        options = probe_options(source) or {}
        names, count = options.get("class_names"), options.get("classes")
        if names not in (None, backbone.class_names) or count not in (None, backbone.num_classes):
            raise ValueError(
                f"heads: {source} has its own classes; give --probe {source} instead, so that it "
                "becomes the classifier"
            )
    names = list(sources) or list(filter(None, [default_head(backbone)]))
    return names, [choose_head(name, backbone) for name in names]


def explainers_of(
    rows: Sequence[str],
    heads: Mapping[str, Any],
    given: Sequence[str],
    backbone: Any,
    **shared: Any,
) -> dict[str, Any]:
    """Create an explainer for each of ``rows``, with the options ``given``. A row is the name of a method
    or of one of ``heads``."""
    from xattn.explainers import create_explainer
    from xattn.explainers.base import options_by_name

    options = options_by_name(given, [*rows, *(["head"] if heads else [])])
    first = next(iter(heads.values()), None)
    found = {}
    for row in rows:
        kind, head = ("head", heads[row]) if row in heads else (row, first)
        chosen = (options.get("head", {}) if row in heads else {}) | options.get(row, {})
        found[row] = create_explainer(kind, backbone, head, **shared, **chosen)
    return found


def row_name(source: str, name: str, taken: set[str]) -> str:
    """Return a head's name in tables: the name of its run, with a prime for each time that name is already
    ``taken``."""
    from xattn.runtime.files import printable

    path = Path(source)
    label = (
        path.parent.name if path.name in ("head", "head-half") and path.parent.name else path.name
    )
    label = printable(label or name)
    while label in taken:
        label += "'"
    return label
