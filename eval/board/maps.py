"""Maps that were made elsewhere, as the method of a row: a photo's map is found by its pixels."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xattn.eval.board.folder import LARGEST, Board, network_name
from xattn.eval.board.make import digest

SECOND = "@class"


class MapsExplainer:
    """What :func:`xattn.eval.evaluate` takes: the map of a photo that is known, for a class that is."""

    forwards = 0

    def __init__(self, maps: dict[tuple[str, int], Tensor], sha256: str) -> None:
        self._maps, self.file = maps, sha256

    def attribute(self, inputs: Tensor, target: Tensor) -> Tensor:
        found = []
        for image, k in zip(inputs, target.tolist(), strict=True):
            key = digest(image.detach().cpu()), int(k)
            if key not in self._maps:
                raise ValueError("maps_of: no map of this photo and class")
            found.append(self._maps[key])
        size = max(m.shape[0] for m in found), max(m.shape[1] for m in found)
        sized = [
            F.interpolate(m[None, None], size, mode="nearest") if m.shape != size else m[None, None]
            for m in found
        ]
        return torch.cat(sized).to(inputs.device)


def maps_explainer(board: Board, backbone: Any, path: Path) -> MapsExplainer:
    """The maps of ``path``, a .npz of arrays (h, w) by the photos' ids; ``ID@class`` are maps of the second
    class, without which there are no contrasts of classes.

    Raises:
        ValueError: no .npz, or a map that is missing, of another shape, or not finite.
        OSError: it cannot be read.
    """
    from xattn.runtime.files import file_sha256

    name = network_name(backbone.name)
    facts = next((n for n in board.networks if n["name"] == name), None)
    if facts is None:
        raise ValueError(f"backbone: {name} is no network of {board.folder}; give one that is")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"maps_of: {path} has more than 2 GB; give smaller maps")
    try:
        arrays = np.load(path, allow_pickle=False)
        names = set(arrays.files)
    except (ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"maps_of: {path} is no .npz of arrays ({error})") from None
    classes = board.table(name)["classes"].tolist()
    found = {}
    for i, photo in enumerate(board.photos):
        for key, slot in ((photo["id"], 0), (photo["id"] + SECOND, 1)):
            if key not in names:
                if slot == 0:
                    raise ValueError(f"maps_of: {path} has no map of {key}; give one a photo")
                continue
            values = np.asarray(arrays[key])
            if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
                raise ValueError(
                    f"maps_of: {key} is {values.dtype} {values.shape}; give (h, w) numbers"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"maps_of: {key} has NaN or infinite values; give finite ones")
            found[facts["views"][i], classes[i][slot]] = torch.from_numpy(values.astype(np.float32))
    return MapsExplainer(found, file_sha256(path))
