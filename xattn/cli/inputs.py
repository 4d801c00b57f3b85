"""``xattn explain --multi-input``: explain every input of a network with several inputs, which are read
from one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.cli.detections import build_from_file, split_function_name
from xattn.cli.model import BackboneArgs, device_name

SAMPLES = (".npz", ".pt", ".pth")


def check_sample(images: Sequence[str], network: str) -> None:
    """Reject an input file of the wrong kind, and a network whose file does not exist, before torch is
    imported."""
    path, _ = split_function_name(network)
    if path is None or not path.is_file():
        raise ValueError(
            f"multi_input: got {network!r}; give FILE.py:NAME of a function that returns the network"
        )
    if len(images) != 1 or not images[0].lower().endswith(SAMPLES):
        raise ValueError(
            f"images: got {', '.join(images[:2])}; with --multi-input give one .npz or .pt file "
            "with one entry per input"
        )


def read_sample(path: Path) -> dict[str, Any] | tuple[Any, ...]:
    """Read the inputs from a file: a dict by name, or a tuple if ``numpy.savez`` was called without names
    or the file holds a list.

    Raises:
        ValueError: the file holds something else.
    """
    import numpy as np
    import torch

    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as entries:
                found: Any = {name: torch.from_numpy(entries[name]) for name in entries}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"images: {path} cannot be read ({reason}); write it with numpy.savez, or write a "
            "dict of tensors with torch.save"
        ) from None
    if isinstance(found, dict) and list(found) == [f"arr_{i}" for i in range(len(found))]:
        found = tuple(found.values())
    if not isinstance(found, dict | tuple | list) or not found:
        raise ValueError(
            f"images: {path} holds a {type(found).__name__}; store a dict with one tensor per input"
        )
    return found if isinstance(found, dict) else tuple(found)


def load(network: str, model: BackboneArgs) -> Any:
    """Load the network that a function returns, and move it to its device."""
    import torch

    path, attribute = split_function_name(network)
    assert path is not None
    net = build_from_file("multi_input", path, attribute)
    if not isinstance(net, torch.nn.Module):
        raise ValueError(
            f"multi_input: {network} returned a {type(net).__name__}; return a torch.nn.Module"
        )
    return net.to(device_name(model.device))


def explain_sample(
    network: str, file: str, methods: Sequence[str], model: BackboneArgs, **options: Any
) -> list[Any]:
    """Explain the inputs in a file, print what each of them contributes, and return the maps.

    ``options`` are those of :func:`xattn.explain_inputs`.
    """
    import torch

    from xattn.explaining.inputs import explain_inputs
    from xattn.photos.classes import read_classes

    sample, device = read_sample(Path(file)), device_name(model.device)
    named = sample.items() if isinstance(sample, dict) else enumerate(sample)
    moved: dict[Any, Any] = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in named
    }
    given: dict[str, Any] = {
        "mean": model.mean or None,
        "std": model.std or None,
        "class_names": read_classes(model.class_names),
        "task": model.task,
    }
    inputs: Any = moved if isinstance(sample, dict) else tuple(moved.values())
    net = load(network, model)
    found = explain_inputs(net, inputs, methods, **given, **options)
    for name, one in found.items():
        print(f"{name}: p falls by {one.drop:.3f} without this input")
    return [e for one in found.values() for e in one.maps.values()]
