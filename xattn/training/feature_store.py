"""Writing a feature cache: the files of a backbone's taps, on the grid of the last one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.photos.base import Photos
from xattn.training.feature_files import FEATURES, PREFIX
from xattn.training.row_files import RowFile
from xattn.training.row_store import RowStore


class FeatureStore(RowStore):
    """The files of a feature cache while it is filled."""

    def __init__(
        self, folder: Path, backbone: Backbone, photos: Photos, key: dict[str, Any]
    ) -> None:
        self.dtype: np.dtype[Any] = np.dtype(key["dtype"])
        self.grid = backbone.tap_sizes[-1]
        patches, prefix = self.grid[0] * self.grid[1], backbone.prefix_tokens
        files = {
            f"tap-{i}": RowFile((patches, c), self.dtype) for i, c in enumerate(backbone.channels)
        }
        width = backbone.channels[-1] if prefix else 0
        files[PREFIX] = RowFile((prefix, width), self.dtype)
        super().__init__(folder, key, FEATURES, files, len(photos), key["views"])

    def put(self, first: int, states: NDArray[np.uint8], maps: Sequence[Tensor]) -> None:
        """Store the tokens of every tap and the prefix, (B, N, C), in rows from ``first`` on."""
        dtype = getattr(torch, self.dtype.name)
        numbers = [values.to(dtype).cpu().contiguous().numpy() for values in maps]
        self.put_rows(first, states, numbers)

    def finish(self, photos: Photos) -> None:
        """Write the index, which makes the folder a whole cache."""
        about = {"shapes": self.shapes, "grid": list(self.grid)}
        self.finish_rows(photos, about, "could not be read when the features were cached")
