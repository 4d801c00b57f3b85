"""Measure the rows of the swap study and keep what is finished, by size, row and block of photos.

A file holds the values of a part (see :mod:`~xattn.eval.studies.swap.measures`) for one block, and what
they depend on. It is read, not computed again; one of other settings is refused. So a killed run goes on,
and a new row needs none of the others again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from xattn.eval.studies.kept import finished_values
from xattn.eval.studies.study_photos import Photo, images_of
from xattn.eval.studies.swap.costs import GROUP, latencies
from xattn.eval.studies.swap.measures import PARTS, Block, Explaining, Values, batch_size, plain
from xattn.eval.studies.swap.networks import Networks, Unavailable
from xattn.eval.studies.swap.rows import Swap
from xattn.runtime.files import write_json


class SizePlan(NamedTuple):
    """What the swap study measures at one size: photos by part, and rounds of timing."""

    counts: dict[str, int]
    rounds: int


@dataclass(frozen=True)
class SwapStudyConfig:
    """How many photos and rounds at each size; networks are distilled at the first."""

    sizes: tuple[int, ...] = (224, 448, 896)
    """Pixels a side; a ViT's positions are resized."""
    photos: tuple[int, ...] = (500, 100, 16)
    """Photos at each size: accuracy and cosines."""
    maps: tuple[int, ...] = (100, 16, 2)
    """Photos whose maps are compared with the trained network's."""
    fidelity: tuple[int, ...] = (24, 0, 0)
    """Photos whose maps are scored: AD, IC, ADD, insertion, deletion, ROAD."""
    rounds: tuple[int, ...] = (9, 5, 3)
    """Rounds of timing, whose median counts."""
    explainer: str = "generic_relevance"
    """Whose maps are compared and scored, as NAME:option=value,..."""
    steps: int = 20
    """Of insertion and deletion."""
    epochs: int = 2
    """Passes over half of the photos in which each layer of a mechanism that needs training learns."""
    finetune_epochs: int = 2
    """Passes afterwards that train low-rank updates around it, too; 0 leaves them out."""
    block: int = 25
    """Photos that are measured before anything is written."""
    seed: int = 0
    """Of the order of the photos, and of training."""
    workers: int = 2
    """Loader processes of training."""

    def plan(self, size: int) -> SizePlan:
        """What is measured at one of the sizes."""
        at = self.sizes.index(size)
        counts = {"quality": self.photos[at], "maps": self.maps[at], "fidelity": self.fidelity[at]}
        return SizePlan(counts, self.rounds[at])


Found = dict[str, NDArray[np.float64]]
"""Of one row: values (n,) by measure."""


@dataclass
class Table:
    """What is finished at one size, by the key of a row."""

    values: dict[str, Found] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Why a row cannot be measured."""


class Measuring:
    """Measures rows at one size after the other.

    Args:
        wanted: keys of the rows to measure; of the others what is finished is read.
    """

    def __init__(
        self,
        networks: Networks,
        swaps: Sequence[Swap],
        wanted: Collection[str],
        config: SwapStudyConfig,
        output: Path,
        progress: bool = True,
    ) -> None:
        self.networks, self.wanted, self.config = networks, wanted, config
        self.rows = {swap.key(networks.depth): swap for swap in swaps}
        self.output, self.progress = output, progress
        self.explaining = Explaining(config.explainer, config.steps)

    def at(self, size: int, measure: bool = True) -> Table:
        """The table of ``size``; without ``measure`` only what is finished.

        Raises:
            ValueError: results of other settings or photos.
        """
        plan, table = self.config.plan(size), Table()
        for part, count in plan.counts.items():
            photos = self.networks.photos[:count]
            blocks = -(-len(photos) // self.config.block)
            with tqdm(
                total=blocks * len(self.rows), desc=f"{size} px, {part}", unit="row",
                disable=not (self.progress and measure),
            ) as bar:  # fmt: skip
                found = self._part(part, size, photos, table, measure, bar)
            for key, values in found.items():
                table.values.setdefault(key, {}).update(values)
        if plan.rounds:
            self._costs(size, plan.rounds, table, measure)
        self.networks.forget()
        return table

    def _part(
        self,
        part: str,
        size: int,
        photos: Sequence[Photo],
        table: Table,
        measure: bool,
        bar: Any,
    ) -> dict[str, Found]:
        parts: dict[str, list[Mapping[str, Any]]] = {key: [] for key in self.rows}
        for number, first in enumerate(range(0, len(photos), self.config.block)):
            some, block = photos[first : first + self.config.block], None
            for key, swap in self.rows.items():
                bar.update()
                file = self.output / f"{size}px" / key / f"{part}-{number:03}.json"
                record = self._record(part, swap, size, some, first)
                values = finished_values(file, record)
                skip = not measure or key not in self.wanted or key in table.notes
                if values is None and skip:
                    parts.pop(key, None)
                    continue
                if values is None:
                    block = block or self._block(some, size)
                    try:
                        values = self._measured(part, swap, size, block, first, some)
                    except Unavailable as error:
                        table.notes[key] = str(error)
                        parts.pop(key, None)
                        continue
                    splits = [self.networks.split(swap, k).record() for k in range(swap.folds)]
                    write_json(file, {"record": record, "values": values, "splits": splits})
                if key in parts:
                    parts[key].append(values)
        return {key: _joined(values) for key, values in parts.items() if values}

    def _measured(
        self,
        part: str,
        swap: Swap,
        size: int,
        block: Block,
        first: int,
        photos: Sequence[Photo],
    ) -> dict[str, list[Any]]:
        """Values of a block whose first photo has the number ``first``; each photo by the network that
        was not trained on it."""
        count = len(block.images)
        merged: Values = {}
        for fold in range(swap.folds):
            at = [i for i in range(count) if swap.folds == 1 or (first + i) % 2 == fold]
            if not at:
                continue
            network = self.networks.of(swap, size, fold)
            self.networks.split(swap, fold).score([photos[i] for i in at])
            try:
                values = PARTS[part](block, at, network)
            except ValueError as error:
                raise Unavailable(str(error)) from error
            for name, column in values.items():
                whole = merged.setdefault(name, [float("nan")] * count)
                for i, value in zip(at, column, strict=True):
                    whole[i] = value
        return plain(merged)

    def _block(self, photos: Sequence[Photo], size: int) -> Block:
        dense = self.networks.dense(size)
        return Block(
            images_of(dense, photos), torch.tensor([p.label for p in photos], device="cpu"),
            dense, self.explaining,
        )  # fmt: skip

    def _record(
        self, part: str, swap: Swap, size: int, photos: Sequence[Photo], first: int
    ) -> dict[str, Any]:
        explaining: dict[str, Any] = {}
        if part in ("maps", "fidelity"):
            explaining["explainer"] = self.explaining.explainer
        if part == "fidelity":
            explaining["steps"] = self.explaining.steps
        record = {
            "network": self.networks.record(swap, size),
            "preprocessing": repr(self.networks.backbone.preprocessing),
            "first": first,
            "photos": {p.name: [p.sha256, p.label] for p in photos},
            **explaining,
        }
        return json.loads(json.dumps(record))  # type: ignore[no-any-return]

    def _costs(self, size: int, rounds: int, table: Table, measure: bool) -> None:
        photos = self.networks.photos[: batch_size(size)]
        files = {key: self.output / f"{size}px" / key / "cost.json" for key in self.rows}
        records: dict[str, Any] = {}
        left = []
        for key, swap in self.rows.items():
            records[key] = {
                **self._record("cost", swap, size, photos, 0),
                "rounds": rounds,
                "device": str(self.networks.backbone.device),
            }
            values = finished_values(files[key], records[key])
            if values is not None:
                table.costs[key] = dict(values)
            elif measure and key in self.wanted and key not in table.notes:
                left.append(key)
        for start in range(0, len(left), GROUP):
            made = {}
            for key in left[start : start + GROUP]:
                try:
                    made[key] = self.networks.of(self.rows[key], size)
                except Unavailable as error:
                    table.notes[key] = str(error)
            images = images_of(self.networks.dense(size), photos)
            for key, cost in latencies(self.networks.dense(size), made, images, rounds).items():
                cost["threads"] = torch.get_num_threads()
                write_json(files[key], {"record": records[key], "values": cost})
                table.costs[key] = cost


def _joined(parts: Sequence[Mapping[str, Sequence[float | None]]]) -> Found:
    return {
        name: np.concatenate([np.array(part[name], dtype=np.float64) for part in parts])
        for name in parts[0]
    }
