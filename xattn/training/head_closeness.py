"""How close each head of a converted network is to its softmax, beside maps that learn nothing.

Divergence, entropy and order of rows (:mod:`xattn.attention.statistics`), of the mechanism, and of
elu + 1 and a Taylor series on the queries and keys of the network as it was trained.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, create_mechanism
from xattn.attention.operators.base import Operator
from xattn.attention.statistics import compare_rows
from xattn.backbone import Backbone
from xattn.photos.base import Photos
from xattn.training.closeness import evaluation_crops
from xattn.training.teacher_stream import LayerPass, grid_of, layer_passes, sampled_rows

CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "elu + 1": ("hedgehog", {"feature": "elu"}),
    "Taylor": ("based", {"form": "taylor", "width": None}),
}


@dataclass(frozen=True)
class HeadCloseness:
    """One feature map in one head: means over photos and rows."""

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
    """Compare ``rows`` rows of every head of the converted layers on the first ``most`` photos.

    The layers of ``student`` get the tokens that reach them in ``teacher``.

    Raises:
        ValueError: nothing is converted, a mechanism whose rows may be negative, or no photo can be read.
    """
    made = student.conversion or ()
    names = {i: of.name for of in made for i in of.layers}
    if not names:
        raise ValueError(f"student: {student.name} is not converted; give a converted copy")
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
    if not count:
        raise ValueError("photos: none of them could be read; give others")
    return [
        HeadCloseness(i, head, name, *(total[head] / count).tolist())
        for (i, name), total in sorted(sums.items(), key=lambda item: item[0][0])
        for head in range(len(total))
    ]


def _operators(
    name: str, i: int, theirs: LayerPass, student: Backbone, grid: tuple[int, ...] | None
) -> Iterable[tuple[str, Operator]]:
    """The mechanism's and the controls' operators for one layer's tokens."""
    layer: Any = student.model.blocks[i].attn  # type: ignore[index, union-attr]
    with layer_passes(student, [i]) as own:
        layer(*theirs.args, **theirs.kwargs)
    yield name, own[i].call.operator
    inputs = theirs.inputs(grid, student.prefix_tokens)
    heads, width = inputs.q.shape[1], inputs.q.shape[3]
    for control, (mechanism, options) in CONTROLS.items():
        made: Mechanism = create_mechanism(mechanism, heads * width, heads, **options)
        yield control, made.operator(made.accepted(inputs))


def head_table(found: Sequence[HeadCloseness]) -> list[str]:
    """Markdown lines: a row for each head, and the mean over all."""
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
    """The same as CSV, a line for each head and map."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(HeadCloseness)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(one) for one in found)
    return text.getvalue()
