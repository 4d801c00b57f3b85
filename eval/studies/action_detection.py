"""Class-semantic attention over time: actions in generated sequences, found with it and without.

    python -m xattn.eval.studies actions

Detectors that differ in one thing alone are trained on the same sequences: no attention, squeeze-and-
excitation, CSA on class evidence, evidence concatenated to the features, and concatenated with CSA. They
are tested on 200 other sequences by mean average precision at a tIoU of .5. Intervals resample the
sequences. Of CSA also its weights over time are measured: inside actions and outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.eval.bootstrap import Interval, mean_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.actions.detector import ActionStudyConfig, Detector, Kind, detect, train
from xattn.eval.studies.actions.precision import Matches, match, mean_average_precision
from xattn.eval.studies.actions.sequences import Sequences, draw_sequences, inside
from xattn.eval.studies.kept import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.options import OutputAt, Quick

DEFAULTS = ActionStudyConfig()
RESAMPLES = 1000
CONTROLS: dict[Kind, Kind] = {
    "squeeze-excitation": "none",
    "csa": "none",
    "concatenated": "none",
    "concatenated-csa": "concatenated",
}
AIMS: dict[Kind, str] = {
    "none": "at least .85",
    "csa": "within .02 of its control",
    "concatenated": "at least .90",
    "concatenated-csa": "within .02 of its control",
}


def study(
    output: OutputAt = "runs/study-actions",
    config: ActionStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md, and give its lines.

    Raises:
        ValueError: ``output`` holds results of other settings, or a damaged file.
    """
    config = config.quick() if quick else config
    output = Path(output)
    learned, tested = (
        draw_sequences(count, config.length, config.classes, 2 * config.data_seed + part)
        for part, count in enumerate((config.train, config.tests))
    )
    rows: dict[str, Callable[[Split, int], dict[str, Any]]] = {
        kind: partial(measure, kind, learned, tested, config) for kind in get_args(Kind)
    }
    settings = {key: value for key, value in asdict(config).items() if key != "seeds"}
    found = measure_rows(output, settings, rows, config.seeds)
    yield from reported(output, [*_report(found, config)], {"values": raw_rows(found)})


def measure(
    kind: Kind,
    learned: Sequences,
    tested: Sequences,
    config: ActionStudyConfig,
    split: Split,
    seed: int,
) -> dict[str, Any]:
    """Train a detector, and test it: its ``matches`` as lists, and where it has them the means of its
    weights over time, ``inside`` and ``outside`` of the actions of each sequence."""
    detector, seconds = train(kind, split.fit(learned), config, seed)
    tested = split.score(tested)
    matches = match(detect(detector, tested), tested.actions, config.classes)
    parameters = sum(p.numel() for p in detector.parameters())
    found: dict[str, Any] = {"seconds": seconds, "parameters": parameters}
    weights = _weights(detector, tested)
    if weights is not None:
        within = inside(tested.actions, config.length)
        for name, share in (("inside", within), ("outside", 1 - within)):
            found[name] = ((weights * share).sum(1) / share.sum(1)).tolist()
    return {**found, "matches": [column.tolist() for column in matches]}


@torch.no_grad()
def _weights(detector: Detector, tested: Sequences) -> torch.Tensor | None:
    """The weights over time (n, T) that evidence gives, or None."""
    if detector.attention is None or detector.attention.places is None:
        return None
    places = detector.attention.scores(tested.evidence)[1]
    assert places is not None
    return places[:, 0].sigmoid()


def resampled(runs: list[dict[str, Any]], count: int = RESAMPLES) -> NDArray[np.float64]:
    """Mean average precision, mean over the seeds, of the sequences as they are and of ``count``
    resamples, the same for every row: (1 + count,)."""
    matches = [_matches(run) for run in runs]
    n = len(matches[0].there)
    rng = np.random.default_rng(0)
    times = [np.ones(n), *(np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(count))]
    return np.array(
        [np.mean([mean_average_precision(m, weights) for m in matches]) for weights in times]
    )


def _matches(run: dict[str, Any]) -> Matches:
    sequence, kind, right, there = run["matches"]
    return Matches(
        np.array(sequence, np.int64), np.array(kind, np.int64), np.array(right, bool),
        np.array(there, np.int64),
    )  # fmt: skip


def _interval(values: NDArray[np.float64]) -> Interval:
    lo, hi = np.nanquantile(values[1:], (0.025, 0.975))
    return Interval(float(values[0]), float(lo), float(hi), len(values) - 1)


def _report(found: Found, config: ActionStudyConfig) -> Iterator[str]:
    yield (
        f"{config.train} sequences of {config.length} frames to train on, {config.tests} to test, "
        f"{config.classes} classes; {config.steps} steps, {config.seeds} seeds"
    )
    yield "\n| detector | mAP at tIoU .5 | by seed | less its control | aim | parameters | seconds |"
    yield "| :-- | --: | --: | --: | :-- | --: | --: |"
    values = {kind: resampled(found[kind]) for kind in get_args(Kind)}
    for kind in get_args(Kind):
        own = _interval(values[kind])
        seeds = [mean_average_precision(_matches(run)) for run in found[kind]]
        less = ""
        if kind in CONTROLS:
            gap = _interval(values[kind] - values[CONTROLS[kind]])
            less = f"{gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}]"
        yield (
            f"| {kind} | {own.text(3)} | {spread(seeds)} | {less} | "
            f"{AIMS.get(kind, '')} | {found[kind][0]['parameters']:,} | "
            f"{spread([run['seconds'] for run in found[kind]], 1)} |"
        )
    yield "\n| weights over time | inside actions | outside | inside less outside |"
    yield "| :-- | --: | --: | --: |"
    for kind in ("csa", "concatenated-csa"):
        means = {
            name: np.mean([run[name] for run in found[kind]], 0) for name in ("inside", "outside")
        }
        gap = mean_interval(means["inside"] - means["outside"])
        cells = " | ".join(f"{np.nanmean(mean):.3f}" for mean in means.values())
        yield f"| {kind} | {cells} | {gap.mean:+.3f} [{gap.lo:+.3f}, {gap.hi:+.3f}] |"
