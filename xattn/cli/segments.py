"""``xattn explain --segmenter``: make a map for a class in the whole photo, at a point or in a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.cli.detections import build_from_file, split_function_name
from xattn.cli.model import BackboneArgs, device_name

_NUMBER = r"\d+\.?\d*|\.\d+"
_POINT = re.compile(rf"({_NUMBER}),({_NUMBER})")


def requested_places(at: Sequence[str]) -> list[tuple[str | None, Any]]:
    """Return the classes and places given by ``--at``.

    >>> requested_places(["dog@120,80", "@10,20"])
    [('dog', (120.0, 80.0)), (None, (10.0, 20.0))]
    """
    found: list[tuple[str | None, Any]] = []
    for text in at:
        label, given, place = text.partition("@")
        point = _POINT.fullmatch(place)
        if point is None and (not given or not Path(place).is_file()):
            raise ValueError(
                f"at: got {text!r}; give CLASS@x,y in pixels of the photo, such as dog@120,80, "
                "or CLASS@FILE with an existing mask file"
            )
        where = Path(place) if point is None else (float(point[1]), float(point[2]))
        found.append((label or None, where))
    return found


def load(name: str, model: BackboneArgs) -> Any:
    """Load the network given by ``--segmenter``, with the general network options that apply to it."""
    from xattn.backbone import Backbone, load_segmenter

    sources = {"auto": "DEFAULT", "timm": "DEFAULT", "package": "DEFAULT", "random": None}
    device = device_name(model.device)
    path, attribute = split_function_name(name)
    given: Any = name if path is None else build_from_file("segmenter", path, attribute)
    if isinstance(given, Backbone):
        return given.to(device)
    return load_segmenter(
        given,
        sources.get(model.weights, model.weights),
        device,
        input_size=model.input_size,
        class_names=model.class_names,
        task=model.task,  # type: ignore[arg-type]
        mean=model.mean or None,
        std=model.std or None,
    )
