"""Measures the rows of the swap study, and keeps finished results by size, row and block of photos.

A file holds the values of a part for one block, and the settings that they depend on. It is loaded
instead of computed again, and refused if its settings differ. So a killed run resumes, and adding a
row does not repeat the others.

The study compares each network with the network as it was trained, photo by photo:

right, same       whether the class is the true one, and the trained network's
patch cosine      mean over patches of cos(z_i, z'_i), last tokens of the two networks
class cosine      the same for the vector that the classifier reads
map agreement     rank correlation of both networks' maps of the class that the trained one predicts
AD, IC, ADD, insertion, deletion, ROAD    of the network's map of its predicted class, in its eyes

Latency and memory are also relative to the network as it was trained. In each round, every network
of a group runs once on the same photos, in turn; ratios are taken within a round, so that a slow
moment of the machine affects both sides.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone, converted, load_conversion, resized
from xattn.backbone.conversion import WEIGHTS_FILE
from xattn.config import DistillConfig
from xattn.correlation import spearman
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.base import Column, PerturbationMetric
from xattn.eval.metrics.registry import create_metric
from xattn.eval.protocol import Protocol
from xattn.eval.studies.run_files import finished_values, joined, kept_record
from xattn.eval.studies.study_photos import Photo, images_of
from xattn.eval.studies.swap.rows import AS_TRAINED, Swap
from xattn.explainers import Explainer, create_explainer
from xattn.runtime.files import file_sha256, write_json
from xattn.runtime.measuring import Job, peak_memory, times
from xattn.training.distilling import CONVERSION_FOLDER, distill
from xattn.training.run_folder import RUN_FILE
from xattn.training.students.closeness import last_tokens

# settings of training that do not change results, or that were added later and are not used here
UNTOLD = ("workers", "checkpoint_every", "student_epochs", "student_lr")


class Unavailable(ValueError):
    """Raised for a row that cannot be measured at a size; the message says why."""


class Networks:
    """The study's networks by row, size and fold, made on demand.

    Args:
        backbone: the trained ViT; ``size``: image side in pixels at which networks are distilled.
        photos: all photos; the network of fold k is trained on those whose number is not k modulo
        2.
        folder: where trained conversions are kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int,
        photos: Sequence[Photo],
        config: DistillConfig,
        folder: Path,
        progress: bool = True,
    ) -> None:
        blocks: Any = getattr(backbone.model, "blocks", None)
        if blocks is None:
            raise ValueError(f"backbone: {backbone.name} has no blocks; choose a ViT")
        if len(photos) < 2:
            raise ValueError(
                f"photos: got {len(photos)}; give at least 2, half of them to train on"
            )
        self.backbone, self.size, self.photos = backbone, size, photos
        self.config, self.folder, self.progress = config, folder, progress
        self.depth = len(blocks)
        self._made: dict[Any, Backbone] = {}
        self._splits: dict[tuple[str, int], Split] = {}

    def split(self, swap: Swap, fold: int) -> Split:
        """The record of which photos a row's network was trained and scored on."""
        key = swap.key(self.depth), fold
        return self._splits.setdefault(key, Split(f"swap, {swap.label}"))

    def dense(self, size: int, positions: str = "resize") -> Backbone:
        """The network with its own attention for images of ``size``."""
        key = size, positions
        if key not in self._made:
            self._made[key] = resized(self.backbone, size, positions)
        return self._made[key]

    def of(self, swap: Swap, size: int, fold: int = 0) -> Backbone:
        """The network of a row at ``size``."""
        key = swap.key(self.depth), size, fold
        if key not in self._made:
            folder = self.trained(swap, fold) if swap.trained else None
            try:
                network = self.dense(size, swap.positions)
                if folder is not None:
                    network = load_conversion(folder, self.dense(self.size), network)
                elif swap != AS_TRAINED:
                    blocks = swap.blocks(self.depth)
                    network = converted(network, swap.name, blocks, dict(swap.options))
            except ValueError as error:
                raise Unavailable(str(error)) from error
            self._made[key] = network
        return self._made[key]

    def forget(self) -> None:
        """Drop the networks, such as before another size is measured."""
        self._made.clear()

    def record(self, swap: Swap, size: int) -> dict[str, Any]:
        """The record of what a row's networks depend on; it does not need to make them."""
        found = {"backbone": self.backbone.fingerprint, "size": size, **swap.record(self.depth)}
        if swap.trained is True:
            found["trained"] = [self._training(fold) for fold in range(swap.folds)]
        elif swap.trained:
            found["trained"] = file_sha256(Path(swap.trained) / WEIGHTS_FILE)
        return found

    def trained(self, swap: Swap, fold: int) -> Path:
        """The folder of a trained row's conversion, which is trained now if it is missing."""
        if swap.trained is not True:
            return Path(swap.trained)
        folder = self.folder / swap.key(self.depth) / f"fold-{fold}"
        dense, blocks = self.dense(self.size), swap.blocks(self.depth)
        record = {"backbone": dense.fingerprint, **swap.record(self.depth)}
        kept_record(folder / "record.json", {**record, **self._training(fold)})
        run = folder / "run"
        photos = [p.path for p in self.split(swap, fold).fit(self._training_photos(fold))]
        if not (run / CONVERSION_FOLDER / WEIGHTS_FILE).is_file():
            distill(
                dense, swap.mechanism, blocks, dict(swap.options),
                data=photos, validation=photos[: self.config.measured], config=self.config,
                output=run, resume=(run / RUN_FILE).is_file(), progress=self.progress,
            )  # fmt: skip
        return run / CONVERSION_FOLDER

    def _training(self, fold: int) -> dict[str, Any]:
        """The record of what a conversion trained by the study depends on."""
        config = {k: v for k, v in asdict(self.config).items() if k not in UNTOLD}
        photos = {p.name: p.sha256 for p in self._training_photos(fold)}
        return {"size": self.size, "config": config, "photos": photos}

    def _training_photos(self, fold: int) -> list[Photo]:
        return [photo for i, photo in enumerate(self.photos) if i % 2 != fold]


GROUP = 5  # networks that are timed together with the dense one


def latencies(
    dense: Backbone, networks: Mapping[str, Backbone], images: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """By name: the seconds of a pass in each round, and the peak bytes for one photo, both for the
    network and for ``dense``."""

    def job(network: Backbone, photos: Tensor) -> Job:
        @torch.no_grad()
        def run() -> Tensor:
            return network.logits(photos)

        return run

    jobs = {"": job(dense, images), **{name: job(n, images) for name, n in networks.items()}}
    took = times(jobs, rounds)
    peak = {"": peak_memory(job(dense, images[:1]))}
    return {
        name: {
            "seconds": took[name],
            "dense seconds": took[""],
            "peak bytes": peak_memory(job(network, images[:1])),
            "dense peak bytes": peak[""],
        }
        for name, network in networks.items()
    }


def ratio(cost: Mapping[str, Any]) -> float:
    """The network's time relative to the dense one's, as the median over rounds."""
    pairs = zip(cost["seconds"], cost["dense seconds"], strict=True)
    return statistics.median(own / dense for own, dense in pairs)


PIXELS = 8 * 224 * 224  # of all photos in one pass
LEVEL = 0.5  # share of the pixels that a mask keeps; at 1, a map without contrast would look best

Values = dict[str, list[float]]
"""The values of some photos, by measure."""


def batch_size(size: int) -> int:
    """The number of photos of ``size`` x ``size`` pixels per pass."""
    return max(1, round(PIXELS / size**2))


@dataclass(frozen=True)
class Explaining:
    """The explainer to compare and score, as NAME:option=value, and the metrics' steps."""

    explainer: str
    steps: int

    def of(self, network: Backbone) -> Explainer:
        name, options = parse_mechanism(self.explainer)
        size = batch_size(network.preprocessing.input_size[0])
        return create_explainer(name, network, None, 0, size, **options)

    def probes(self, protocol: Protocol, mean: Sequence[float]) -> list[PerturbationMetric]:
        colour = tuple(float(v) for v in mean)
        return [
            create_metric("masking", protocol, colour, metrics=("AD", "IC", "ADD")),
            create_metric("insertion-deletion", protocol, colour, steps=self.steps),
            create_metric("road", protocol, colour),
        ]


@dataclass
class Block:
    """Some photos, and the outputs of the network as it was trained, computed on demand."""

    images: Tensor  # (n, 3, H, W) in [0, 1]
    labels: Tensor  # LongTensor (n,)
    dense: Backbone
    explaining: Explaining

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Last tokens (n, N, C) and logits (n, K)."""
        return outputs(self.dense, self.images)

    @cached_property
    def maps(self) -> Tensor:
        """The maps of the predicted class, (n, 1, h, w)."""
        return self.explaining.of(self.dense).attribute(self.images, self.seen[1].argmax(1))


@torch.no_grad()
def outputs(network: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Last tokens (n, N, C) and logits (n, K) of all images, computed in batches."""
    parts = [last_tokens(network, part) for part in images.split(batch_size(images.shape[-1]))]
    tokens, logits = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logits)


@torch.no_grad()
def quality(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """``right``, ``same``, ``patch cosine`` and ``class cosine`` of the photos ``at``."""
    tokens, logits = outputs(network, block.images[at])
    theirs, known = (x[at] for x in block.seen)
    patches = slice(network.prefix_tokens, None)
    near = F.cosine_similarity(tokens[:, patches].double(), theirs[:, patches].double(), dim=-1)
    read, known_read = (
        net.model.forward_head(x, pre_logits=True).double()  # type: ignore[operator]
        for net, x in ((network, tokens), (block.dense, theirs))
    )
    classes = logits.argmax(1)
    return {
        "right": (classes.cpu() == block.labels[at]).double().tolist(),
        "same": (classes == known.argmax(1)).double().tolist(),
        "patch cosine": near.mean(1).tolist(),
        "class cosine": F.cosine_similarity(read, known_read, dim=-1).tolist(),
    }


def agreement(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """``map agreement`` of the photos ``at``; NaN for a constant map."""
    explainer = block.explaining.of(network)
    own = explainer.attribute(block.images[at], block.seen[1][at].argmax(1))
    return {"map agreement": spearman(own, block.maps[at]).tolist()}


def fidelity(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """The metrics of the photos ``at``; NaN for a map that is constant or not finite."""
    explainer = block.explaining.of(network)
    protocol = Protocol(levels=(LEVEL,))
    found = evaluate(
        network, {"map": explainer}, block.images[at],
        metrics=block.explaining.probes(protocol, network.preprocessing.mean), protocol=protocol,
        max_forward_batch=batch_size(block.images.shape[-1]), progress=False,
    )  # fmt: skip
    values = found.methods["map"].values
    return {name: values[column].tolist() for name, column in FIDELITY.items()}


FIDELITY = {
    "AD": Column("AD", LEVEL),
    "IC": Column("IC", LEVEL),
    "ADD": Column("ADD", LEVEL),
    "insertion": Column("insertion"),
    "deletion": Column("deletion"),
    "ROAD": Column("ROAD"),
}
Measure = Callable[[Block, Sequence[int], Backbone], Values]
PARTS: Mapping[str, Measure] = {"quality": quality, "maps": agreement, "fidelity": fidelity}


def plain(values: Values) -> dict[str, list[Any]]:
    """The values as lists for JSON, which has no NaN."""
    return {key: [None if math.isnan(v) else v for v in column] for key, column in values.items()}


class SizePlan(NamedTuple):
    """The plan for one size: the number of photos for each part, and rounds of timing."""

    counts: dict[str, int]
    rounds: int


@dataclass(frozen=True)
class SwapStudyConfig:
    """Numbers of photos and rounds at each size; networks are distilled at the first size."""

    sizes: tuple[int, ...] = (224, 448)  # Image sides in pixels; positions are resized.
    photos: tuple[int, ...] = (500, 100)  # Photos at each size: accuracy and cosines.
    maps: tuple[int, ...] = (100, 16)
    """Photos whose maps are compared with the trained network's."""
    fidelity: tuple[int, ...] = (24, 0)
    """Photos whose maps are scored: AD, IC, ADD, insertion, deletion, ROAD."""
    rounds: tuple[int, ...] = (9, 5)  # Rounds of timing, of which the median is reported.
    explainer: str = "generic_relevance"
    """Explainer whose maps are compared and scored, as NAME:option=value,..."""
    steps: int = 20  # Steps of insertion and deletion.
    epochs: int = 2
    """Passes over half of the photos to train each layer of a mechanism that needs training."""
    finetune_epochs: int = 2
    """Further passes that also train low-rank updates of the network around it; 0 for none."""
    block: int = 25  # Photos to measure before results are written.
    seed: int = 0  # For the order of the photos and for training.
    workers: int = 2  # Data-loader processes in training.

    def plan(self, size: int) -> SizePlan:
        """The plan for one of the sizes."""
        at = self.sizes.index(size)
        counts = {"quality": self.photos[at], "maps": self.maps[at], "fidelity": self.fidelity[at]}
        return SizePlan(counts, self.rounds[at])


Found = dict[str, NDArray[np.float64]]
"""The values (n,) of one row, by measure."""


@dataclass
class Table:
    """Finished results at one size, by the key of the row."""

    values: dict[str, Found] = field(default_factory=dict)
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # Why a row cannot be measured.


class Measuring:
    """Measures rows at one size after another.

    Args:
        wanted: keys of the rows to measure; for other rows, finished results are loaded.
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
        """The table for ``size``; without ``measure``, only finished results."""
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
        self, part: str, size: int, photos: Sequence[Photo], table: Table, measure: bool, bar: Any
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
        return {key: joined(values) for key, values in parts.items() if values}

    def _measured(
        self, part: str, swap: Swap, size: int, block: Block, first: int, photos: Sequence[Photo]
    ) -> dict[str, list[Any]]:
        """Values of a block whose first photo has the number ``first``; each photo is measured on
        the network that was not trained on it."""
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
