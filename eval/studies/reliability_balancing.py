"""ARBEx on faces with few examples of some expressions: are balanced predictions better and more
reliable?

    python -m xattn.eval.studies reliability-balancing

Two frozen networks read drawn faces (:mod:`xattn.eval.studies.models.frozen_faces`). The parts
above them are trained: window cross-attention, transformer blocks, a classifier, and anchors if
predictions are balanced. Of K expressions, in an order drawn for each seed, the i-th has a share of

    ratio^(-i / (K - 1)) / sum_j ratio^(-j / (K - 1))      of the training faces

All expressions have equal shares of the test faces, so accuracy is balanced accuracy. Rows of a
seed have the same faces and batches, and the parts that they share start with the same weights. The
figures of each row and seed:

    AUROC of error   P(conf of a right answer > conf of a wrong one),  conf = 1 - entropy / log K
    ECE              sum over ten bins of max p: share of the faces x |accuracy - mean max p|
    NLL              - mean log p of the true expression
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.bootstrap import t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.faces import EXPRESSIONS, draw_faces
from xattn.eval.studies.models.arbex import Arbex
from xattn.eval.studies.models.frozen_faces import IMAGE, LANDMARKS, WINDOWS, FrozenFaces
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize
from xattn.heads.reliability import TINY, confidence

SIZE = 64  # pixels a side of a face
EYES_NOSE_MOUTH = ([6, 7, 8, 9], [10, 11, 12, 13], [15], [17], [19])
"""The drawn landmarks whose mean is each of MTCNN's five points."""


@dataclass(frozen=True)
class BalancingConfig:
    """Settings of the drawn faces, and of the networks trained on the frozen ones' maps."""

    train: int = 480  # Training faces.
    tests: int = 480  # Test faces; their labels are correct.
    ratio: float = (
        10.0  # Number of faces with the most frequent expression, relative to the rarest.
    )
    blends: float = 0.35  # Share of faces with two expressions.
    false_labels: float = 0.1  # Share of the training labels that are wrong.
    epochs: int = 12  # Passes over the training faces.
    batch_size: int = 32  # Faces per step.
    lr: float = 3e-3  # Peak learning rate of AdamW.
    anchors: int = 8  # Anchors per expression, in networks with balanced predictions.
    seeds: int = 5  # Sets of faces, and networks of each kind: seeds 0, 1, ...
    data_seed: int = 0  # Seed of the first set of faces.

    def quick(self) -> BalancingConfig:
        """A short training of each network to check that all works; its figures mean nothing."""
        return replace(self, train=24, tests=18, epochs=1, batch_size=8, seeds=2)


DEFAULTS = BalancingConfig()


class Row(NamedTuple):
    """How a network is trained: the loss of its anchors, if it has any; whether rare expressions weigh
    more in the cross-entropy; and whether it reads the landmark network."""

    repulsion: str | None = None
    weighted: bool = False
    landmarks: bool = True


ROWS = {
    "plain": Row(),
    "balanced": Row("distances"),
    "balanced, hinge": Row("hinge"),
    "weighted": Row(weighted=True),
    "weighted, balanced": Row("distances", weighted=True),
    "image alone": Row(landmarks=False),
}
PAIRS = (
    ("balanced", "plain"),
    ("balanced, hinge", "plain"),
    ("weighted, balanced", "weighted"),
    ("weighted", "plain"),
    ("balanced", "balanced, before"),
    ("balanced, hinge", "balanced, hinge, before"),
    ("weighted, balanced", "weighted, balanced, before"),
    ("balanced, hinge, before", "plain"),
    ("plain", "image alone"),
)
FIGURES = ("accuracy", "rare", "auroc", "ece", "nll")
TITLES = ("balanced accuracy", "of the rarest three", "AUROC of error", "ECE", "NLL")


class Seen(NamedTuple):
    """Faces as the frozen networks see them: ``images`` (n, 1, 64, 64), their maps at each scale,
    the given and the true labels (n,), and the expressions (K,) from the most frequent to the
    rarest."""

    images: Tensor
    of_image: list[Tensor]
    of_landmarks: list[Tensor]
    labels: Tensor
    truth: Tensor
    order: tuple[int, ...]
    found: float
    points_off: float


def study(
    output: OutputAt = "runs/study-reliability-balancing",
    config: BalancingConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test the networks not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        name: partial(measure, row, config) for name, row in ROWS.items()
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*_report(found, config)], {"values": raw_rows(found)})


def counts(total: int, ratio: float, classes: int) -> list[int]:
    """How many of ``total`` faces each class has, from the most frequent to the rarest.

    >>> counts(480, 10.0, 6)
    [190, 119, 75, 47, 30, 19]
    """
    shares = ratio ** -(np.arange(classes) / max(classes - 1, 1))
    each = np.maximum((total * shares / shares.sum()).round().astype(int), 1)
    each[0] += total - each.sum()
    return [int(n) for n in each]


def learned_faces(config: BalancingConfig, seed: int) -> Seen:
    """The training faces of ``seed``."""
    return _seen(config, 2 * (config.data_seed + seed), config.train, config.ratio, True)


def tested_faces(config: BalancingConfig, seed: int) -> Seen:
    """The test faces of ``seed``, the same number for each expression."""
    return _seen(config, 2 * (config.data_seed + seed) + 1, config.tests, 1.0, False)


@cache
def _seen(config: BalancingConfig, seed: int, count: int, ratio: float, noisy: bool) -> Seen:
    order = np.random.default_rng((seed // 2, 1)).permutation(len(EXPRESSIONS))
    truth = np.repeat(order, counts(count, ratio, len(EXPRESSIONS))).tolist()
    false = config.false_labels if noisy else 0.0
    faces = draw_faces(
        count, seed, size=SIZE, blends=config.blends, false_labels=false, truth=truth
    )
    maps = _reader()(faces.images)
    drawn = torch.stack([faces.landmarks[:, ids].mean(1) for ids in EYES_NOSE_MOUTH], 1)
    off = (maps.points - drawn).norm(dim=2)[maps.found].mean()
    return Seen(
        *(faces.images, maps.image, maps.landmarks, faces.labels, faces.truth),
        order=tuple(order.tolist()),
        found=float(maps.found.float().mean()),
        points_off=float(off),
    )


@cache
def _reader() -> FrozenFaces:
    with torch.random.fork_rng(devices=[]):  # MTCNN draws random weights before it loads its own
        return FrozenFaces()


def measure(row: Row, config: BalancingConfig, split: Split, seed: int) -> dict[str, Any]:
    """Train and test a network; a balanced one also on its predictions before correction."""
    model = network(row, config)  # first, as nothing else may advance the generator that draws it
    learned = split.fit(learned_faces(config, seed))
    seconds = train(model, row, learned, config, seed)
    tested = split.score(tested_faces(config, seed))
    maps = _floats(tested.of_image), _floats(tested.of_landmarks)
    with torch.no_grad():
        own = model(*maps).softmax(1)
        p = own if model.balancing is None else model.balanced(*maps).probabilities
    rare = tested.order[len(tested.order) // 2 :]
    values = {
        "seconds": seconds,
        "parameters": sum(value.numel() for value in model.parameters()),
        "found": (learned.found + tested.found) / 2,
        "points off": (learned.points_off + tested.points_off) / 2,
        **figures(p, tested.truth, rare),
    }
    if model.balancing is not None:
        values["before"] = figures(own, tested.truth, rare)
    return values


def network(row: Row, config: BalancingConfig) -> Arbex:
    """An untrained network of ``row``."""
    reliability = None
    if row.repulsion is not None:
        reliability = {"anchors": config.anchors, "repulsion": row.repulsion}
    landmarks = LANDMARKS if row.landmarks else ()
    sizes = {"image": IMAGE, "windows": WINDOWS, "landmarks": landmarks}
    return Arbex(len(EXPRESSIONS), **sizes, reliability=reliability)


def train(model: Arbex, row: Row, learned: Seen, config: BalancingConfig, seed: int) -> float:
    """Train ``model`` and return the CPU seconds; the trust in anchors grows from 0 to 1."""
    draw = torch.Generator().manual_seed(seed)
    count = len(learned.labels)
    per_epoch = count // config.batch_size
    total = config.epochs * per_epoch
    weights = class_weights(learned.labels) if row.weighted else None

    def losses() -> Iterator[Tensor]:
        for epoch in range(config.epochs):
            order = torch.randperm(count, generator=draw)
            batches = order[: per_epoch * config.batch_size].split(config.batch_size)
            for step, batch in enumerate(batches, epoch * per_epoch):
                maps = _floats(learned.of_image, batch), _floats(learned.of_landmarks, batch)
                yield model.loss(*maps, learned.labels[batch], step / total, weights)

    return minimize(model, losses(), total, config.lr, weight_decay=0.05)


def class_weights(labels: Tensor) -> Tensor:
    """(K,): n / (K n_c) for the labels (n,), so that all classes have equal weight."""
    each = torch.bincount(labels, minlength=len(EXPRESSIONS)).clamp_min(1)
    return len(labels) / (len(EXPRESSIONS) * each.float())


def _floats(maps: list[Tensor], rows: Tensor | slice = slice(None)) -> list[Tensor]:
    return [m[rows].float() for m in maps]


# ---------------------------------------------------------------------- figures


def figures(p: Tensor, truth: Tensor, rare: tuple[int, ...]) -> dict[str, float]:
    """The report's figures for predictions ``p`` (n, K) of the true classes (n,)."""
    right = p.argmax(1) == truth
    recalls = [float(right[truth == c].double().mean()) for c in range(p.shape[1])]
    nll = -p.gather(1, truth[:, None]).clamp_min(TINY).log().mean()
    return {
        "accuracy": float(np.mean(recalls)),
        "rare": float(np.mean([recalls[c] for c in rare])),
        "auroc": error_auroc(confidence(p).numpy(), right.numpy()),
        "ece": calibration_error(p.amax(1).numpy(), right.numpy()),
        "nll": float(nll),
    }


def error_auroc(sure: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> float:
    """The probability that a right answer is more confident than a wrong one; ties count half.

    0.5 if all answers are right, or all wrong.
    """
    from scipy.stats import rankdata

    wrong = int((~right).sum())
    if not 0 < wrong < len(right):
        return 0.5
    hits = len(right) - wrong
    return float((rankdata(sure)[right].sum() - hits * (hits + 1) / 2) / (hits * wrong))


def calibration_error(
    sure: NDArray[np.floating[Any]], right: NDArray[np.bool_], bins: int = 10
) -> float:
    """Expected calibration error of the largest probabilities (n,) in bins of equal width.

    >>> calibration_error(np.array([0.95, 0.95, 0.95, 0.95]), np.array([True, True, False, False]))
    0.45
    """
    of_bin = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [
        abs(float(sure[of_bin == b].mean() - right[of_bin == b].mean()))
        * float((of_bin == b).mean())
        for b in np.unique(of_bin)
    ]
    return round(sum(gaps), 12)


# ---------------------------------------------------------------------- report


def _runs(found: Found) -> dict[str, list[dict[str, Any]]]:
    """The runs of each row; balanced ones also with their predictions before correction."""
    runs = dict(found)
    for name, each in found.items():
        if "before" in each[0]:
            runs[f"{name}, before"] = [run["before"] for run in each]
    return runs


def _report(found: Found, config: BalancingConfig) -> Iterator[str]:
    runs = _runs(found)
    each = counts(config.train, config.ratio, len(EXPRESSIONS))
    seen = [run["found"] for run in found["plain"]]
    off = [run["points off"] for run in found["plain"]]
    yield (
        f"{config.train} faces to train on, {' '.join(map(str, each))} of each expression, "
        f"{config.false_labels:.0%} of the labels false, {config.tests} to test, "
        f"{config.blends:.0%} blends; {config.epochs} epochs, {config.seeds} seeds; "
        "95 % t intervals over the seeds"
    )
    yield (
        f"MTCNN finds {100 * np.mean(seen):.1f} % of the faces, its points {100 * np.mean(off):.1f} % of "
        "the image from those drawn"
    )
    yield f"\n| row | {' | '.join(TITLES)} | parameters | CPU seconds |"
    yield "| :-- |" + " --: |" * (len(TITLES) + 2)
    for name, own in runs.items():
        cells = [t_interval([run[key] for run in own]).text(3) for key in FIGURES]
        size, seconds = "", ""
        if "seconds" in own[0]:
            size = f"{own[0]['parameters']:,}"
            seconds = f"{np.mean([run['seconds'] for run in own]):.1f}"
        yield f"| {name} | {' | '.join(cells)} | {size} | {seconds} |"
    yield f"\n| row | minus | {' | '.join(TITLES)} |"
    yield "| :-- | :-- |" + " --: |" * len(TITLES)
    for name, control in PAIRS:
        gaps = [
            t_interval([a[key] - b[key] for a, b in zip(runs[name], runs[control], strict=True)])
            for key in FIGURES
        ]
        cells = [f"{gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}]" for gap in gaps]
        yield f"| {name} | {control} | {' | '.join(cells)} |"
