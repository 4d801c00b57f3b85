"""The rows of the swap study: which attention stands in which blocks, as it is or after training."""

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
    """A mechanism, its options, and the share of the blocks, from the first, or, negative, from the last,
    that get it.

    Attributes: ``name``, registered, or the class of a control; ``positions``, how they are carried to
    another size, see :func:`xattn.backbone.resized`; ``trained``, whether the network was distilled by
    the study (True), or the folder of a conversion that was; ``layers``, in place of ``share``.
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
        """How many networks the row has: the study trains one on each half of the photos."""
        return 2 if self.trained is True else 1

    def blocks(self, depth: int) -> Sequence[int]:
        """The numbers of the blocks, of ``depth``, that get it."""
        if self.layers is not None:
            return self.layers
        count = max(1, round(abs(self.share) * depth))
        return range(depth)[-count:] if self.share < 0 else range(count)

    def blocks_text(self, depth: int) -> str:
        """Such as "8 of 12", counted from the first block; other blocks by their numbers."""
        if self == AS_TRAINED:
            return ""
        blocks = list(self.blocks(depth))
        first = blocks == list(range(len(blocks)))
        return f"{len(blocks)} of {depth}" if first else format_layers(blocks)

    def key(self, depth: int) -> str:
        """Its name as part of a path."""
        text = f"{self.label} {self.blocks_text(depth)}"
        return re.sub(r"[^\w.=+]+", "-", text).strip("-")

    def record(self, depth: int) -> dict[str, Any]:
        """What the converted network depends on, beside the trained one and its size."""
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
    """The rows that each mechanism's entry asks for, in ``studies["swap"]``: arguments of :class:`Swap`
    beside the name, by default none. Controls have no row."""
    entries = (mechanism_class(name).entry for name in list_attention())
    return [
        Swap(entry.name, **row)
        for entry in entries
        if not entry.control
        for row in entry.studies.get("swap", ({},))
    ]


def with_trained(swaps: Sequence[Swap], distilled: Sequence[Path] = ()) -> Iterator[Swap]:
    """``swaps``, and behind each that needs training the same after distillation.

    That is each of a mechanism that is not training-free, has parameters with these options, and stands
    in all blocks. Conversions in the folders ``distilled`` take the place of those that the study would
    train, or come last.
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
