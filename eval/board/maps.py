"""Makes a row of a board from existing maps; the map of a photo is found by the photo's pixels."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from xattn.eval.board.folder import LARGEST, Board, network_name
from xattn.eval.board.make import digest

SECOND = "@class"
BROKEN = (
    *(ValueError, LookupError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, RuntimeError),  # unknown compression, or a password
)


class MapsExplainer:
    """An explainer for :func:`xattn.eval.evaluate` that returns the existing map of a photo and class."""

    forwards = 0

    def __init__(self, maps: dict[tuple[str, int], Tensor], sha256: str) -> None:
        self._maps, self.file = maps, sha256

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        found = []
        for image, k in zip(inputs, target.tolist(), strict=True):
            key = digest(image.detach().cpu()), int(k)
            if key not in self._maps:
                raise ValueError("maps_of: there is no map of this photo and class")
            found.append(self._maps[key])
        size = max(m.shape[0] for m in found), max(m.shape[1] for m in found)
        sized = [
            F.interpolate(m[None, None], size, mode="nearest") if m.shape != size else m[None, None]
            for m in found
        ]
        return torch.cat(sized).to(inputs.device)


def maps_explainer(board: Board, backbone: Any, path: Path) -> MapsExplainer:
    """Make an explainer from a .npz file with one array (h, w) for each photo, named by the photo's id.

    Maps of the second class are named ``ID@class``; without them, the contrast of classes is not measured.

    Raises:
        ValueError: the file is not a .npz file, or a map is missing, has another shape or is not finite.
        OSError: the file cannot be read.
    """
    from xattn.runtime.files import file_sha256

    name = network_name(backbone.name)
    facts = next((n for n in board.networks if n["name"] == name), None)
    if facts is None:
        raise ValueError(
            f"backbone: {name} is not a network of {board.folder}; give one of its networks"
        )
    arrays = _arrays(path)
    classes = board.table(name)["classes"].tolist()
    found = {}
    for i, photo in enumerate(board.photos):
        for key, slot in ((photo["id"], 0), (photo["id"] + SECOND, 1)):
            if key not in arrays:
                if slot == 0:
                    raise ValueError(f"maps_of: {path} has no map of {key}; give one per photo")
                continue
            values = arrays[key]
            if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
                raise ValueError(
                    f"maps_of: {key} is {values.dtype} {values.shape}; give numbers of shape (h, w)"
                )
            if not (np.abs(values.astype(np.float64)) <= np.finfo(np.float32).max).all():
                raise ValueError(
                    f"maps_of: {key} contains NaN, infinite values or values over 3.4e38; give finite "
                    f"float32 values"
                )
            found[facts["views"][i], classes[i][slot]] = torch.from_numpy(values.astype(np.float32))
    return MapsExplainer(found, file_sha256(path))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file.

    Raises:
        ValueError: the file is damaged, or unpacked arrays would be too large according to their headers.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            total = 0
            for item in packed.infolist():
                with packed.open(item) as file:
                    version = np.lib.format.read_magic(file)
                    header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
                total += max(item.file_size, math.prod(header[0]) * header[2].itemsize)
        if total > LARGEST:
            raise ValueError("more than 2 GB")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in arrays.files}
    except BROKEN as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"maps_of: {path} is not a .npz of arrays of numbers ({why:.100})"
        ) from None
