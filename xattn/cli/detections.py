"""``xattn explain --detector``: a map for each detection of the photos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.cli.imports import load_file
from xattn.cli.model import BackboneArgs, device_name

_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_ASKED = re.compile(rf"(?P<label>.+)@(?P<box>{_NUMBER}(?:,{_NUMBER}){{3}})")
OWN = ".py:"  # FILE.py:NAME


def asked_objects(missed: Sequence[str]) -> list[tuple[str, tuple[float, ...]]]:
    """Classes and boxes of ``--missed``.

    >>> asked_objects(["dog@10,20,110,220"])
    [('dog', (10.0, 20.0, 110.0, 220.0))]
    """
    found = []
    for text in missed:
        match = _ASKED.fullmatch(text)
        if match is None:
            raise ValueError(
                f"missed: got {text!r}; give CLASS@x0,y0,x1,y1 in pixels of the photo, such as "
                f"dog@10,20,110,220"
            )
        found.append((match["label"], tuple(float(v) for v in match["box"].split(","))))
    return found


def check_detector(name: str) -> None:
    """Refuse a file that is not there, before torch is imported."""
    path, own, _ = name.partition(OWN)
    if own and not Path(f"{path}.py").is_file():
        raise ValueError(f"detector: no file {path}.py; give FILE.py:NAME of one that is there")
    if not own and not name.startswith(("torchvision/", "transformers:")):
        raise ValueError(
            f"detector: got {name!r}; give torchvision/NAME, transformers:NAME, or FILE.py:NAME of a "
            f"function that returns a detector"
        )


def load(name: str, model: BackboneArgs) -> Any:
    """The detector of ``--detector``, with the options of the network that are its, too."""
    from xattn.detection import Detector, load_detector

    weights = {"auto": "DEFAULT", "timm": "DEFAULT", "random": None}.get(
        model.weights, model.weights
    )
    device = device_name(model.device)
    path, own, attribute = name.partition(OWN)
    given: Any = _made(Path(f"{path}.py"), attribute) if own else name
    if isinstance(given, Detector):
        return given.to(device)
    return load_detector(
        given, weights, device, input_size=model.input_size, class_names=model.class_names
    )


def _made(path: Path, attribute: str) -> Any:
    module = load_file(path, "detector")
    if not callable(getattr(module, attribute, None)):
        raise ValueError(
            f"detector: {path} has no function {attribute!r}; name one that takes nothing and returns a "
            f"detector"
        )
    return getattr(module, attribute)()
