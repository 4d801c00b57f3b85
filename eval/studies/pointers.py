"""Trains pointer networks on hulls, shortest tours and triangles, and compares encoders.

    python -m xattn.eval.studies pointer

Finished results stay in the output folder, and the same command resumes from there. Orders of the cells of
photos are another study, :mod:`~xattn.eval.studies.cell_orders`.

Every network has the same width, samples, batches and learning rate; only the encoder or the task differs.
New samples are drawn for every step, with a number of points drawn for that step; tests are drawn
separately.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xattn.eval.evaluation.split import Split
from xattn.eval.studies.models.point_sets import (
    PointerNet,
    Samples,
    draw,
    greedy_tour,
    hull_coverage,
    tour_length,
    triangle_coverage,
    two_opt,
)
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.small_training import minimize, single_thread
from xattn.runtime.files import atomic_file


@dataclass(frozen=True)
class PointStudyConfig:
    """Settings for training and testing the pointer networks of the study."""

    seeds: int = 3  # Networks of each kind: seeds 0, 1, ...
    samples: int = 72_000  # Samples to train one network on, each used once.
    batch_size: int = 64  # Samples per step, all with the same number of points.
    width: int = 96  # Width of every network's vectors.
    lr: float = 2e-3  # Peak rate of AdamW, after a tenth of the steps; then half a cosine to 0.
    tests: int = 1_000  # Samples per test.
    beam: int = 4  # Sequences that the beam search for tours keeps.

    def quick(self) -> PointStudyConfig:
        """A few steps of each, to check that everything runs; its figures mean nothing."""
        return replace(self, seeds=1, samples=512, tests=20, width=16)


TEST_SEED = 2**33  # beyond all steps of all trainings


@dataclass(frozen=True)
class Row:
    """A network: its task, the numbers of points in training and in tests, and its options."""

    task: str
    trained: tuple[int, ...]
    tested: tuple[int, ...]
    encoder: str = "set"


ROWS = {
    "hull-set": Row("hull", (5, 6, 7, 8, 9, 10), (5, 7, 10, 15, 20)),
    "hull-lstm": Row("hull", (5, 6, 7, 8, 9, 10), (5, 7, 10, 15, 20), "lstm"),
    "tsp-set": Row("tsp", (5, 6, 7, 8, 9, 10), (5, 10)),
    "tsp-lstm": Row("tsp", (5, 6, 7, 8, 9, 10), (5, 10), "lstm"),
    "delaunay-set": Row("delaunay", (5,), (5,)),
    "delaunay-lstm": Row("delaunay", (5,), (5,), "lstm"),
}


def network(row: Row, width: int) -> PointerNet:
    """An untrained network; tours have no end symbol, and triangles may visit points again."""
    return PointerNet(
        width,
        encoder=row.encoder,  # type: ignore[arg-type]
        revisit=row.task == "delaunay",
        end=row.task != "tsp",
    )


def measure(name: str, config: PointStudyConfig, split: Split, seed: int) -> dict[str, Any]:
    """Train and test a network: CPU ``seconds`` of both, and values by number of points."""
    row = ROWS[name]
    net = network(row, config.width)
    seconds = train(net, row, config, split, seed)
    start = time.process_time()
    tests: dict[str, Any] = {}
    with single_thread():
        for points in row.tested:
            (of_test,) = split.score([(TEST_SEED, points)])
            samples = draw(row.task, points, config.tests, of_test)
            tests[str(points)] = TESTS[row.task](net, samples, config)
    return {
        "seconds": seconds,
        "test_seconds": time.process_time() - start,
        "parameters": sum(p.numel() for p in net.parameters()),
        "tests": tests,
    }


def train(net: PointerNet, row: Row, config: PointStudyConfig, split: Split, seed: int) -> float:
    """Train ``net`` and return the CPU seconds, including those for computing the truth."""
    steps = max(2, config.samples // config.batch_size)
    sizes = np.random.default_rng((seed, 0)).choice(row.trained, steps)
    seeds = split.fit([(seed, 1 + step) for step in range(steps)])
    losses = (
        net.loss(*tensors(draw(row.task, points, config.batch_size, of_step)))
        for of_step, points in zip(seeds, sizes.tolist(), strict=True)
    )
    return minimize(net, losses, steps, config.lr, weight_decay=0.01, max_norm=2.0)


def tensors(samples: Samples) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(samples.points).float(), torch.from_numpy(samples.answers)


def _answers(net: PointerNet, samples: Samples, beam: int = 1) -> list[list[int]]:
    found = net.answers(tensors(samples)[0], beam).tolist()
    return [[i for i in answer if i >= 0] for answer in found]


def _truth(samples: Samples) -> list[list[int]]:
    return [[i for i in answer if i >= 0] for answer in samples.answers.tolist()]


def hull_test(net: PointerNet, samples: Samples, config: PointStudyConfig) -> dict[str, float]:
    """Shares of ``exact`` orders and ``failed`` answers; ``area`` of the others relative to the hull."""
    answers = _answers(net, samples)
    areas = [hull_coverage(x, a) for x, a in zip(samples.points, answers, strict=True)]
    good = [area for area in areas if area is not None]
    return {
        "exact": _share(a == t for a, t in zip(answers, _truth(samples), strict=True)),
        "failed": 1 - len(good) / len(areas),
        "area": float(np.mean(good)) if good else 0.0,
    }


def tour_test(net: PointerNet, samples: Samples, config: PointStudyConfig) -> dict[str, float]:
    """Mean lengths relative to the shortest tours, for ``greedy`` decoding, ``beam`` and two controls."""
    best = tour_length(samples.points, samples.answers)

    def ratio(tours: Sequence[Sequence[int]]) -> float:
        return float(np.mean(tour_length(samples.points, np.array(tours)) / best))

    return {
        "greedy": ratio(_answers(net, samples)),
        "beam": ratio(_answers(net, samples, config.beam)),
        "nearest": ratio([greedy_tour(x) for x in samples.points]),
        "two_opt": ratio([two_opt(x) for x in samples.points]),
        "length": float(best.mean()),
    }


def triangle_test(net: PointerNet, samples: Samples, config: PointStudyConfig) -> dict[str, float]:
    """``exact`` sequence, and ``coverage``: the share of triangles that are found."""
    answers, truth = _answers(net, samples), _truth(samples)
    pairs = list(zip(truth, answers, strict=True))
    return {
        "exact": _share(t == a for t, a in pairs),
        "coverage": float(np.mean([triangle_coverage(t, a) for t, a in pairs])),
    }


def _share(right: Any) -> float:
    return float(np.mean(list(right)))


TESTS = {"hull": hull_test, "tsp": tour_test, "delaunay": triangle_test}


DEFAULTS = PointStudyConfig()
AIMS = {5: "at least .90", 7: "at least .88", 10: "at least .83", 15: "at least .55"}
EARLIER = {5: ".68", 7: ".58", 10: ".47", 15: ".23"}
TOUR_AIMS = {5: "at most 1.02", 10: "at most 1.08"}


def study(
    output: OutputAt = "runs/study-pointer",
    config: PointStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test the networks that are not finished yet, write report.md and a plot, and yield
    the report's lines."""
    config = config.quick() if quick else config
    output = Path(output)
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    rows = {name: partial(measure, name, config) for name in ROWS}
    found = measure_rows(output, settings, rows, config.seeds)
    lines = [*_report(found, config)]
    _plot(found, output / "pointers.png")
    values = {"values": raw_rows(found)}
    yield from reported(output, lines, values, output / "pointers.png")


def _report(found: Found, config: PointStudyConfig) -> Iterator[str]:
    yield (
        f"{config.samples:,} samples, width {config.width}, {config.seeds} seeds; {config.tests:,} samples "
        f"a test\n"
    )
    area_title = "area of the others, relative to the correct area"
    yield f"| hull | points | exact order | goal | failed | {area_title} | goal |"
    yield "| :-- | --: | --: | :-- | --: | --: | :-- |"
    for name in ("hull-set", "hull-lstm"):
        ours = name == "hull-set"
        for n in ROWS[name].tested:
            exact, failed, area = (
                _cell(found[name], n, key) for key in ("exact", "failed", "area")
            )
            aim = (
                AIMS.get(n, "")
                if ours
                else f"an earlier trial: {EARLIER[n]}"
                if n in EARLIER
                else ""
            )
            of_area = "at least .99" if ours and n in AIMS else ""
            new = "" if n in ROWS[name].trained else ", untrained"
            yield f"| {name} | {n}{new} | {exact} | {aim} | {failed} | {area} | {of_area} |"
    tour_title = "length of the tour, relative to the shortest"
    baselines = "nearest neighbour | 2-opt"
    yield f"\n| {tour_title} | points | greedy | beam {config.beam} | goal | {baselines} |"
    yield "| :-- | --: | --: | --: | :-- | --: | --: |"
    for name in ("tsp-set", "tsp-lstm"):
        for n in ROWS[name].tested:
            keys = ("greedy", "beam", "nearest", "two_opt")
            greedy, beam, nearest, two_opt = (_cell(found[name], n, key) for key in keys)
            aim = TOUR_AIMS[n] if name == "tsp-set" else ""
            yield f"| {name} | {n} | {greedy} | {beam} | {aim} | {nearest} | {two_opt} |"
    yield "\n| triangles | points | exact sequence | share of triangles found |"
    yield "| :-- | --: | --: | --: |"
    for name in ("delaunay-set", "delaunay-lstm"):
        for n in ROWS[name].tested:
            exact, coverage = (_cell(found[name], n, key) for key in ("exact", "coverage"))
            yield f"| {name} | {n} | {exact} | {coverage} |"
    yield "\n| network | parameters | CPU seconds of training |"
    yield "| :-- | --: | --: |"
    for name, runs in found.items():
        yield f"| {name} | {runs[0]['parameters']:,} | {spread([r['seconds'] for r in runs], 1)} |"


def _cell(runs: Sequence[dict[str, Any]], points: int, key: str) -> str:
    return spread([run["tests"][str(points)][key] for run in runs])


def _plot(found: Found, path: Path) -> None:
    """Plot exact orders of hulls over the number of points, with bars from the worst seed to the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, label in (("hull-set", "set encoder"), ("hull-lstm", "LSTM encoder")):
        points = ROWS[name].tested
        runs = [[run["tests"][str(n)]["exact"] for run in found[name]] for n in points]
        means = [sum(values) / len(values) for values in runs]
        below = [mean - min(values) for mean, values in zip(means, runs, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, runs, strict=True)]
        axes.errorbar(points, means, (below, above), marker="o", capsize=3, label=label)
    trained = ROWS["hull-set"].trained
    axes.axvspan(min(trained), max(trained), color="0.92", zorder=0, label="trained")
    axes.set(
        xlabel="points", ylabel="hulls in exact order", ylim=(0, 1), xticks=ROWS["hull-set"].tested
    )
    axes.legend(fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
