"""The rows of the swap study: which attention is used in which blocks, trained or not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from xattn.attention.base import (
    Mechanism,
    create_mechanism,
    list_attention,
    mechanism_class,
)
from xattn.attention.model.spec import format_layers
from xattn.backbone.conversion import read_conversion

Kind = Literal["dense", "training-free", "untrained", "trained", "control"]


@dataclass(frozen=True)
class Swap:
    """A mechanism, its options, and the share of blocks that get it; a negative share counts from
    the last.

    Attributes: ``name``, registered, or the class of a control; ``positions``, how they are adapted
    to another size, see :func:`xattn.backbone.resized`; ``trained``, True if the study distills the
    network, or the folder of a finished conversion; ``layers``, block numbers instead of ``share``.
    """

    name: str | type[Mechanism]
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1.0
    positions: Literal["resize", "tile"] = "resize"
    trained: bool | Path = False
    layers: tuple[int, ...] | None = None

    @property
    def mechanism(self) -> str:
        """The name of the mechanism, or of the control."""
        return self.name if isinstance(self.name, str) else self.name.entry.name

    @property
    def label(self) -> str:
        pairs = (f"{key}={value}" for key, value in self.options.items())
        text = " ".join([self.mechanism, *pairs])
        text += ", positions tiled" if self.positions == "tile" else ""
        return f"{text}, trained" if self.trained else text

    @property
    def kind(self) -> Kind:
        if self == AS_TRAINED:
            return "dense"
        if not isinstance(self.name, str):
            return "control"
        if self.trained:
            return "trained"
        return "training-free" if mechanism_class(self.name).entry.training_free else "untrained"

    @property
    def folds(self) -> int:
        """The number of networks of the row: the study trains one on each half of the photos."""
        return 2 if self.trained is True else 1

    def blocks(self, depth: int) -> Sequence[int]:
        """The numbers of the blocks that get it, among ``depth``."""
        if self.layers is not None:
            return self.layers
        count = max(1, round(abs(self.share) * depth))
        return range(depth)[-count:] if self.share < 0 else range(count)

    def blocks_text(self, depth: int) -> str:
        """The blocks as text: such as "8 of 12" if they are the first ones, else their numbers."""
        if self == AS_TRAINED:
            return ""
        blocks = list(self.blocks(depth))
        first = blocks == list(range(len(blocks)))
        return f"{len(blocks)} of {depth}" if first else format_layers(blocks)

    def key(self, depth: int) -> str:
        """The row's name as part of a path."""
        text = f"{self.label} {self.blocks_text(depth)}"
        return re.sub(r"[^\w.=+]+", "-", text).strip("-")

    def record(self, depth: int) -> dict[str, Any]:
        """What the converted network depends on, besides the trained one and its size."""
        if self == AS_TRAINED:
            return {"mechanism": self.mechanism}
        return {
            "mechanism": self.mechanism,
            "options": dict(self.options),
            "layers": format_layers(self.blocks(depth)),
            "positions": self.positions,
        }


AS_TRAINED = Swap("as trained")
"""The network with its own attention, which all others are compared with."""


def all_swaps() -> list[Swap]:
    """The rows that each mechanism's entry asks for, in ``studies["swap"]``.

    An item there has the arguments of :class:`Swap` other than the name. By default, a mechanism
    has one row without arguments; controls have no row.
    """
    entries = (mechanism_class(name).entry for name in list_attention())
    return [
        Swap(entry.name, **row)
        for entry in entries
        if not entry.control
        for row in entry.studies.get("swap", ({},))
    ]


def with_trained(swaps: Sequence[Swap], distilled: Sequence[Path] = ()) -> Iterator[Swap]:
    """``swaps``, each that needs training followed by the same swap after distillation.

    A swap needs training if its mechanism is not training-free, has parameters with these options,
    and is in all blocks. Conversions in the folders ``distilled`` replace those that the study
    would train, or come last.
    """
    given = []
    for folder in distilled:
        made, _ = read_conversion(folder)
        given.append(Swap(made.name, made.options, trained=folder, layers=made.layers))
    for swap in swaps:
        yield swap
        found = [g for g in given if (g.name, g.options) == (swap.name, dict(swap.options))]
        if swap.share == 1 and found:
            given.remove(found[0])
            yield found[0]
        elif swap.share == 1 and swap.kind == "untrained" and _learns(swap):
            yield replace(swap, trained=True)
    yield from given


def _learns(swap: Swap) -> bool:
    made = create_mechanism(swap.mechanism, 48, 3, **swap.options)
    return any(True for _ in made.parameters())
