"""Clips whose class depends on a single frame: which methods point at that frame?

    python -m xattn.eval.studies clip-cues

Every frame is grey noise with a moving bar that carries no information. One frame, at a random time, has a
square at a random place: red in class 0, blue in class 1. A tiny 3-D network is trained on such clips and
on clips without a square, with one sigmoid per class, so that only a class's square can raise its logit. A
method is right if its map is largest in that frame, and in the square.

A clip depends only on its number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone import Backbone, load_backbone
from xattn.backbone.taps import resized
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.curves import InsertionDeletionMetric
from xattn.eval.metrics.measure import measure
from xattn.eval.studies.detection_cues import HEADS, fit_heads, rows_of, table_of
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import kept_record, kept_values, reported
from xattn.eval.studies.small_training import single_thread
from xattn.explainers import create_explainer
from xattn.explaining.clip_maps import explain_clip
from xattn.heads.base import load_head
from xattn.runtime.files import check_folder

FRAMES, SIDE, SQUARE = 8, 16, 5
PLACES = FRAMES, SIDE, SIDE
CLASSES = ("red square", "blue square")
COLOURS = ((0.9, 0.2, 0.2), (0.2, 0.2, 0.9))
TRAINED = 1_000_000  # number of the first training clip
SEEN = 2_000_000  # number of the first clip that heads are trained on
GREY = (0.5,) * 3
OPTIONS: dict[str, dict[str, Any]] = {
    "occlusion": {"size": 4, "stride": 2, "frames": 1, "fill": "mean"},
    "rise": {"fill": "mean"},
    "integrated_gradients": {"baseline": "mean"},
}
METHODS = (
    *("cam", "gradcam", "gradcam_plusplus", "layercam", "hirescam", "saliency", "input_x_gradient"),
    *("integrated_gradients", "smoothgrad", "guided_backprop", "lrp", "occlusion", "rise"),
    *HEADS,  # trained on masked clips with their mean colour; untrained; trained on shuffled outcomes
    *("centre", "random"),
)
POINTS = ("at the frame", "at most a frame away", "at the square", "share in the square")
CURVES = ("deletion", "insertion")


@dataclass(frozen=True)
class ClipConfig:
    clips: int = 100  # heads are trained on twice as many others
    curves: int = 40  # how many clips deletion and insertion are measured on
    steps: int = 100
    masks: int = 500
    side: int = 112  # side of the frames whose cost is measured
    seed: int = 0

    def quick(self) -> ClipConfig:
        return replace(self, clips=3, curves=2, steps=2, masks=6, side=32)


DEFAULTS = ClipConfig()


def clip(number: int, label: int | None = None) -> tuple[Tensor, int, Tensor]:
    """Clip ``number`` (3, T, H, W) in [0, 1], its class, and the place of its square, bool (T, H, W).

    ``label`` is 0, 1, or 2 for a clip without a square; by default 0 or 1."""
    draw = np.random.default_rng(number)
    pixels = 0.5 + 0.05 * draw.normal(size=(3, *PLACES))
    label = int(draw.integers(3)) if label is None else label
    time, left = draw.integers(FRAMES), draw.integers(SIDE)
    y, x = draw.integers(SIDE - SQUARE + 1, size=2)
    for t in range(FRAMES):
        pixels[:, t, :, (left + 2 * t) % SIDE] = 0.7
    truth = np.zeros(PLACES, dtype=bool)
    if label < len(CLASSES):
        truth[time, y : y + SQUARE, x : x + SQUARE] = True
        pixels[:, truth] = np.array(COLOURS[label])[:, None]
    return torch.from_numpy(pixels).float().clamp(0, 1), label, torch.from_numpy(truth)


def drawn(numbers: Sequence[int], squares: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (N, 3, T, H, W), classes (N,) and places (N, T, H, W); with ``squares``, all have one."""
    found = [clip(n, n % len(CLASSES) if squares else None) for n in numbers]
    pixels, labels, truth = zip(*found, strict=True)
    return torch.stack(pixels), torch.tensor(labels), torch.stack(truth)


def trained(steps: int = DEFAULTS.steps, seed: int = 0) -> Backbone:
    """Train the network, which takes seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv3d(3, 8, (1, 3, 3), (1, 2, 2), padding=(0, 1, 1)), nn.ReLU()),
            *(nn.Conv3d(8, 16, 3, padding=1), nn.ReLU()),
            *(nn.Conv3d(16, 16, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU()),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, len(CLASSES))),
        )
    clips, labels, _ = drawn(range(TRAINED, TRAINED + 128), squares=False)
    x, wanted = (clips - 0.5) / 0.25, F.one_hot(labels, 3)[:, : len(CLASSES)].float()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(steps):
        chosen = torch.arange(16) + 16 * (step % 8)
        loss = F.binary_cross_entropy_with_logits(net(x[chosen]), wanted[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options: dict[str, Any] = {"mean": 0.5, "std": 0.25, "task": "multilabel"}
    return load_backbone(net, input_size=SIDE, frames=FRAMES, class_names=CLASSES, **options)


def pointing(maps: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """Whether each map (N, 1, t, h, w) is largest at the right place, and its share in the square."""
    large = resized(maps.float(), PLACES)[:, 0]
    away = (large.amax((2, 3)).argmax(1) - truth.any(3).any(2).int().argmax(1)).abs()
    hit = truth.flatten(1).gather(1, large.flatten(1).argmax(1, keepdim=True))[:, 0]
    positive = (large - large.flatten(1).amin(1).clamp_min(0).view(-1, 1, 1, 1)).clamp_min(0)
    share = (positive * truth).sum((1, 2, 3)) / positive.sum((1, 2, 3)).clamp_min(1e-12)
    found = ((away == 0).float(), (away <= 1).float(), hit.float(), share)
    return {name: values.tolist() for name, values in zip(POINTS, found, strict=True)}


def write_clip(number: int, folder: Path) -> None:
    np.save(folder / f"{number}.npy", clip(number, number % len(CLASSES))[0].numpy())


def measured(
    name: str,
    network: Backbone,
    data: tuple[Tensor, Tensor, Tensor],
    config: ClipConfig,
    heads: Path,
) -> dict[str, list[Any]]:
    """For each measure, one value per clip; None where the map is constant. ``heads`` is the folder of the
    trained heads."""
    clips, labels, truth = data
    options = {**OPTIONS.get(name, {}), **({"masks": config.masks} if name == "rise" else {})}
    if name in HEADS:
        method = create_explainer("head", network, load_head(heads / name, network))
    else:
        method = create_explainer(name, network, seed=config.seed, **options)
    maps = method.attribute(clips, labels)
    metric = InsertionDeletionMetric(
        steps=16, deletion_fill="mean", insertion_fill="mean", mean=GREY
    )
    few = config.curves
    curves = measure(metric, network, clips[:few], maps[:few], labels[:few])
    areas = {
        c.metric: [None if math.isnan(v) else v for v in values.tolist()]
        for c, values in curves.items()
    }
    return {**pointing(maps, truth), **areas}


def study(
    output: OutputAt = "runs/study-clip-cues", config: ClipConfig = DEFAULTS, quick: Quick = False
) -> Iterator[str]:
    """Train the network, measure what is not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    check_folder(output)
    kept_record(output / "record.json", asdict(config))
    network, split = trained(config.steps, config.seed), Split("clip-cues")
    split.fit(range(TRAINED, TRAINED + 128))
    seen = range(SEEN, SEEN + 2 * config.clips)
    fit_heads(lambda _: network, write_clip, seen, split, output)
    data = drawn(split.score(range(config.clips)))
    split.write(output / "split.json")
    right = ((network.logits(data[0]) > 0) == F.one_hot(data[1], 2).bool()).all(1)
    values = {
        name: kept_values(
            output / f"{name}.json", lambda name=name: measured(name, network, data, config, output)
        )
        for name in METHODS
    }
    told = (*POINTS, *CURVES)
    square = SQUARE**2 / (FRAMES * SIDE * SIDE)
    lines = [
        f"The network is right on {int(right.sum())} of {config.clips} clips; {config.masks} masks; "
        f"deletion and insertion on {config.curves} clips. By chance: {1 / FRAMES:.3f} at the frame, "
        f"{(3 * FRAMES - 2) / FRAMES**2:.3f} at most a frame away, {square:.3f} at the square.",
        "",
        *table_of(values, told),
    ]
    rows = rows_of(values, told, "clip")
    others = kept_values(output / "seeds.json", lambda: cam_by_seed(config, data))
    lines += [
        "",
        f"`cam` {POINTS[0]}, by the seed of training: {', '.join(f'{v:.3f}' for v in others)}.",
    ]
    spent = kept_values(output / "costs.json", lambda: costs(config.side))
    lines += [
        "",
        f"CPU seconds of one clip of 16 x {config.side} x {config.side} in r3d_18, one thread:",
    ]
    lines += ["", "| | s | forward passes |", "| :-- | --: | --: |"]
    one = spent["forward pass"]
    lines += [f"| {name} | {s:.2f} | {s / one:.2f} |" for name, s in spent.items()]
    draw(network, data[0][0], output / "strip.png")
    yield from reported(output, lines, {"clips": rows}, output / "strip.png")


def cam_by_seed(config: ClipConfig, data: tuple[Tensor, Tensor, Tensor]) -> list[float]:
    """The share of clips in which CAM is largest at the right frame, for networks with several seeds."""
    shares = []
    for seed in range(config.seed, config.seed + 4):
        network = trained(config.steps, seed)
        maps = create_explainer("cam", network).attribute(data[0], data[1])
        shares.append(float(np.mean(pointing(maps, data[2])[POINTS[0]])))
    return shares


def costs(side: int, repeats: int = 5) -> dict[str, float]:
    """CPU seconds of a forward pass of r3d_18 with random weights, and of explanations of one class.

    They are medians over ``repeats`` rounds, in each of which everything runs once."""
    network = load_backbone("torchvision/r3d_18", None, input_size=side)
    x, found = torch.rand(1, 3, *network.preprocessing.places), dict[str, list[float]]()
    cams = {
        name: create_explainer(name, network) for name in ("cam", "gradcam", "layercam", "eigencam")
    }

    @torch.no_grad()
    def forward() -> Tensor:
        return network.logits(x)

    calls: dict[str, Callable[[], Any]] = {"forward pass": forward}
    calls |= {f"`{name}`": partial(one.attribute, x, 0) for name, one in cams.items()}
    with single_thread():
        for turn in range(repeats + 1):  # the first warms up
            for name, call in calls.items():
                start = time.process_time()
                call()
                found.setdefault(name, []).extend([time.process_time() - start] if turn else [])
    return {name: float(np.median(values)) for name, values in found.items()}


def draw(network: Backbone, one: Tensor, file: Path) -> None:
    """Draw the strip of the first clip's occlusion map, with frames enlarged eight times."""
    large = one.repeat_interleave(8, 2).repeat_interleave(8, 3).permute(1, 2, 3, 0)
    frames = (large * 255).round().to(torch.uint8).numpy()
    method = create_explainer("occlusion", network, **OPTIONS["occlusion"])
    explain_clip(frames, network, method, fps=4)[0].strip().save(file)
