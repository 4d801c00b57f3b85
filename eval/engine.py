"""Score the explanations of many methods on many images with one bounded stream of forward passes.

    images -> clean pass (p, class) -> maps of each method -> grey masks -> probes -> scorer

Images stream through in chunks of ``max_forward_batch``; clean passes, explanations and masked
passes all run at that one batch shape, so results do not depend on how many images there are.
Under ``torchrun`` each process takes every n-th chunk, and all return the results of all images.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xattn.distributed import gather, processes
from xattn.eval import functional
from xattn.eval.probes import Column, MaskingProbe, Probe
from xattn.eval.protocol import SCORES, Protocol
from xattn.eval.results import ImageRecord, MethodResult, Results
from xattn.eval.scorer import MaskedScorer, Ticket, pad_batch
from xattn.eval.stream import ImageStream, Item, Skipped
from xattn.images import MAX_PIXELS


def evaluate(
    backbone: Any,
    explainers: Mapping[str, Any],
    images: Any,
    *,
    levels: Sequence[float] | None = None,
    max_forward_batch: int = 32,
    view: str | None = None,
    seed: int | None = None,
    protocol: Protocol | None = None,
    progress: bool = True,
    classes: int | str | Sequence[int | str] | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> Results:
    """AD, IC, ADD and AG of every explainer on the same images.

    Args:
        backbone: a :class:`xattn.Backbone`; it alone scores, whatever an explainer looks at.
        explainers: by the name of their row in the table.
        images: a photo, folder or list file; a list of paths or PIL images; or float tensors
            (3, H, W) or (B, 3, H, W) in [0, 1] at the model's input size, also from a generator.
        protocol: its ``score`` and ``class_policy`` follow the backbone's task and ``classes``.
        levels, view, seed: replace the protocol's own: (1.0, 0.5, 0.15), ``"crop"``, 0.
        max_forward_batch: images a forward pass; also how many are explained at a time. A multiple
            of 4 keeps results bit-equal whatever else is scored in the same run.
        classes: explain these instead of the predicted class: one for all images, or one an image
            (unreadable ones included), as index or name.
        max_pixels: larger photos are skipped as decompression bombs.

    Raises:
        ValueError: no image could be read, an explainer returns a wrong shape, a class is unknown.
        OSError: the path ``images`` does not exist.
    """
    if not explainers:
        raise ValueError("explainers: got none; give {name: explainer}")
    given = {"levels": levels, "view": view, "seed": seed}
    protocol = replace(
        protocol or Protocol(),
        score=SCORES[backbone.task],
        class_policy="predicted" if classes is None else "given",
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    stream = ImageStream(images, backbone.preprocessing, protocol.view, max_pixels)
    if stream.tensors:
        protocol = replace(protocol, view="tensor")
    elif protocol.view == "tensor":
        raise ValueError("view: 'tensor' is for images given as tensors; choose 'crop' or 'whole'")
    wanted = _wanted_classes(backbone, classes, stream.length)
    run = _Run(backbone, explainers, protocol, MaskedScorer(backbone, max_forward_batch))
    ranks, rank = processes(backbone.device)

    from tqdm import tqdm

    with tqdm(
        total=stream.length,
        desc="evaluate",
        unit="image",
        disable=not progress or rank > 0,
        dynamic_ncols=True,
    ) as bar:
        for chunk in stream.blocks(max_forward_batch, rank, ranks):
            if not chunk:
                continue
            run.add(chunk, _targets(wanted, chunk))
            bar.update(chunk[-1].position + 1 - bar.n)
            bar.set_postfix_str(f"{len(stream.skipped)} skipped" if stream.skipped else "")
    return run.results(gather(run.part(stream)))


@dataclass
class _Run:
    """The state of one evaluation: what is pending and the per-image numbers so far."""

    backbone: Any
    explainers: Mapping[str, Any]
    protocol: Protocol
    scorer: MaskedScorer
    records: list[ImageRecord] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    _pending: deque[tuple[str, int, dict[str, Ticket]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        mean = torch.tensor(self.backbone.preprocessing.mean)
        self.probes: list[Probe] = [MaskingProbe(self.protocol, mean)]
        keys = [key for probe in self.probes for key in probe.keys]
        self.valid: dict[str, list[bool]] = {name: [] for name in self.explainers}
        self.tied = dict.fromkeys(self.explainers, 0)
        self.scores = {name: {key: array("d") for key in keys} for name in self.explainers}

    def add(self, chunk: list[Item], targets: Tensor | None) -> None:
        """Clean pass, explanations and requests of one chunk; collects what is finished."""
        sizes = {tuple(item.image.shape) for item in chunk}
        if len(sizes) > 1:
            raise ValueError(f"images: got sizes {sorted(sizes)}; prepare them to one size")
        images = torch.stack([item.image for item in chunk]).to(self.backbone.device)
        p, classes = self.scorer.clean(images, targets)
        names = self.backbone.class_names
        start = len(self.records)
        for item, value, target in zip(chunk, p.tolist(), classes.tolist(), strict=True):
            if not math.isfinite(value):
                raise ValueError(f"backbone: its logits for {item.id} are not finite")
            self.records.append(ImageRecord(item.id, target, names[target], value))
            self.positions.append(item.position)
        size = self.scorer.max_forward_batch
        padded = pad_batch(images, size), pad_batch(classes.to(images.device), size)
        for name in self.explainers:
            grey, valid = self._masks(name, *padded, count=len(chunk))
            self.valid[name] += valid.tolist()
            self.tied[name] += int((self._tied(grey) & valid.to(grey.device)).sum())
            for i, image in enumerate(images):
                tickets: dict[str, Ticket] = {}
                if valid[i]:
                    target = int(classes[i])
                    for probe in self.probes:
                        for key, perturbed in probe.requests(image, grey[i]):
                            tickets[key] = self.scorer.submit(perturbed, target)
                self._pending.append((name, start + i, tickets))
            self._collect()
        self.scorer.forget()

    def _masks(
        self, name: str, images: Tensor, targets: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        explainer = self.explainers[name]
        maps = explainer.attribute(images, targets)
        if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[:2] != (len(images), 1):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(f"explainers: {name} returned {got}; it has to return (B, 1, h, w)")
        return functional.saliency(
            maps[:count].detach().to(images.device),
            images.shape[-2:],
            is_mask=bool(getattr(explainer, "is_mask", False)),
            normalization=self.protocol.normalization,
            resize=self.protocol.resize,
        )

    def _tied(self, grey: Tensor) -> Tensor:
        """(B,): whether ties at a threshold keep more than 2 points above a level."""
        tied = torch.zeros(len(grey), dtype=torch.bool, device=grey.device)
        for level in self.protocol.levels:
            kept = functional.threshold_mask(grey, level, self.protocol.threshold) > 0
            tied |= kept.flatten(1).double().mean(1) > level + 0.02
        return tied

    def _collect(self) -> None:
        while self._pending and all(t.done for t in self._pending[0][2].values()):
            name, index, tickets = self._pending.popleft()
            for key, ticket in tickets.items():
                column = self.scores[name][key]
                column.extend([math.nan] * (index - len(column)))
                column.append(ticket.probability)

    def part(self, stream: ImageStream) -> _Part:
        """What this process has scored."""
        self.scorer.flush()
        self._collect()
        for columns in self.scores.values():
            for column in columns.values():
                column.extend([math.nan] * (len(self.records) - len(column)))
        cost = {
            "scores_requested": self.scorer.requested,
            "images_scored": self.scorer.scored,
            "forward_batches": self.scorer.batches,
        }
        return _Part(
            self.positions, self.records, self.valid, self.tied, self.scores, stream.skipped, cost
        )

    def results(self, parts: Sequence[_Part]) -> Results:
        """The results of all processes' ``parts``, in the order of the images."""
        skipped = dict(sorted(item for part in parts for item in part.skipped.items()))
        positions = np.array([i for part in parts for i in part.positions])
        if not len(positions):
            first = next(iter(skipped.values()))
            raise ValueError(
                f"images: none of {len(skipped)} could be read; the first: {first.reason}"
            )
        order = np.argsort(positions)
        records = [record for part in parts for record in part.records]
        records = [records[i] for i in order]
        p = torch.tensor([record.p for record in records], dtype=torch.float64)
        methods = {}
        for name, explainer in self.explainers.items():
            scores = {
                key: np.concatenate([part.scores[name][key] for part in parts])[order]
                for key in self.scores[name]
            }
            tensors = {key: torch.from_numpy(value) for key, value in scores.items()}
            values: dict[Column, Any] = {}
            for probe in self.probes:
                columns = probe.values(p, tensors)
                values.update({column: value.numpy() for column, value in columns.items()})
            methods[name] = MethodResult(
                forwards=getattr(explainer, "forwards", None),
                is_mask=bool(getattr(explainer, "is_mask", False)),
                tied=sum(part.tied[name] for part in parts),
                valid=np.concatenate([np.array(part.valid[name], bool) for part in parts])[order],
                scores=scores,
                values=values,
            )
        invalid = sum(int((~method.valid).sum()) for method in methods.values())
        cost = {key: sum(part.cost[key] for part in parts) for key in parts[0].cost}
        return Results(
            protocol=replace(self.protocol, n=len(records), n_invalid=invalid),
            images=records,
            methods=methods,
            skipped=list(skipped.values()),
            backbone={"name": self.backbone.name, "sha256": self.backbone.fingerprint},
            cost={"max_forward_batch": self.scorer.max_forward_batch, **cost},
        )


class _Part(NamedTuple):
    """What one process has scored: images by position, and numbers in that order."""

    positions: list[int]
    records: list[ImageRecord]
    valid: dict[str, list[bool]]
    tied: dict[str, int]
    scores: dict[str, dict[str, array[float]]]
    skipped: dict[int, Skipped]
    cost: dict[str, int]


def _wanted_classes(
    backbone: Any, classes: int | str | Sequence[int | str] | None, length: int | None
) -> int | list[int] | None:
    if classes is None:
        return None
    if isinstance(classes, int | str):
        return int(backbone.class_index(classes))
    wanted = [int(backbone.class_index(c)) for c in classes]
    if length is not None and len(wanted) != length:
        raise ValueError(f"classes: got {len(wanted)} for {length} images; give one an image")
    return wanted


def _targets(wanted: int | list[int] | None, chunk: list[Item]) -> Tensor | None:
    if wanted is None:
        return None
    if isinstance(wanted, int):
        return torch.full((len(chunk),), wanted)
    if chunk[-1].position >= len(wanted):
        raise ValueError(
            f"classes: got {len(wanted)}, and there are more images; give one an image"
        )
    return torch.tensor([wanted[item.position] for item in chunk])
