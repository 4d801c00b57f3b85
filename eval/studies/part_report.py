"""What the study of Visual Part Utilization found: tables with intervals over photos, and a figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from xattn.eval.bootstrap import Interval, mean_interval, paired_difference, t_interval
from xattn.eval.functional import upsample
from xattn.eval.studies.part_scenarios import PartStudyConfig, Scenario
from xattn.photos.images import load_image
from xattn.pictures.overlay import overlay
from xattn.runtime.files import atomic_file

TESTS = {  # of the regular class: (share of web photos, share of them with text)
    "web": (1.0, 0.0),
    "web, half with text": (1.0, 0.5),
    "web with text": (1.0, 1.0),
    "crops": (0.0, 0.0),
}
Values = dict[str, NDArray[Any]]  # of test photos, see part_utilization.measure


def accuracy(correct: NDArray[np.float64], test: str) -> NDArray[np.float64]:
    """(n,): of each test photo, the expected accuracy on it as a macro and as a regular image."""
    near, with_text = TESTS[test]
    plain, text, macro, crop = correct.T
    web = (1 - with_text) * plain + with_text * text
    regular = web if near == 1 else near * web + (1 - near) * crop
    return (macro + regular) / 2


def columns(values: Values) -> dict[str, NDArray[np.float64]]:
    """Per photo, in percent, what the tables show."""
    shown = {test: accuracy(values["correct"], test) for test in TESTS}
    shown |= {"energy": values["energy"], "class energy": values["class_energy"]}
    return {name: 100 * column for name, column in shown.items()}


def summary(
    study: PartStudyConfig, scenarios: list[Scenario], results: dict[str, Values]
) -> dict[str, Any]:
    """Means, and paired differences with minus without VPU: intervals over photos given the heads, and
    by fold, so by head, with Student's t intervals."""
    table: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for scenario in scenarios:
        shown = columns(results[scenario.label])
        fold = results[scenario.label]["fold"]
        table[scenario.label] = {
            name: _interval(mean_interval(column)) | _by_fold(column, fold)
            for name, column in shown.items()
        }
        if scenario.p_conc == 1:
            continue
        without = columns(results[replace(scenario, p_conc=1.0).label])
        differences[scenario.label] = {
            name: _interval(paired_difference(column, without[name]))
            | _by_fold(column - without[name], fold)
            for name, column in shown.items()
        }
    area = 100 * float(np.mean(results[scenarios[0].label]["area"]))
    return {
        "study": json.loads(json.dumps(asdict(study))),
        "area": round(area, 3),
        "table": table,
        "differences": differences,
    }


def _by_fold(column: NDArray[np.float64], fold: NDArray[np.int64]) -> dict[str, Any]:
    means = [float(np.nanmean(column[fold == k])) for k in np.unique(fold)]
    _, lo, hi, _ = t_interval(means)
    return {"folds": [round(m, 3) for m in means], "fold_lo": round(lo, 3), "fold_hi": round(hi, 3)}


def _interval(value: Interval) -> dict[str, Any]:
    return {
        "mean": round(value.mean, 3),
        "lo": round(value.lo, 3),
        "hi": round(value.hi, 3),
        "n": value.n,
    }


def line(scenario: Scenario, fold: int, values: Values) -> str:
    shown = "  ".join(f"{name} {np.nanmean(v):.1f}" for name, v in columns(values).items())
    return f"p_conc {scenario.p_conc:.2f}  p_txt {scenario.p_txt:.2f}  fold {fold}: {shown}"


def report(
    study: PartStudyConfig, scenarios: list[Scenario], results: dict[str, Values]
) -> Iterator[str]:
    """The tables in Markdown."""
    found = summary(study, scenarios, results)
    names = list(columns(results[scenarios[0].label]))
    head = "| p_txt | p_conc | " + " | ".join(names) + " |"
    rule = "| --: | --: |" + " --: |" * len(names)
    yield head
    yield rule
    for scenario in scenarios:
        yield _row(scenario, [found["table"][scenario.label][n] for n in names], "")
    yield ""
    yield head
    yield rule
    for scenario in scenarios:
        if scenario.p_conc < 1:
            yield _row(scenario, [found["differences"][scenario.label][n] for n in names], "+")
    yield ""
    yield "| p_txt | p_conc | map | with - without VPU by fold | mean | 95 % t interval over folds |"
    yield "| --: | --: | :-- | --: | --: | --: |"
    for scenario in scenarios:
        if scenario.p_conc < 1:
            for name in ("energy", "class energy"):
                cell = found["differences"][scenario.label][name]
                by_fold = " ".join(f"{value:+.1f}" for value in cell["folds"])
                yield (
                    f"| {scenario.p_txt:.2f} | {scenario.p_conc:.2f} | {name} | {by_fold} | "
                    f"{cell['mean']:+.1f} | [{cell['fold_lo']:.1f}, {cell['fold_hi']:.1f}] |"
                )
    yield ""
    yield f"area of the text: {found['area']:.1f} % of the image"


def _row(scenario: Scenario, cells: list[dict[str, Any]], sign: str) -> str:
    shown = " | ".join(f"{c['mean']:{sign}.1f} [{c['lo']:.1f}, {c['hi']:.1f}]" for c in cells)
    return f"| {scenario.p_txt:.2f} | {scenario.p_conc:.2f} | {shown} |"


def figure(
    path: str | Path,
    scenarios: list[Scenario],
    results: dict[str, Values],
    macros: list[Path],
    count: int = 5,
) -> None:
    """The first macros of the test photos, with the attention of heads trained without and with VPU.

    Both are of p_txt = 0.5, or the middle one of the study; VPU with its smallest p_conc. A map is
    shown from 0 to its maximum.
    """
    shares = sorted({scenario.p_txt for scenario in scenarios})
    same = [s for s in scenarios if s.p_txt == shares[len(shares) // 2]]
    pair = [max(same, key=lambda s: s.p_conc), min(same, key=lambda s: s.p_conc)]
    side, gap = 168, 6
    sheet = Image.new("RGB", (count * (side + gap) - gap, 3 * (side + gap) - gap), "white")
    for column in range(count):
        chosen = results[pair[0].label]["photos"][column]
        macro = load_image(macros[chosen]).resize((side, side), Image.Resampling.BICUBIC)
        shown = [macro]
        for scenario in pair:
            attention = torch.from_numpy(results[scenario.label]["attention"][column])[None, None]
            map = upsample(attention, (side, side))[0, 0].numpy()
            shown.append(overlay(macro, map / map.max()))
        for row, image in enumerate(shown):
            sheet.paste(image, (column * (side + gap), row * (side + gap)))
    with atomic_file(path) as temporary:
        sheet.save(temporary, quality=82)
