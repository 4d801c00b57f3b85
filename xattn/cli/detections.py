"""``xattn explain --detector``: make a map for each detection in the photos."""

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


def requested_objects(missed: Sequence[str]) -> list[tuple[str, tuple[float, ...]]]:
    """Return the classes and boxes given by ``--missed``.

    >>> requested_objects(["dog@10,20,110,220"])
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


def check_detector(name: str, kind: str = "detector") -> None:
    """Reject a file that does not exist, before torch is imported; ``kind`` is the name of the option."""
    path, _ = split_function_name(name)
    if path is not None and not path.is_file():
        raise ValueError(
            f"{kind}: there is no file {path}; give FILE.py:NAME with an existing file"
        )
    if path is None and not name.startswith(("torchvision/", "transformers:")):
        raise ValueError(
            f"{kind}: got {name!r}; give torchvision/NAME, transformers:NAME, or FILE.py:NAME of a "
            f"function that returns a {kind}"
        )


def split_function_name(name: str) -> tuple[Path | None, str]:
    """Split FILE.py:NAME into the file and the function; for any other form return None and the name."""
    path, own, attribute = name.partition(OWN)
    return (Path(f"{path}.py") if own else None), attribute


def load(name: str, model: BackboneArgs) -> Any:
    """Load the detector given by ``--detector``, with the network options that apply to it."""
    from xattn.detection import Detector, load_detector

    weights = {"auto": "DEFAULT", "timm": "DEFAULT", "random": None}.get(
        model.weights, model.weights
    )
    device = device_name(model.device)
    path, attribute = split_function_name(name)
    given: Any = name if path is None else build_from_file("detector", path, attribute)
    if isinstance(given, Detector):
        return given.to(device)
    return load_detector(
        given, weights, device, input_size=model.input_size, class_names=model.class_names
    )


def build_from_file(kind: str, path: Path, attribute: str) -> Any:
    """Return the result of a function in a file: a detector, or another ``kind`` of network."""
    module = load_file(path, kind)
    if not callable(getattr(module, attribute, None)):
        raise ValueError(
            f"{kind}: {path} has no function {attribute!r}; name a function that takes no "
            f"arguments and returns a {kind}"
        )
    return getattr(module, attribute)()
