"""Measure how close a converted network is to the network that it replaces, for each layer and for the
network as a whole.

error_l = mean |y' - y|^2 / mean |y|^2         y, y' outputs of attention layer l, given the same tokens
KL_l    = mean_i sum_j P_ij ln(P_ij / A_ij)     rows of softmax and mechanism, in nats
agreement, the share of photos with the same most probable class;  cosine of the last patch tokens

For each head, it also measures the divergence, entropy and order of the mechanism's rows
(:mod:`xattn.attention.statistics`) and, for comparison, of the rows that elu + 1 and a Taylor series give
for the queries and keys of the original network.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.base import Mechanism, create_mechanism
from xattn.attention.operators.base import Operator
from xattn.attention.statistics import compare_rows, mean_row_divergence
from xattn.backbone import Backbone
from xattn.photos.base import Photos
from xattn.training.data import TrainImages
from xattn.training.students.distilled import LayerPass, grid_of, layer_passes, sampled_rows


@dataclass(frozen=True)
class LayerCloseness:
    """The closeness of a converted layer; ``row_kl`` is None if the mechanism's rows are not shares of
    attention."""

    layer: int
    error: float
    row_kl: float | None


@dataclass(frozen=True)
class Closeness:
    """The closeness of a network: means over ``photos`` photos; ``agreement`` is None for a network
    without classes."""

    photos: int
    layers: tuple[LayerCloseness, ...]
    agreement: float | None
    cosine: float

    @property
    def row_kl(self) -> float | None:
        """The mean of the layers' ``row_kl``, over the layers whose rows can be compared."""
        known = [layer.row_kl for layer in self.layers if layer.row_kl is not None]
        return sum(known) / len(known) if known else None

    @property
    def error(self) -> float:
        """The mean of the layers' ``error``."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def record(self) -> dict[str, Any]:
        """Return the measurements as JSON values."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Closeness:
        """Read measurements; this is the inverse of :meth:`record`."""
        layers = tuple(LayerCloseness(**layer) for layer in record["layers"])
        return cls(record["photos"], layers, record["agreement"], record["cosine"])


def comparison_lines(before: Closeness, after: Closeness) -> list[str]:
    """Return Markdown lines: a table of the layers and of the network as a whole, before and after
    training."""
    lines = [
        f"On {after.photos} photos, before and after training:",
        "",
        "| | error of outputs, % | after | KL of rows, nats | after |",
        "| :-- | --: | --: | --: | --: |",
    ]
    names = [f"layer {layer.layer}" for layer in after.layers]
    pairs: list[Any] = [*zip(before.layers, after.layers, strict=True), (before, after)]
    for name, (one, two) in zip([*names, "mean"], pairs, strict=True):
        errors = f"{100 * one.error:.1f} | {100 * two.error:.1f}"
        lines.append(f"| {name} | {errors} | {_nats(one.row_kl)} | {_nats(two.row_kl)} |")
    lines.append("")
    if after.agreement is not None and before.agreement is not None:
        shares = f"{100 * before.agreement:.1f} %, {100 * after.agreement:.1f} %"
        lines.append(f"same class as the original network: {shares}")
    lines.append(f"cosine of patch tokens: {before.cosine:.3f}, {after.cosine:.3f}")
    return lines


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@torch.no_grad()
def closeness(
    teacher: Backbone,
    student: Backbone,
    photos: Photos,
    most: int = 256,
    batch_size: int = 8,
    max_pixels: int = 40_000_000,
) -> Closeness:
    """Measure ``student``, a converted copy of ``teacher``, on the first ``most`` readable photos.

    Raises:
        ValueError: no photo can be read.
    """
    layers = sorted(i for made in student.conversion or () for i in made.layers)
    sums, count = _Sums(layers), 0
    for images in evaluation_crops(teacher, photos, most, batch_size, max_pixels):
        sums.add(teacher, student, images)
        count += len(images)
    if not count:
        raise ValueError("validation: none of the photos could be read; give other photos")
    return sums.means(count, teacher.has_classes)


def evaluation_crops(
    backbone: Backbone, photos: Photos, most: int, batch_size: int, max_pixels: int
) -> Iterable[Tensor]:
    """Yield evaluation crops in the order of the photos' numbers."""
    images = TrainImages(photos, backbone.preprocessing, 0, augment=False, max_pixels=max_pixels)
    dtype = next(backbone.parameters()).dtype
    for start in range(0, min(most, len(photos)), batch_size):
        numbers = range(start, min(start + batch_size, most, len(photos)))
        found = [image for i in numbers if (image := images[0, i][1]) is not None]
        if found:
            yield torch.stack(found).to(backbone.device, dtype)


class _Sums:
    """Sums over photos, in float64."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = layers
        self.difference = dict.fromkeys(layers, 0.0)
        self.size = dict.fromkeys(layers, 0.0)
        self.kl: dict[int, float | None] = dict.fromkeys(layers, 0.0)
        self.same = self.cosine = 0.0

    def add(self, teacher: Backbone, student: Backbone, images: Tensor) -> None:
        with layer_passes(teacher, self.layers) as passes:
            found, logits = last_tokens(teacher, images)
        for i, of_layer in passes.items():
            self._add_layer(i, of_layer, student)
        own, own_logits = last_tokens(student, images)
        patches = slice(teacher.prefix_tokens, None)
        cosine = F.cosine_similarity(found[:, patches].double(), own[:, patches].double(), dim=-1)
        self.cosine += float(cosine.mean(1).sum())
        self.same += float((logits.argmax(1) == own_logits.argmax(1)).sum())

    def _add_layer(self, i: int, theirs: LayerPass, student: Backbone) -> None:
        layer: Any = student.model.blocks[i].attn  # type: ignore[index, union-attr]
        with layer_passes(student, [i]) as passes:
            result = layer(*theirs.args, **theirs.kwargs)
        operator = passes[i].call.operator
        self.difference[i] += float(
            (result - theirs.result).double().square().flatten(1).mean(1).sum()
        )
        self.size[i] += float(theirs.result.double().square().flatten(1).mean(1).sum())
        before = self.kl[i]
        if before is None or not operator.stochastic or operator.signed:
            self.kl[i] = None
            return
        kl = mean_row_divergence(theirs.call.operator, operator)
        self.kl[i] = before + float(kl.mean(1).sum())

    def means(self, count: int, has_classes: bool) -> Closeness:
        layers = []
        for i in self.layers:
            kl = self.kl[i]
            error = self.difference[i] / max(self.size[i], 1e-30)
            layers.append(LayerCloseness(i, error, None if kl is None else kl / count))
        agreement = self.same / count if has_classes else None
        return Closeness(count, tuple(layers), agreement, self.cosine / count)


def last_tokens(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last tokens (B, N, C), which the classifier reads, and the logits (B, K)."""
    found: list[Tensor] = []
    with backbone.alone():
        handle = backbone.head_point.register_forward_hook(lambda m, a, out: found.append(out))
        try:
            logits = backbone.logits(images)
        finally:
            handle.remove()
    return found[-1], logits


def divergence(wanted: Tensor, logits: Tensor, task: str) -> Tensor:
    """Compute the KL divergence of ``logits`` (B, K) from the ``wanted`` logits, with softmax; for
    multi-label networks it is the mean over labels of the KL with sigmoids, and for regression the mean
    squared error."""
    if task == "regression":
        return F.mse_loss(logits, wanted)
    if task == "multilabel":
        p = wanted.sigmoid()
        least = F.binary_cross_entropy_with_logits(wanted, p)
        return F.binary_cross_entropy_with_logits(logits, p) - least
    return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), None, None, "batchmean", True)


# ---------------------------------------------------------------------- head by head


CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "elu + 1": ("hedgehog", {"feature": "elu"}),
    "Taylor": ("based", {"form": "taylor", "width": None}),
}


@dataclass(frozen=True)
class HeadCloseness:
    """The closeness of one feature map in one head, as means over photos and rows."""

    layer: int
    head: int
    map: str
    divergence: float
    entropy: float
    softmax_entropy: float
    order: float


@torch.no_grad()
def head_closeness(
    teacher: Backbone,
    student: Backbone,
    photos: Photos,
    most: int = 32,
    rows: int = 64,
    batch_size: int = 8,
    max_pixels: int = 40_000_000,
) -> list[HeadCloseness]:
    """Compare the original and converted layers on the first ``most`` photos, in ``rows`` rows of every
    head.

    The layers of ``student`` receive the tokens that reach them in ``teacher``.

    Raises:
        ValueError: the rows of the mechanism may be negative.
    """
    names = {i: of.name for of in student.conversion or () for i in of.layers}
    sums: dict[tuple[int, str], Tensor] = {}
    count = 0
    for images in evaluation_crops(teacher, photos, most, batch_size, max_pixels):
        with layer_passes(teacher, names) as passes:
            teacher.logits(images)
        grid = grid_of(teacher, images)
        for i, theirs in passes.items():
            index = sampled_rows(theirs.call.operator.shape[2], rows, 0, i)
            for name, operator in _operators(names[i], i, theirs, student, grid):
                found = compare_rows(theirs.call.operator, operator, index)
                values = (found.divergence, found.entropy, found.softmax_entropy, found.order)
                total = torch.stack([x.sum(0) for x in values], -1)  # (H, 4)
                sums[i, name] = sums.get((i, name), torch.zeros(())) + total
        count += len(images)
    return [
        HeadCloseness(i, head, name, *(total[head] / count).tolist())
        for (i, name), total in sorted(sums.items(), key=lambda item: item[0][0])
        for head in range(len(total))
    ]


def _operators(
    name: str, i: int, theirs: LayerPass, student: Backbone, grid: tuple[int, ...] | None
) -> Iterable[tuple[str, Operator]]:
    """The operators of the mechanism and of the controls for one layer's tokens."""
    layer: Any = student.model.blocks[i].attn  # type: ignore[index, union-attr]
    with layer_passes(student, [i]) as own:
        layer(*theirs.args, **theirs.kwargs)
    yield name, own[i].call.operator
    inputs = theirs.inputs(grid, student.prefix_tokens)
    heads, width = inputs.q.shape[1], inputs.q.shape[3]
    for control, (mechanism, options) in CONTROLS.items():
        made: Mechanism = create_mechanism(mechanism, heads * width, heads, **options)
        yield control, made.operator(made.check_inputs(inputs))


def head_table(found: Sequence[HeadCloseness]) -> list[str]:
    """Return Markdown lines: a table with one row for each head, and the mean over all heads."""
    names = list(dict.fromkeys(head.map for head in found))
    titles = [f"KL {name}" for name in names]
    titles += ["entropy softmax", *names, *(f"order {name}" for name in names)]
    lines = [f"| layer | head | {' | '.join(titles)} |", "|" + " --: |" * (2 + len(titles))]
    by_head: dict[tuple[int, int], dict[str, HeadCloseness]] = {}
    for one in found:
        by_head.setdefault((one.layer, one.head), {})[one.map] = one
    cells = [_cells([maps[name] for name in names]) for maps in by_head.values()]
    for (layer, head), row in zip(by_head, cells, strict=True):
        lines.append(f"| {layer} | {head} | {_text(row)} |")
    means = [sum(column) / len(column) for column in zip(*cells, strict=True)]
    return [*lines, f"| mean | | {_text(means)} |"]


def _cells(maps: Sequence[HeadCloseness]) -> list[float]:
    entropy = [maps[0].softmax_entropy, *(one.entropy for one in maps)]
    return [*(one.divergence for one in maps), *entropy, *(one.order for one in maps)]


def _text(row: Sequence[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in row)


def head_csv(found: Sequence[HeadCloseness]) -> str:
    """Return the same table as CSV, with one line for each head and map."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(HeadCloseness)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in found)
    return text.getvalue()
