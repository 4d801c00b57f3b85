"""Pointer networks on hulls, shortest tours and triangles, beside an encoder that reads points by index.

    python -m xattn.eval.studies pointer

The networks and their tests are those of :mod:`~xattn.eval.studies.pointer_points`. What is finished stays
in the output folder; the same command goes on there. With photos the command is another study, see
:mod:`~xattn.eval.studies.cell_orders`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from xattn.eval.studies.kept import Found, measure_rows, raw_rows, reported, spread
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.pointer_points import ROWS, PointStudyConfig, measure
from xattn.runtime.files import atomic_file

DEFAULTS = PointStudyConfig()
AIMS = {5: "at least .90", 7: "at least .88", 10: "at least .83", 15: "at least .55"}
EARLIER = {5: ".68", 7: ".58", 10: ".47", 15: ".23"}
TOUR_AIMS = {5: "at most 1.02", 10: "at most 1.08"}


def study(
    output: OutputAt = "runs/study-pointer",
    config: PointStudyConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Train and test what is not finished yet, write report.md and a plot, and give the report's lines.

    Raises:
        ValueError: ``output`` holds results of other settings.
    """
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
    yield "| hull | points | exact order | aim | failed | area of the others | aim |"
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
    yield f"\n| tour over the shortest | points | greedy | beam {config.beam} | aim | nearest | 2-opt |"
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
    """Exact orders of hulls over the number of points; bars from the worst seed to the best."""
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
