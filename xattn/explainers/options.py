"""Options of explainers as the command line gives them, ``explainer.name=value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xattn.heads import parse_options
from xattn.runtime.names import same_name


def options_by_name(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of each of ``names``, with values as in :func:`xattn.heads.parse_options`.

    >>> options_by_name(["rise.masks=1000", "head.passes=4"], ["rise", "head"])
    {'rise': {'masks': 1000}, 'head': {'passes': 4}}

    Raises:
        ValueError: no ``name.option=value`` of one of the names.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        key, equals, value = text.partition("=")
        name, dot, option = key.rpartition(".")  # a head's row may have dots in its name
        row = same_name(name, names)
        if not dot or row is None:
            raise ValueError(
                f"options: got {text!r}; write name.option=value with a name of {', '.join(names)}"
            )
        found.setdefault(row, {}).update(parse_options([option + equals + value]))
    return found
