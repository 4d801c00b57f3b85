"""ARBEx on generated faces: two streams against each alone, with reliability balancing and without.

    python -m xattn.eval.studies faces

Networks of one size and one training; "image" and "landmarks" read one stream. Labels to train on are
partly false, those of the test are true. Told are the accuracy on all faces and on those with a single
expression, and how well the confidence 1 - entropy / log K of the prediction tells errors (AUROC).

Generated faces with an expression: drawn from a few numbers, so that landmarks and labels are known.

Six expressions set brows, eyes, nose and mouth. Every face has its own strength of expression, build, pose
and light; of some, two expressions are blended, and some labels are false, as in photos that people
labelled. A face is a function of (seed, number) alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.models.arbex import Arbex
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.small_training import minimize
from xattn.heads.reliability import confidence

EXPRESSIONS = ("happy", "sad", "angry", "surprised", "afraid", "disgusted")
SHAPE = (
    "brow raise",
    "brow slant",
    "eye opening",
    "mouth curve",
    "mouth opening",
    "mouth width",
    "nose",
)
"""What an expression sets; 0 is neutral. A positive slant lifts the inner ends of the brows."""
OF_EXPRESSION = np.array(
    [
        [0.1, 0.0, -0.3, 1.0, 0.4, 0.6, 0.0],
        [0.1, 0.8, -0.3, -0.8, 0.0, -0.2, 0.0],
        [-0.5, -1.0, 0.0, -0.4, 0.1, -0.3, 0.2],
        [1.0, 0.0, 0.9, 0.0, 1.0, -0.6, 0.0],
        [0.7, 0.7, 0.8, -0.4, 0.5, 0.2, 0.0],
        [-0.3, -0.5, -0.6, -0.5, 0.3, 0.1, 1.0],
    ]
)
PARTS = ("brows", "eyes", "nose", "mouth")
POINTS = (0,) * 6 + (1,) * 8 + (2,) * 3 + (3,) * 6
"""The part of each landmark: three a brow, four an eye, three of the nose, six of the mouth."""
DRAWN = 64  # pixels a side that are drawn, then averaged to fewer
BUILD_NOISE, PIXEL_NOISE, POINT_NOISE = 0.12, 0.03, 0.012


class Faces(NamedTuple):
    """``images`` (n, 1, size, size) in [0, 1]; ``landmarks`` (n, 23, 2), x and y as shares of the image;
    ``labels`` (n,) as given, some false; ``truth`` (n,), the stronger expression; ``clear`` (n,), whether
    it is the only one."""

    images: Tensor
    landmarks: Tensor
    labels: Tensor
    truth: Tensor
    clear: Tensor


def draw_faces(
    count: int, seed: int = 0, *, size: int = 32, blends: float = 0.35, false_labels: float = 0.1
) -> Faces:
    """``count`` faces.

    Args:
        size: pixels a side, a divisor of 64.
        blends: share of the faces with two expressions; ``false_labels``: of the labels that are wrong.
    """
    faces = [
        _face(np.random.default_rng((seed, i)), size, blends, false_labels) for i in range(count)
    ]
    images, points, labels, truth, clear = zip(*faces, strict=True)
    return Faces(
        torch.from_numpy(np.stack(images)).float()[:, None],
        torch.from_numpy(np.stack(points)).float(),
        *(torch.tensor(column) for column in (labels, truth, clear)),
    )


def _face(
    rng: np.random.Generator, size: int, blends: float, false_labels: float
) -> tuple[Any, ...]:
    first, second = rng.choice(len(EXPRESSIONS), 2, replace=False)
    share = rng.uniform(0.5, 0.75) if rng.random() < blends else 1.0
    shape = share * OF_EXPRESSION[first] + (1 - share) * OF_EXPRESSION[second]
    shape = shape * rng.uniform(0.7, 1.1) + BUILD_NOISE * rng.standard_normal(len(SHAPE))
    label = first
    if rng.random() < false_labels:
        label = (first + rng.integers(1, len(EXPRESSIONS))) % len(EXPRESSIONS)
    points = landmarks_of(shape, rng.uniform(0.9, 1.1, 3))
    angle, scale = rng.normal(0, 0.12), rng.uniform(0.85, 1.05)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = 0.5 + rng.normal(0, 0.03, 2)
    image = _drawing([part @ turn.T + shift for part in points], scale, shape, rng)
    image = image.reshape(size, DRAWN // size, size, DRAWN // size).mean((1, 3))
    light = 1 + rng.normal(0, 0.2) * np.linspace(-1, 1, size)
    image = image * light + PIXEL_NOISE * rng.standard_normal(image.shape)
    known = np.concatenate(points[:4]) @ turn.T + shift
    known = known + POINT_NOISE * rng.standard_normal(known.shape)
    return image.clip(0, 1), known, int(label), int(first), share == 1.0


def landmarks_of(
    shape: NDArray[np.float64], build: Sequence[float] | NDArray[np.float64] = (1.0, 1.0, 1.0)
) -> list[NDArray[np.float64]]:
    """Points of brows, eyes, nose and mouth, then the outline, of an upright face around (0, 0), as shares
    of the image; ``shape`` (7,) as in :data:`SHAPE`, ``build`` factors for the distance of the eyes, the
    height of the mouth and the width of the head."""
    raised, slant, opening, curve, mouth_open, wide, wrinkle = shape
    apart, low, width = build
    brows, eyes = [], []
    for side in (-1, 1):
        x = side * 0.15 * apart
        top = -0.20 - 0.035 * raised
        ends = (0.07, 0.035 * slant)  # the outer end goes down where the inner one goes up
        brows += [
            (x + side * ends[0], top + ends[1]),
            (x, top - 0.012),
            (x - side * ends[0], top - ends[1]),
        ]
        half = 0.035 * max(1 + 0.6 * opening, 0.15)
        eyes += [(x - 0.055, -0.09), (x, -0.09 - half), (x + 0.055, -0.09), (x, -0.09 + half)]
    up = 0.025 * wrinkle
    nose = [(-0.045, 0.06 - up), (0.0, 0.08 - up), (0.045, 0.06 - up)]
    y, half, gap = 0.22 * low, 0.13 * (1 + 0.35 * wide), 0.012 + 0.05 * max(mouth_open, 0.0)
    bend = 0.05 * curve  # the corners go up where it is positive
    mouth = [
        *((-half, y - bend), (0.0, y - gap + bend), (half, y - bend)),
        *(
            (half / 2, y + gap + 0.6 * bend),
            (0.0, y + gap + bend),
            (-half / 2, y + gap + 0.6 * bend),
        ),
    ]
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    outline = np.stack([0.36 * width * np.cos(angles), 0.44 * np.sin(angles)], 1)
    return [np.array(part, np.float64) for part in (brows, eyes, nose, mouth, outline)]


def _drawing(
    points: Sequence[NDArray[np.float64]],
    scale: float,
    shape: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The face at 64 x 64 pixels."""
    from skimage.draw import disk, line, polygon

    brows, eyes, nose, mouth, outline = (part * DRAWN for part in points)
    image = np.full((DRAWN, DRAWN), rng.uniform(0.0, 0.4))
    skin, dark = rng.uniform(0.55, 0.9), rng.uniform(0.0, 0.25)

    def fill(corners: NDArray[np.float64], value: float) -> None:
        image[polygon(corners[:, 1], corners[:, 0], image.shape)] = value

    def stroke(ends: NDArray[np.float64], value: float) -> None:
        cells = ends.round().astype(int).clip(0, DRAWN - 2)
        for (x0, y0), (x1, y1) in itertools.pairwise(cells):
            rows, columns = line(y0, x0, y1, x1)
            image[rows, columns] = image[rows + 1, columns] = value

    fill(outline, skin)
    for brow in (brows[:3], brows[3:]):
        stroke(brow, dark)
    for eye in (eyes[:4], eyes[4:]):
        fill(eye, 0.95)
        middle = eye.mean(0)
        radius = scale * DRAWN * 0.018
        image[disk((middle[1], middle[0]), max(radius, 1.0), shape=image.shape)] = dark
        stroke(eye[[0, 1, 2]], dark)
    stroke(nose, skin - 0.25)
    if shape[6] > 0.4:  # wrinkles beside the nose
        stroke(nose[[0]] + np.array([[-3.0, -3.0], [0.0, -5.0]]), skin - 0.2)
        stroke(nose[[2]] + np.array([[0.0, -5.0], [3.0, -3.0]]), skin - 0.2)
    fill(mouth, dark)
    stroke(mouth[[0, 1, 2, 3, 4, 5, 0]], 0.5 * (dark + skin) - 0.1)
    return image


@dataclass(frozen=True)
class FaceStudyConfig:
    """The generated faces, and the networks that are trained on them."""

    train: int = 1500  # Faces to train on.
    tests: int = 500  # Faces to test on; their labels are true.
    blends: float = 0.35  # Share of faces with two expressions.
    false_labels: float = 0.1  # Share of the labels to train on that are wrong.
    epochs: int = 15  # Passes over the faces.
    batch_size: int = 64  # Faces a step.
    lr: float = 2e-3  # Peak learning rate of AdamW.
    anchors: int = 8  # Of a class, where predictions are balanced.
    seeds: int = 3  # Networks of each kind: seeds 0, 1, ...
    data_seed: int = 0  # Of the faces.

    def quick(self) -> FaceStudyConfig:
        """A short training of each: no figure of it means anything."""
        return replace(self, train=32, tests=24, epochs=1, batch_size=16, seeds=1)


DEFAULTS = FaceStudyConfig()
RESAMPLES = 1000
STREAMS = ("both", "image", "landmarks")
BALANCED = "-balanced"


def study(
    output: OutputAt = "runs/study-faces", config: FaceStudyConfig = DEFAULTS, quick: Quick = False
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and give its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    seed = 2 * config.data_seed
    learned = draw_faces(config.train, seed, blends=config.blends, false_labels=config.false_labels)
    tested = draw_faces(config.tests, seed + 1, blends=config.blends, false_labels=0.0)
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        f"{streams}{suffix}": partial(measure, streams, bool(suffix), learned, tested, config)
        for suffix in ("", BALANCED)
        for streams in STREAMS
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*_report(found, tested, config)], {"values": raw_rows(found)})


def measure(
    streams: Any,
    balanced: bool,
    learned: Faces,
    tested: Faces,
    config: FaceStudyConfig,
    split: Split,
    seed: int,
) -> dict[str, Any]:
    """Train a network, and test it: for each face the class it gives and how sure it is."""
    reliability = {"anchors": config.anchors} if balanced else None
    model = Arbex(len(EXPRESSIONS), POINTS, streams=streams, reliability=reliability)
    seconds = train(model, split.fit(learned), config, seed)
    tested = split.score(tested)
    with torch.no_grad():
        p = model(tested.images, tested.landmarks).softmax(1)
        if balanced:
            p = model.balanced(tested.images, tested.landmarks).probabilities
    parameters = sum(value.numel() for value in model.parameters())
    return {
        "seconds": seconds, "parameters": parameters, "given": p.argmax(1).tolist(),
        "confidence": confidence(p).tolist(),
    }  # fmt: skip


def train(model: Arbex, learned: Faces, config: FaceStudyConfig, seed: int) -> float:
    """Train ``model``, and give the CPU seconds; the trust in anchors grows from 0 to 1."""
    draw = torch.Generator().manual_seed(seed)
    per_epoch = config.train // config.batch_size
    total = config.epochs * per_epoch

    def losses() -> Iterator[Tensor]:
        for epoch in range(config.epochs):
            order = torch.randperm(config.train, generator=draw)
            batches = order[: per_epoch * config.batch_size].split(config.batch_size)
            for step, batch in enumerate(batches, epoch * per_epoch):
                faces = learned.images[batch], learned.landmarks[batch], learned.labels[batch]
                yield model.loss(*faces, step / total)

    return minimize(model, losses(), total, config.lr, weight_decay=0.05)


# ---------------------------------------------------------------------- report


def error_auroc(sure: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Probability that a right answer is surer than a wrong one, ties halved; NaN if there is no pair."""
    from scipy.stats import rankdata

    wrong = int((~right).sum())
    if not 0 < wrong < len(right):
        return float("nan")
    hits = len(right) - wrong
    return float((rankdata(sure)[right].sum() - hits * (hits + 1) / 2) / (hits * wrong))


def _errors(runs: list[dict[str, Any]], truth: NDArray[np.int64]) -> Interval:
    """AUROC of error, mean over the seeds, with an interval over resampled faces."""
    sure = [np.array(run["confidence"]) for run in runs]
    right = [np.array(run["given"]) == truth for run in runs]
    rng = np.random.default_rng(0)
    n = len(truth)
    rows = [np.arange(n), *(rng.integers(0, n, n) for _ in range(RESAMPLES))]
    values = [
        np.mean([error_auroc(s[row], r[row]) for s, r in zip(sure, right, strict=True)])
        for row in rows
    ]
    lo, hi = np.nanquantile(values[1:], (0.025, 0.975))
    return Interval(float(values[0]), float(lo), float(hi), n)


def _report(found: Found, tested: Faces, config: FaceStudyConfig) -> Iterator[str]:
    truth, clear = tested.truth.numpy(), tested.clear.numpy()
    yield (
        f"{config.train} faces to train on, {config.false_labels:.0%} of the labels false, {config.tests} "
        f"to test; {config.blends:.0%} blends; {config.epochs} epochs, {config.seeds} seeds"
    )
    yield "\n| network | all faces | clear faces | by seed, all | AUROC of error | parameters | seconds |"
    yield "| :-- | --: | --: | --: | --: | --: | --: |"
    right = {}
    for name, runs in found.items():
        each = np.array([np.array(run["given"]) == truth for run in runs], np.float64)
        right[name] = each.mean(0)
        cells = [
            mean_interval(right[name]),
            mean_interval(right[name][clear]),
            _errors(runs, truth),
        ]
        texts = [c.text(3) for c in cells]
        yield (
            f"| {name} | {texts[0]} | {texts[1]} | {spread(each.mean(1).tolist())} | {texts[2]} | "
            f"{runs[0]['parameters']:,} | {spread([run['seconds'] for run in runs], 1)} |"
        )
    yield "| must reach | at least .63 | at least .72 | | at least .74 | | at most 60 |"
    yield "\n| accuracy on all faces | less | difference |"
    yield "| :-- | :-- | --: |"
    pairs = [("both", "image"), ("both", "landmarks")]
    pairs += [(f"{name}{BALANCED}", name) for name in STREAMS]
    for name, control in pairs:
        gap = paired_difference(right[name], right[control])
        yield f"| {name} | {control} | {gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}] |"
