"""Detections whose class is decided outside their box: which method points at the cue?

    python -m xattn.eval.studies detection-cues

Drawn pictures hold a diamond, discs and squares, all grey, and in one corner a mark: where it is orange the
diamond's class is "warm diamond", where it is blue "cold diamond", where there is none "plain diamond". So
nothing inside the box of a diamond tells its class, and the box itself as a map fails by construction. A
small FCOS is trained on such pictures. That it reads the mark is shown first: with the mark's colours
swapped and with the mark painted over, the class must change. A method is right if its map of the diamond's
detection points at the mark. Most of what makes a diamond a detection lies in its box, so where the map is
largest outside that box is told by itself.

A picture is a function of its number alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from xattn.backbone import Backbone
from xattn.config import TrainConfig
from xattn.detection import Detection, Detections, Detector, load_detector
from xattn.detection.detector import Score
from xattn.eval.bootstrap import Interval, mean_interval
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import kept_record, kept_values, reported
from xattn.eval.studies.small_training import minimize
from xattn.explainers import create_explainer
from xattn.heads.base import load_head, save_head, seeded_head
from xattn.pictures.overlay import overlay
from xattn.runtime.files import check_folder
from xattn.runtime.tables import markdown
from xattn.training import fit
from xattn.training.outcomes import Outcomes, cache_outcomes

SIDE, MARK = 64, 8  # pixels
CLASSES = ("disc", "square", "warm diamond", "cold diamond", "plain diamond")
LEAST = 0.9  # of the detections, whose class must follow the mark
KINDS = 3  # of diamonds: picture n has the kind n % 3
MARKS = ((1.0, 0.5, 0.1), (0.1, 0.5, 1.0))  # of a warm and a cold diamond
TRAINED = 1_000_000  # the number of the first picture that is trained on
# The cosine of D-RISE's similarity hardly sees which of two diamonds it is, the score of the class does.
SCORE: Score = "class"
NEAR = 4  # pixels around the mark, half a cell of the detector's map, that count as on it
OPTIONS: dict[str, dict[str, Any]] = {
    # Cells and windows that can hide a whole mark: a stripe of it tells the class.
    "d_rise": {"cells": 4},
    "d_rise mean": {"cells": 4, "fill": "mean"},
    "occlusion": {"size": 16, "stride": 4},
    "occlusion mean": {"size": 16, "stride": 4, "fill": "mean"},
}
# FCOS scores a class by sqrt(sigmoid(class) sigmoid(centre)), and the centre is the box's. Gradient x
# activation of the class's logit alone, and of its difference to that of the other colour, as ODAM without
# smoothing.
LOGITS = ("class logit", "class contrast")
# The head evidence, trained on masked pictures with the mean colour; as it is before that; and trained on
# outcomes of which each belongs to another mask of the picture.
HEADS = ("head", "head untrained", "head shuffled")
SEEN = 2_000_000  # number of the first picture that heads are trained on
METHODS = (
    *("d_rise", "d_rise mean", "occlusion", "occlusion mean", "odam", *LOGITS, *HEADS),
    *("layercam", "gradcam", "saliency", "box", "box_centre", "centre", "random"),
)
PLACES = (
    *("pointing at the cue", "pointing at the box", "at the cue outside the box"),
    "energy on the cue",
)
CURVES = ("deletion", "insertion")


@dataclass(frozen=True)
class CueConfig:
    pictures: int = 200
    curves: int = 200  # of the first pictures deletion and insertion are measured
    steps: int = 3000
    batch: int = 16
    masks: int = 500
    seed: int = 0

    def quick(self) -> CueConfig:
        return replace(self, pictures=4, curves=2, steps=4, batch=4, masks=8)


DEFAULTS = CueConfig()


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels`` (3, H, W) in [0, 1]; boxes (n, 4) and labels (n,), the diamond first; the mark's box."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    mark: tuple[int, int, int, int]


def picture(number: int) -> Picture:
    """Picture ``number``."""
    draw = np.random.default_rng(number)
    pixels = np.repeat(draw.normal(0.45, 0.04, (1, SIDE, SIDE)), 3, 0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    kind = number % KINDS
    boxes: list[list[float]] = []
    labels = [2 + kind, *draw.integers(0, 2, draw.integers(1, 3))]
    for label in labels:
        low, high = (24, 41) if label > 1 else (16, 49)
        for _ in range(50):
            cy, cx, half = (*draw.uniform(low, high, 2), draw.uniform(6, 9))
            apart = [max(abs(cy - (b[1] + b[3]) / 2), abs(cx - (b[0] + b[2]) / 2)) for b in boxes]
            if min(apart, default=SIDE) > 18:
                break
        else:
            continue
        dy, dx = abs(y - cy), abs(x - cx)
        shape = [np.hypot(dy, dx) < half, np.maximum(dy, dx) < half][label] if label < 2 else (
            dy + dx < half
        )  # fmt: skip
        pixels[:, shape] = (
            draw.uniform(0.65, 0.95) if draw.random() < 0.5 else draw.uniform(0, 0.25)
        )
        boxes.append([cx - half, cy - half, cx + half, cy + half])
    corners = [(2, 2), (2, SIDE - MARK - 2), (SIDE - MARK - 2, 2), (SIDE - MARK - 2,) * 2]
    own = int(draw.integers(4))
    for i, (top, left) in enumerate(corners):
        marked = i == own and kind < len(MARKS)
        colour = MARKS[kind] if marked else (draw.uniform(0.1, 0.9),) * 3
        if marked or draw.random() < 0.5:
            patch = pixels[:, top : top + MARK, left : left + MARK]
            patch[:] = np.reshape(colour, (3, 1, 1))
    top, left = corners[own]
    return Picture(
        torch.from_numpy(pixels).float().clamp(0, 1),
        torch.tensor(boxes),
        torch.tensor(labels[: len(boxes)]),
        (left, top, left + MARK, top + MARK),
    )


# ---------------------------------------------------------------------- the detector


class Body(nn.Module):
    """One map at stride 8, of which a cell sees 15 pixels; the heads see 11 cells."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.layers(x)}


def network() -> FCOS:
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    sides = {"min_size": SIDE, "max_size": SIDE}
    return FCOS(Body(), len(CLASSES), anchor_generator=anchors, **sides)


def trained(config: CueConfig, split: Split, file: Path) -> Detector:
    """The detector, trained now if ``file`` does not hold it."""
    torch.manual_seed(config.seed)
    net = network()
    numbers = split.fit(range(TRAINED, TRAINED + config.steps * config.batch))
    if not file.is_file():

        def losses() -> Iterator[Tensor]:
            for step in range(config.steps):
                own = numbers[step * config.batch : (step + 1) * config.batch]
                batch = [picture(number) for number in own]
                truth = [{"boxes": one.boxes.float(), "labels": one.labels} for one in batch]
                yield sum(net([one.pixels for one in batch], truth).values())

        minimize(net.train(), losses(), config.steps, 2e-3, 1e-4, max_norm=5.0)
        save_file(net.state_dict(), file)
    net.load_state_dict(load_file(file))
    return load_detector(net.eval(), class_names=list(CLASSES))


def diamond(detector: Detector, pixels: Tensor) -> list[Detection]:
    """The best candidate whose class is a diamond's; [] if none is among the 20 best."""
    return [d for d in detector.best_candidates(pixels, 20) if d.label > 1][:1]


def follows(detector: Detector, one: Picture, label: int) -> tuple[bool, bool]:
    """Whether the diamond of class ``label`` takes the other colour's class with the mark's colours
    swapped, and the plain one's with the mark painted over in the ground's grey."""
    x0, y0, x1, y1 = one.mark
    answers = []
    for colour, wanted in ((MARKS[3 - label], 5 - label), ((0.45,) * 3, 4)):
        pixels = one.pixels.clone()
        pixels[:, y0:y1, x0:x1] = torch.tensor(colour)[:, None, None]
        answers.append([d.label for d in diamond(detector, pixels)] == [wanted])
    return answers[0], answers[1]


# ---------------------------------------------------------------------- measuring


def write_picture(number: int, folder: Path) -> None:
    pixels = (picture(number).pixels.permute(1, 2, 0).numpy() * 255).round()
    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def fit_heads(
    network_of: Callable[[Path], Backbone], write: Callable[[int, Path], None],
    numbers: Sequence[int], split: Split, output: Path,
) -> None:  # fmt: skip
    """Train :data:`HEADS` on the pictures or clips with these ``numbers``, unless they are stored.
    ``write(number, folder)`` draws one of them into a folder, and ``network_of(folder)`` explains them."""
    split.fit(numbers)
    if all((output / name).is_dir() for name in HEADS):
        return
    data = output / "seen"
    data.mkdir(exist_ok=True)
    for number in numbers:
        write(number, data)
    network = network_of(data)
    config = TrainConfig("outcomes", masks=64, fill="mean", workers=0)
    table = cache_outcomes(
        network, data, output / "outcomes", masks=64, fills=["mean"], workers=0, progress=False
    )
    tables = {HEADS[0]: table, HEADS[2]: Shuffled(**vars(table))}
    for name in HEADS:
        head = seeded_head("evidence", network, 0)
        if name in tables:
            fit(head, network, data, config, table=tables[name], progress=False)
        save_head(head.eval(), output / name)


class Shuffled(Outcomes):
    """A table whose outcomes are those of other masks of the same picture or clip."""

    def batch(self, *args: Any) -> Any:
        found = super().batch(*args)
        order = torch.randperm(self.masks, generator=torch.Generator().manual_seed(0))
        clean, masked = found.logits[:, :1], found.logits[:, 1:]
        return replace(found, logits=torch.cat([clean, masked[:, order]], 1))


def maps_of(
    name: str, view: Detections, pixels: Tensor, config: CueConfig, heads: Path | None = None
) -> Tensor:
    """(n, H, W): of picture i detection i; trained heads are in the folder ``heads``."""
    kind = name.partition(" ")[0]
    options = OPTIONS.get(name, {}) | ({"masks": config.masks} if kind == "d_rise" else {})
    found = []
    for i, image in enumerate(pixels.split(1)):
        alone = view.base.of([view.detections[i]], SCORE)
        if name in LOGITS:
            one = logit_map(alone, image, name == LOGITS[1])
        elif name in HEADS and heads is not None:
            head = load_head(heads / name, alone)
            one = create_explainer("head", alone, head).attribute(image, 0)
        else:
            explainer = create_explainer(kind, alone, seed=config.seed, **options)
            one = explainer.attribute(image, 0)
        found.append(F.interpolate(one, (SIDE, SIDE), mode="bilinear")[0, 0])
    return torch.stack(found)


def logit_map(view: Detections, image: Tensor, contrast: bool) -> Tensor:
    """(1, 1, h, w) of the one detection of ``view``: see :data:`LOGITS`."""
    x, label = view.base.normalize(image), view.detections[0].label
    with torch.no_grad():
        (part,), (features,) = view.base.model.parts(x)
        at = int(view.scores(part, [0]).argmax())
    features.requires_grad_()
    net: Any = view.base.model.net
    logits = net.head([features])["cls_logits"][0, at]
    value = logits[label] - logits[5 - label] if contrast else logits[label]
    (gradient,) = torch.autograd.grad(value, features)
    return (gradient * features.detach()).sum(1, keepdim=True).relu()


def placed(maps: Tensor, boxes: Sequence[Sequence[float]], near: float) -> dict[str, list[float]]:
    """Whether the largest value lies within ``near`` pixels of each box, and the share of positive values
    there; 0 of a map without any."""
    pointing, energy = [], []
    grid = torch.arange(SIDE) + 0.5
    for one, (x0, y0, x1, y1) in zip(maps, boxes, strict=True):
        rows, columns = (
            (grid > low - near) & (grid < high + near) for low, high in ((y0, y1), (x0, x1))
        )
        inside = rows[:, None] & columns
        at = one == one.max()  # all of them, of a flat map
        pointing.append(float(at[inside].sum() / at.sum()))
        positive = one.clamp_min(0)
        energy.append(float(positive[inside].sum() / positive.sum().clamp_min(1e-12)))
    return {"pointing": pointing, "energy": energy}


def places(
    maps: Tensor, boxes: Sequence[Sequence[float]], kept: Sequence[Picture]
) -> dict[str, list[float]]:
    """Where each map is largest, and its share on the cue."""
    marks = [one.mark for one in kept]
    cue, box = placed(maps, marks, NEAR), placed(maps, boxes, 0)
    outside = []
    for one, (x0, y0, x1, y1) in zip(maps, boxes, strict=True):
        rest = one.clone()
        rows, columns = (
            slice(max(0, math.floor(low) - NEAR), math.ceil(high) + NEAR)
            for low, high in ((y0, y1), (x0, x1))
        )
        rest[rows, columns] = -math.inf
        outside.append(rest)
    beside = placed(torch.stack(outside), marks, NEAR)["pointing"]
    return dict(zip(PLACES, (cue["pointing"], box["pointing"], beside, cue["energy"]), strict=True))


def curves(maps: Tensor, view: Detections, kept: Sequence[Picture]) -> dict[str, list[Any]]:
    """Deletion and insertion of each detection's score; None where a map is constant."""

    def given(images: Tensor, target: Tensor) -> Tensor:
        return maps[target][:, None]

    results = evaluate(
        view,
        {"given": given},
        torch.stack([one.pixels for one in kept]),
        metrics="insertion-deletion",
        classes=list(range(len(kept))),
        progress=False,
    )
    values = {c.key: v.tolist() for c, v in results.methods["given"].values.items()}
    return {key: [None if math.isnan(v) else v for v in values[key]] for key in CURVES}


def measured(
    name: str, view: Detections, kept: Sequence[Picture], config: CueConfig, output: Path
) -> dict[str, list[Any]]:
    """By what is told, a value a picture; maps are made once, and kept."""
    file = output / f"{name}.safetensors"
    if not file.is_file():
        pixels = torch.stack([one.pixels for one in kept])
        save_file({"maps": maps_of(name, view, pixels, config, output)}, file)
    maps = load_file(file)["maps"]
    boxes = [one.place for one in view.detections]
    few = view.base.of(view.detections[: config.curves], SCORE)
    return {
        **kept_values(output / f"{name}-places.json", lambda: places(maps, boxes, kept)),
        **kept_values(
            output / f"{name}-curves.json",
            lambda: curves(maps[: config.curves], few, kept[: config.curves]),
        ),
    }


def marked(pictures: int) -> list[int]:
    """The numbers of the first ``pictures`` that have a mark."""
    return [n for n in range(pictures * KINDS // len(MARKS)) if n % KINDS < len(MARKS)]


def check_followed(count: int, swapped: int, painted: int) -> None:
    """Refuse a network whose classes do not follow the mark."""
    if min(swapped, painted) < LEAST * count:
        raise ValueError(
            f"config.steps: of {count} classes {swapped} follow the mark's colour and {painted} its "
            f"absence; train longer, until {LEAST:.0%} do"
        )


def table_of(
    values: Mapping[str, Mapping[str, Sequence[Any]]], told: Sequence[str]
) -> Iterator[str]:
    """A line for each method: means of the columns ``told``, with intervals."""
    rows = (
        [f"`{name}`", *(cell_of(mean_interval(np.array(own[c], float))) for c in told)]
        for name, own in values.items()
    )
    return markdown(["method", *told], rows)


def study(
    output: OutputAt = "runs/study-detection-cues",
    config: CueConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train the detector, measure what is not finished yet, write report.md, and give its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    check_folder(output)
    kept_record(output / "record.json", asdict(config))
    split = Split("detection-cues")
    detector = trained(config, split, output / "detector.safetensors")
    pictures, detections, right, followed = [], [], [], []
    for number in split.score(marked(config.pictures)):
        one = picture(number)
        found = diamond(detector, one.pixels)
        right.append(bool(found) and found[0].label == int(one.labels[0]) and found[0].score > 0.5)
        if right[-1] or quick:
            pictures.append(one)
            detections += found or detector.best_candidates(one.pixels)
            followed.append(follows(detector, one, int(one.labels[0])))
    swapped, painted = (sum(told) for told in zip(*followed, strict=True))
    if not quick:
        check_followed(len(pictures), swapped, painted)
    view = detector.of(detections, SCORE)
    seen = range(SEEN, SEEN + 2 * config.pictures)
    every = lambda data: detector.of(detector.detect_all(data, 0.05, 3), SCORE)  # noqa: E731
    fit_heads(every, write_picture, seen, split, output)
    split.write(output / "split.json")
    values = {name: measured(name, view, pictures, config, output) for name in METHODS}
    draw(view, pictures[:3], config, output / "maps.jpg")
    told = (*PLACES, *CURVES)
    lines = [
        f"{sum(right)} of {config.pictures} diamonds are found with their class (score over 0.5). Of these "
        f"{swapped} change to the other colour's class with the mark's colours swapped, {painted} to the "
        f"plain one with the mark painted over; {config.masks} masks; deletion and insertion on "
        f"{config.curves} pictures.",
        "",
        *table_of(values, told),
    ]
    rows = rows_of(values, told, "picture")
    yield from reported(output, lines, {"detectors": rows}, output / "maps.jpg")


def rows_of(
    values: Mapping[str, Mapping[str, Sequence[Any]]], told: Sequence[str], input_name: str
) -> list[dict[str, Any]]:
    """The raw values: a row for each method and input, empty where a column has fewer inputs."""
    return [
        {"method": name, input_name: i}
        | {column: own[column][i] if i < len(own[column]) else None for column in told}
        for name, own in values.items()
        for i in range(max(len(own[column]) for column in told))
    ]


def cell_of(found: Interval) -> str:
    return f"{found.mean:.3f} ({found.lo:.3f} to {found.hi:.3f})"


def draw(view: Detections, pictures: Sequence[Picture], config: CueConfig, file: Path) -> None:
    """Pictures, and beside each the maps of some methods."""
    rows = []
    for i, one in enumerate(pictures):
        alone = view.base.of([view.detections[i]], SCORE)
        names = ("occlusion mean", "odam", "layercam", "box")
        maps = [maps_of(name, alone, one.pixels[None], config) for name in names]
        rows.append(beside(one.pixels, maps, 4 * SIDE))
    Image.fromarray(np.concatenate(rows)).save(file, quality=88)


def beside(pixels: Tensor, maps: Sequence[Tensor], side: int) -> NDArray[np.uint8]:
    """A picture (3, H, W) of ``side`` pixels, and beside it an overlay of each of its maps (1, h, w)."""
    array = (pixels.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    photo = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
    cells = [photo]
    for raw in maps:
        unit = (raw - raw.min()) / (raw.max() - raw.min()).clamp_min(1e-12)
        large = F.interpolate(unit[None], (side, side), mode="bilinear")[0, 0]
        cells.append(overlay(photo, large.clamp(0, 1).numpy()))
    return np.concatenate([np.asarray(cell.convert("RGB")) for cell in cells], 1)
