"""The properties of an explanation that are needed to draw it."""

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
    def method_title(self) -> str: ...
    @property
    def image_id(self) -> str: ...
    @property
    def file_name(self) -> str: ...
    def normalized(self) -> NDArray[np.float32]: ...
    def on_photo(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]: ...
    def photo(self, max_side: int | None = None) -> Image.Image: ...


def format_probability(explanation: Explained) -> str:
    """:func:`probability_text` for an explanation."""
    return probability_text(float(explanation.probability), explanation.is_value)


def probability_text(probability: float, is_value: bool) -> str:
    """A probability in percent; for a target that is a number of any size (``is_value``), the number.

    >>> probability_text(0.312, False), probability_text(-3.125, True)
    ('31.2%', '-3.125')
    """
    return f"{probability:.4g}" if is_value else f"{probability:.1%}"
