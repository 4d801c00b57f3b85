"""ARBEx on generated faces: two streams against each alone, with reliability balancing and without.

    python -m xattn.eval.studies faces

Networks of one size and one training; "image" and "landmarks" read one stream. Labels to train on are
partly false, those of the test are true. Told are the accuracy on all faces and on those with a single
expression, and how well the confidence 1 - entropy / log K of the prediction tells errors (AUROC).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.kept import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.models.arbex import Arbex
from xattn.eval.studies.models.faces import EXPRESSIONS, POINTS, Faces, draw_faces
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.small_training import minimize
from xattn.heads.reliability import confidence


@dataclass(frozen=True)
class FaceStudyConfig:
    """The generated faces, and the networks that are trained on them."""

    train: int = 1500
    """Faces to train on."""
    tests: int = 500
    """Faces to test on; their labels are true."""
    blends: float = 0.35
    """Share of faces with two expressions."""
    false_labels: float = 0.1
    """Share of the labels to train on that are wrong."""
    epochs: int = 15
    """Passes over the faces."""
    batch_size: int = 64
    """Faces a step."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    anchors: int = 8
    """Of a class, where predictions are balanced."""
    seeds: int = 3
    """Networks of each kind: seeds 0, 1, ..."""
    data_seed: int = 0
    """Of the faces."""

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
    """Train and measure what is not finished yet, write report.md, and give its lines.

    Raises:
        ValueError: ``output`` holds results of other settings, or a damaged file.
    """
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
