"""What pictures read of an explanation."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Explained(Protocol):
    """One class of one photo, explained; see :class:`~xattn.packs.explanation.Explanation`."""

    @property
    def map(self) -> NDArray[np.float32]: ...
    @property
    def is_mask(self) -> bool: ...
    @property
    def target_name(self) -> str: ...
    @property
    def probability(self) -> Any: ...
    @property
    def is_value(self) -> bool: ...
    @property
    def method(self) -> str: ...
    @property
    def image_id(self) -> str: ...
    @property
    def file_name(self) -> str: ...
    def normalized(self) -> NDArray[np.float32]: ...
    def on_photo(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]: ...
    def photo(self, max_side: int | None = None) -> Image.Image: ...


def amount(explanation: Explained) -> str:
    """The probability in percent, or the value of a target that has none."""
    shown = float(explanation.probability)
    return f"{shown:.4g}" if explanation.is_value else f"{shown:.1%}"
