"""A probe asks for perturbed images and turns their probabilities into per-image metric values.

This is the seam for further metrics: insertion and deletion, ROAD or pixel flipping yield one
request a step and give back one value an image. The engine schedules the requests of all methods
and probes together and knows nothing else about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from xattn.eval import functional
from xattn.eval import protocol as protocols


class Column(NamedTuple):
    """One column of a results table: a metric at one retained fraction, such as ("AD", 0.15)."""

    metric: str
    level: float

    @property
    def key(self) -> str:
        """Such as ``"AD@15"``."""
        return f"{self.metric}@{100 * self.level:g}"


class Probe(Protocol):
    """What the engine needs of a group of metrics; ``keys`` are those that ``requests`` yields."""

    keys: tuple[str, ...]

    def requests(self, image: Tensor, grey: Tensor) -> Iterator[tuple[str, Tensor]]:
        """image (3, H, W), grey mask (1, H, W) in [0, 1] -> (key, perturbed image), one by one."""
        ...

    def values(self, p: Tensor, scores: Mapping[str, Tensor]) -> dict[Column, Tensor]:
        """p (n,) and the probabilities (n,) by key -> per-image values (n,) by column."""
        ...


class MaskingProbe:
    """AD, IC, ADD and AG at every level of a protocol: q on x o m, d on x o (1 - m).

    m is the grey map at level 1 (LIFT-CAM's ADD) and the thresholded one below. ``mean`` (3,) is
    the colour behind the mask when the protocol asks for ``masked_value="mean"``.
    """

    def __init__(self, protocol: protocols.Protocol, mean: Tensor | None = None) -> None:
        if protocol.masked_value == "mean" and mean is None:
            raise ValueError("mean: None; masked_value='mean' needs the mean colour (3,)")
        self.protocol = protocol
        self.keys = tuple(f"{kind}@{100 * v:g}" for v in protocol.levels for kind in "qd")
        self.fill = (
            None if protocol.masked_value == "black" or mean is None else mean.view(-1, 1, 1)
        )

    def requests(self, image: Tensor, grey: Tensor) -> Iterator[tuple[str, Tensor]]:
        for level in self.protocol.levels:
            mask = functional.threshold_mask(grey[None], level, self.protocol.threshold)[0]
            yield f"q@{100 * level:g}", self._mask(image, mask)
            yield f"d@{100 * level:g}", self._mask(image, 1 - mask)

    def values(self, p: Tensor, scores: Mapping[str, Tensor]) -> dict[Column, Tensor]:
        columns = {}
        for level in self.protocol.levels:
            q, d = scores[f"q@{100 * level:g}"], scores[f"d@{100 * level:g}"]
            for metric, function in functional.VALUES.items():
                options = {"margin": self.protocol.ic_margin} if metric == "IC" else {}
                value = function(p, d if metric == "ADD" else q, **options)
                columns[Column(metric, level)] = value
        return columns

    def _mask(self, image: Tensor, mask: Tensor) -> Tensor:
        masked = image * mask
        return masked if self.fill is None else masked + self.fill.to(image) * (1 - mask)
