"""The class at one point depends on a cue elsewhere: which methods point at the cue?

    python -m xattn.eval.studies segment-cues

The pictures are those of :mod:`xattn.eval.studies.detection_cues`: a mark in one corner, and nothing in the
diamond itself, determines whether a diamond is of class "warm diamond", "cold diamond" or "plain diamond".
A small encoder-decoder network learns the class of each pixel. The study first shows that it reads the
mark: if the mark's colours are swapped, or the mark is painted over, the class must change. It then
explains the class of the pixel in the middle of the diamond; a method is right if its map points at the
mark. The network's own mask of the class, used as a map, must fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xattn.backbone import Backbone, load_segmenter
from xattn.backbone.scored import scored
from xattn.backbone.targets import SegmentationTarget, at_point
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.detection_cues import (
    CLASSES,
    MARKS,
    PLACES,
    SIDE,
    TRAINED,
    Picture,
    beside,
    check_followed,
    marked,
    picture,
    places,
    rows_of,
    table_of,
)
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import kept_record, kept_values, reported
from xattn.eval.studies.small_training import minimize
from xattn.explainers import create_explainer
from xattn.runtime.files import check_folder

METHODS: dict[str, dict[str, Any]] = {
    "occlusion": {"size": 16, "stride": 4, "fill": "mean"},
    "rise": {"masks": 200},
    "integrated_gradients": {},
    "input_x_gradient": {},
    "saliency": {},
    "lrp": {},
    "gradcam": {},
    "layercam": {},
    # Before the layers that carry information from elsewhere to the diamond.
    "gradcam early": {"layer": "encoder.1"},
    "layercam early": {"layer": "encoder.1"},
    "own mask": {},
    "centre": {},
    "random": {},
}
DRAWN = ("occlusion", "lrp", "layercam early", "layercam", "own mask")


@dataclass(frozen=True)
class SegmentCueConfig:
    pictures: int = 100
    steps: int = 800
    batch: int = 16
    seed: int = 0

    def quick(self) -> SegmentCueConfig:
        return replace(self, pictures=3, steps=4, batch=4)


DEFAULTS = SegmentCueConfig()


def labels_of(one: Picture) -> Tensor:
    """The classes (H, W): 0 for the background, else 1 + the class of the shape."""
    grid = torch.arange(SIDE) + 0.5
    found = torch.zeros(SIDE, SIDE, dtype=torch.long)
    for (x0, y0, x1, y1), label in zip(one.boxes.tolist(), one.labels.tolist(), strict=True):
        dy, dx = (grid - (y0 + y1) / 2).abs()[:, None], (grid - (x0 + x1) / 2).abs()[None]
        size = (
            torch.hypot(dy, dx) if label == 0 else torch.maximum(dy, dx) if label == 1 else dy + dx
        )
        found[size < (x1 - x0) / 2] = 1 + label
    return found


class Network(nn.Module):
    """A network whose bottleneck has cells of 8 pixels a side, each seeing the whole picture."""

    def __init__(self) -> None:
        super().__init__()

        def layer(before: int, after: int, stride: int, wide: int = 1) -> nn.Sequential:
            own = nn.Conv2d(before, after, 3, stride, wide, wide)
            return nn.Sequential(own, nn.BatchNorm2d(after), nn.ReLU())

        self.fine = layer(3, 8, 2)
        self.encoder = nn.Sequential(
            layer(8, 24, 2), layer(24, 32, 2), *(layer(32, 32, 1, wide) for wide in (1, 2, 4))
        )
        self.decoder = layer(32 + 8, 16, 1)
        self.last = nn.Conv2d(16, 1 + len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = F.interpolate(self.encoder(fine), fine.shape[2:], mode="bilinear")
        pixels = self.last(self.decoder(torch.cat([coarse, fine], 1)))
        return F.interpolate(pixels, x.shape[2:], mode="bilinear")


def trained(config: SegmentCueConfig, split: Split, file: Path) -> Backbone:
    """The network, loaded from ``file``, or trained if it is not there."""
    torch.manual_seed(config.seed)
    net = Network()
    numbers = split.fit(range(TRAINED, TRAINED + config.steps * config.batch))
    if not file.is_file():
        weight = torch.tensor([0.2, *[1.0] * len(CLASSES)])

        def losses() -> Iterator[Tensor]:
            for step in range(config.steps):
                batch = [picture(n) for n in numbers[step * config.batch :][: config.batch]]
                pixels = torch.stack([one.pixels for one in batch])
                truth = torch.stack([labels_of(one) for one in batch])
                yield F.cross_entropy(net(pixels - 0.5), truth, weight)

        minimize(net, losses(), config.steps, 3e-3, 1e-4, max_norm=5.0)
        save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file))
    names = ["nothing", *CLASSES]
    return load_segmenter(net.eval(), input_size=SIDE, class_names=names, mean=0.5, std=1.0)


def question(one: Picture, label: int | None = None) -> SegmentationTarget:
    """The logit of the diamond's class, or of class ``label``, in the middle of the diamond."""
    x0, y0, x1, y1 = one.boxes[0].tolist()
    middle = (y0 + y1) / 2 / SIDE, (x0 + x1) / 2 / SIDE
    own = int(one.labels[0]) if label is None else label
    return at_point(1 + own, *middle, p="sigmoid")


@torch.no_grad()
def answer(segmenter: Backbone, one: Picture, pixels: Tensor) -> int:
    """The most probable class of a shape in the middle of the diamond."""
    every = [question(one, label) for label in range(len(CLASSES))]
    return int(scored(segmenter, every).logits(pixels[None])[0].argmax())


def follows(segmenter: Backbone, one: Picture) -> tuple[bool, bool]:
    """Whether the prediction follows the mark: to the other colour's class if its colours are
    swapped, and to the plain class if it is painted over in the background's grey."""
    x0, y0, x1, y1 = one.mark
    label, answers = int(one.labels[0]), []
    for colour, wanted in ((MARKS[3 - label], 5 - label), ((0.45,) * 3, 4)):
        pixels = one.pixels.clone()
        pixels[:, y0:y1, x0:x1] = torch.tensor(colour)[:, None, None]
        answers.append(answer(segmenter, one, pixels) == wanted)
    return answers[0], answers[1]


@torch.no_grad()
def own_mask(one: Picture, segmenter: Backbone) -> Tensor:
    """The network's probability (1, 1, H, W) of the diamond's class."""
    logits = segmenter.model.forward_pixels(segmenter.normalize(one.pixels[None]))[0]  # type: ignore[operator]
    return logits.softmax(1)[:, [1 + int(one.labels[0])]]


def maps_of(name: str, segmenter: Backbone, kept: Sequence[Picture], seed: int) -> Tensor:
    """The maps (n, H, W) of a method."""
    found = []
    for one in kept:
        if name == "own mask":
            made = own_mask(one, segmenter)
        else:
            view = scored(segmenter, question(one))
            kind = name.partition(" ")[0]
            method = create_explainer(kind, view, seed=seed, **METHODS[name])
            made = method.attribute(one.pixels[None], 0)
        found.append(F.interpolate(made, (SIDE, SIDE), mode="bilinear")[0, 0])
    return torch.stack(found)


def study(
    output: OutputAt = "runs/study-segment-cues",
    config: SegmentCueConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train the network, score the missing methods, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    check_folder(output)
    kept_record(output / "record.json", asdict(config))
    split = Split("segment-cues")
    segmenter = trained(config, split, output / "network.safetensors")
    every = [picture(number) for number in split.score(marked(config.pictures))]
    split.write(output / "split.json")
    right = [answer(segmenter, one, one.pixels) == int(one.labels[0]) for one in every]
    kept = [one for one, known in zip(every, right, strict=True) if known or quick]
    followed = [follows(segmenter, one) for one in kept]
    swapped, painted = (sum(told[i] for told in followed) for i in range(2))
    if not quick:
        check_followed(len(every), swapped, painted)
    boxes = [one.boxes[0].tolist() for one in kept]

    def measured(name: str) -> dict[str, list[Any]]:
        def found() -> dict[str, list[float]]:
            return places(maps_of(name, segmenter, kept, config.seed), boxes, kept)

        return kept_values(output / f"{name}-places.json", found)

    values = {name: measured(name) for name in METHODS}
    draw(segmenter, kept[:3], config, output / "maps.png")
    lines = [
        f"{sum(right)} of {len(every)} diamonds have their class in their middle. Of these {swapped} "
        f"change to the other colour's with the mark's colours swapped, {painted} to the plain one "
        f"with the mark painted over.",
        "",
        *table_of(values, PLACES),
    ]
    rows = rows_of(values, PLACES, "picture")
    yield from reported(output, lines, {"segmenters": rows}, output / "maps.png")


def draw(
    segmenter: Backbone, pictures: Sequence[Picture], config: SegmentCueConfig, file: Path
) -> None:
    """Draw pictures, each with the maps of some methods beside it."""
    rows = []
    for one in pictures:
        maps = [maps_of(name, segmenter, [one], config.seed) for name in DRAWN]
        rows.append(beside(one.pixels, maps, 3 * SIDE))
    Image.fromarray(np.concatenate(rows)).save(file)
