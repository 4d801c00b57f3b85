"""Accuracy of a trained ViT after its attention was swapped: the one place where these figures are kept.

``conversion_accuracy.json`` is a copy of what the study of swapped attention writes, for
``xattn list attention`` and the table of docs/attention/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xattn.runtime import strict_json

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Figure:
    """Top-1 accuracy in percent of one row at one size, with its 95 % interval.

    ``dense``: with these options nothing is left out at this size, and every output is that of the network.
    """

    mechanism: str
    options: Mapping[str, Any]
    blocks: str
    positions: str
    trained: bool
    dense: bool
    size: int
    right: float
    interval: tuple[float, float]

    @property
    def text(self) -> str:
        """Such as "31.2 % (agents=49) in 3 of 12 blocks, trained"."""
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        text = f"{self.right:.1f} %" + (f" ({options})" if options else "")
        first, _, depth = self.blocks.partition(" of ")
        text += "" if first == depth else f" in {self.blocks} blocks"
        return text + (", trained" if self.trained else "")


@dataclass(frozen=True)
class AtSize:
    """The figures at one size, how many photos, and the accuracy of the network as it was trained."""

    size: int
    photos: int
    dense: float
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Accuracy:
    """Of one network, by size; the first is the one that it was trained at."""

    backbone: str
    sizes: tuple[AtSize, ...]

    @property
    def first(self) -> AtSize:
        return self.sizes[0]

    def of(self, mechanism: str) -> list[Figure]:
        """The figures of a mechanism at all sizes, in the order of the study; none if it was not
        measured."""
        return [f for at in self.sizes for f in at.figures if f.mechanism == mechanism]


def read_accuracy(file: Path = FILE) -> Accuracy:
    """The figures in ``file``, by default those of the project.

    Raises:
        ValueError: it is damaged. OSError: it is not there.
    """
    remedy = "copy the accuracy.json that the study of swapped attention wrote"
    record = strict_json.read(file, "accuracy", remedy)
    try:
        found = Accuracy(record["backbone"], tuple(_at_size(at) for at in record["sizes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"accuracy: {file} is no such file ({error!r}); {remedy}") from None
    if not found.sizes:
        raise ValueError(f"accuracy: {file} has no sizes; {remedy}")
    return found


def _at_size(record: Mapping[str, Any]) -> AtSize:
    figures = tuple(
        Figure(
            row["mechanism"], row["options"], row["blocks"], row["positions"], row["trained"],
            row["dense"], record["size"], float(row["right"]), (float(row["lo"]), float(row["hi"])),
        )
        for row in record["rows"]
    )  # fmt: skip
    return AtSize(record["size"], record["photos"], float(record["dense"]), figures)
