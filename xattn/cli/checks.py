"""Checks that run before torch is imported: they find paths that do not exist and values of the wrong
form.

Values that can only be checked with a registry or a network (names of explainers, taps, classes) are
checked later, but still before the work starts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xattn.photos import image_names
from xattn.runtime.head_files import local_head
from xattn.runtime.names import did_you_mean
from xattn.runtime.stores import is_remote, resolve_place

STORED = ("hfds/", "wds/", "hfids/")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
LAYERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def check_images(images: Sequence[str], argument: str = "images", clips: bool = False) -> None:
    """Check that ``images`` exist and that each folder holds a photo, or a clip if ``clips``; the content
    of datasets is read later."""
    if not images:
        raise ValueError(
            f"{argument}: got none; name photos or a folder of photos, before any option that "
            "takes several values"
        )
    stored = [name for name in images if name.lower().startswith(STORED)]
    if stored and len(images) > 1:
        raise ValueError(f"{argument}: got {stored[0]} and others; give a dataset alone")
    if stored:
        return
    with rename_argument(argument):
        places = [resolve_place(name, argument) for name in images]
    missing = [str(p) for p in places if isinstance(p, Path) and not p.exists()]
    if missing and len(images) > 1:
        raise FileNotFoundError(
            f"{argument}: {len(missing)} of {len(images)} photos do not exist: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}; check the paths"
        )
    for place in places:
        with rename_argument(argument):
            image_names.check_images(place, clips)


@contextmanager
def rename_argument(argument: str) -> Iterator[None]:
    """Let error messages in this context begin with the option that was typed instead of the library's
    argument."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{argument}: {str(error).partition(': ')[2]}") from None


def check_heads(heads: Sequence[str], argument: str = "head") -> None:
    """Check that each folder exists and holds a head; hub repositories are looked up later."""
    for source in heads:
        local_head(source, argument)


def check_file(argument: str, path: Path | None, wanted: str) -> None:
    if path is not None and not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{argument}: {path} {what}; give {wanted}")


def check_labels(labels: str | Path | None) -> None:
    if labels is not None and str(labels) != "folders":
        path = resolve_place(labels, "labels")
        if path.is_dir():
            raise ValueError(
                f'labels: {path} is a folder; give a .json or .csv file, or "folders" for the photos\' own'
            )
        if not path.is_file():
            raise FileNotFoundError(
                f'labels: no file {path}; give a .json or .csv file, or "folders"'
            )


def check_annotations(path: Path | None) -> None:
    if path is None:
        return
    inside = (path / "masks").is_dir() or (path / "boxes").is_dir()
    if not inside and not (path.is_file() and path.suffix.lower() == ".json"):
        raise ValueError(
            f"annotations: {path} is neither a folder with masks/ or boxes/ nor a .json file"
        )


def check_evidence(source: str) -> None:
    """Check that a file of boxes, a folder of masks or a detector's file exists."""
    path = Path(source.removeprefix("onnx:"))
    if source != "mser" and not path.exists():
        raise FileNotFoundError(
            f"evidence: no file or folder {path}; give a JSON file of boxes, a folder "
            "of masks, mser, or onnx:PATH"
        )


def check_weights(weights: str) -> None:
    """Check that a file of weights exists; the names "auto", "package", "timm" and "random" are not
    files."""
    names = ("auto", "package", "timm", "random")
    if weights in names or Path(weights).expanduser().exists():
        return
    if is_remote(weights, "weights"):
        raise ValueError(f"weights: {weights} is in an object store; copy the file to disk first")
    hint = did_you_mean(weights, names, f"give a file of weights, or one of {', '.join(names)}")
    raise FileNotFoundError(f"weights: no file {weights!r}; {hint}")


def check_device(device: str) -> None:
    if re.fullmatch(r"[a-z]+(:\d+)?", device) and device.partition(":")[0] in DEVICES:
        return
    hint = did_you_mean(device.partition(":")[0], DEVICES[:4], "give cpu, cuda or cuda:1")
    raise ValueError(f"device: got {device!r}; {hint}")


def check_layers(layers: str | None) -> None:
    if layers is not None and LAYERS.fullmatch(layers.replace(" ", "")) is None:
        raise ValueError(
            f'layers: got {layers!r}; give numbers and ranges, such as "4-11" or "0,3,8-11"'
        )


def check_name(argument: str, name: str, names: Collection[str]) -> None:
    """Raise a ``ValueError`` with near matches unless ``name`` is one of ``names``."""
    if name not in names:
        raise ValueError(f"{argument}: unknown {name!r}; {did_you_mean(name, names)}")
