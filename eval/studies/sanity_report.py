"""What the sanity checks of heads found: a verdict for each, means, and paired differences.

All intervals are 95 % bootstrap intervals over photos. A check is passed where the whole interval of each
of its values lies on the sound side of the bound; values for which it does not are named.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.eval.results import MIN_IMAGES, SURVIVES, TOO_FEW
from xattn.eval.studies.corner_canvases import MEASURES
from xattn.eval.studies.sanity_checks import (
    ALL_RANDOM,
    ANOTHER,
    FIDELITY,
    OTHER,
    OWN,
    SAME_CLASS,
    TWO_CLASSES,
)
from xattn.runtime.files import atomic_file, write_json, write_text

Found = dict[str, NDArray[np.float64]]  # (n,) by measure, NaN where a photo has no value
Table = Mapping[str, Mapping[str, Found]]  # by method and check
UNSEEING = ("random", "centre")
"""Explainers that see no network; they stand in every table."""
LABELS = "labels"
ROUNDING = 1e-6
ABOUT = {
    "weights": "rank correlation with the map of a network with random weights, from the top down; "
    f"`{ANOTHER}` is what chance gives. Passed: below {SURVIVES:g} once all weights are random.",
    "photo": "the map that the method makes of another photo, asked for the same class: its rank "
    "correlation with the own map, and the fidelity of both here. Passed: the own map is better in all "
    "metrics, and the other in none better than `centre`, which sees no network.",
    "class": "rank correlation of the maps of the two most probable classes. Passed: below 1.",
    "corners": "the photo at half its size in each corner of a canvas, where it keeps its class: the share "
    "of the map's positive mass, of its top quarter and of its maximum that lies on the photo (1/4 if the "
    "map does not follow), and the place of its centre of mass (0 the canvas's centre, 1 the photo's). "
    "Passed: above 1/4 and 0. A mask is positive everywhere: only its top quarter and its maximum compare "
    "with those of a signed map.",
}


class Bound(NamedTuple):
    """A mean is sound above ``value``, or below it where ``above`` is false.

    With ``shown`` its whole interval has to lie there; without, it must not lie wholly on the other side.
    """

    value: float
    above: bool
    shown: bool = True

    def holds(self, interval: Interval) -> bool:
        low, high = interval.lo - self.value, interval.hi - self.value
        if not self.above:
            low, high = -high, -low
        return low > ROUNDING if self.shown else high >= -ROUNDING


def judged(
    check: str, found: Found, chance: Found | None = None
) -> dict[str, tuple[NDArray[np.float64], Bound]]:
    """What a verdict looks at: values (n,) by name, and the bound of their mean.

    ``chance`` is what a method that sees no network has in this check.
    """
    if check == "weights":
        return {ALL_RANDOM: (found[ALL_RANDOM], Bound(SURVIVES, False))}
    if check == "class":
        return {TWO_CLASSES: (found[TWO_CLASSES], Bound(1.0, False))}
    if check == "corners":
        return {
            name: (values, Bound(MEASURES[name.partition(",")[0]], True))
            for name, values in found.items()
            if not name.startswith(SAME_CLASS)
        }
    values = {
        metric: (found[f"{metric}, {OWN}"] - found[f"{metric}, {OTHER}"], Bound(0.0, higher))
        for metric, higher in FIDELITY.items()
    }
    if chance is None:
        return values
    for metric, higher in FIDELITY.items():
        gain = found[f"{metric}, {OTHER}"] - chance[f"{metric}, {OWN}"]
        values[f"{metric} of {ANOTHER}"] = (gain, Bound(0.0, not higher, shown=False))
    return values


def verdict(check: str, found: Found, chance: Found | None = None) -> str:
    """``"passed"``, what does not hold, or that there are too few photos to tell."""
    return _verdict(judged(check, found, chance))


def labels_verdict(found: Found, controls: Mapping[str, Found]) -> str:
    """Whether a head is more faithful than the ``controls``, which were trained on random labels.

    All are what the check ``photo`` measured.
    """
    return _verdict(
        {
            f"{metric}, {name}": (
                found[f"{metric}, {OWN}"] - control[f"{metric}, {OWN}"],
                Bound(0.0, higher),
            )
            for name, control in controls.items()
            for metric, higher in FIDELITY.items()
        }
    )


def _verdict(values: Mapping[str, tuple[NDArray[np.float64], Bound]]) -> str:
    intervals = {name: (mean_interval(column), bound) for name, (column, bound) in values.items()}
    if any(interval.n < MIN_IMAGES for interval, _ in intervals.values()):
        return TOO_FEW
    failed = [name for name, (interval, bound) in intervals.items() if not bound.holds(interval)]
    return f"not shown: {'; '.join(failed)}" if failed else "passed"


def verdicts(
    table: Table, heads: Sequence[str] = (), controls: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """The verdict by method and check; chance is the row ``centre``, where there is one.

    ``heads`` have one more, ``labels``, where there are ``controls`` and their fidelity was measured.
    """
    found = {
        method: {
            check: verdict(check, values, table.get("centre", {}).get(check))
            for check, values in checks.items()
        }
        for method, checks in table.items()
    }
    if controls and all("photo" in table[name] for name in (*heads, *controls)):
        random = {name: table[name]["photo"] for name in controls}
        for head in heads:
            found[head][LABELS] = labels_verdict(table[head]["photo"], random)
    return found


def report(table: Table, heads: Sequence[str], about: str, controls: Sequence[str] = ()) -> str:
    """The whole report in Markdown: verdicts, means by check, and paired differences of the ``heads``.

    ``controls`` are heads that were trained on random labels.
    """
    methods, passed = list(table), verdicts(table, heads, controls)
    checks = list(table[methods[0]])
    shown = list(dict.fromkeys(check for of_method in passed.values() for check in of_method))
    cells = {check: [passed[m].get(check, "-") for m in methods] for check in shown}
    parts = [about, _rows("check", methods, cells)]
    for check in checks:
        names = list(table[methods[0]][check])
        means = {n: [_mean(table[m][check][n]) for m in methods] for n in names}
        parts += [f"**{check}**: {ABOUT[check]}", _rows(check, methods, means)]
    if "photo" in checks:
        parts += [f"**{ANOTHER}**, minus a row that sees no network, paired:", _chance(table)]
    if LABELS in shown:
        parts.append(
            f"**{LABELS}**: passed where the head is more faithful in all metrics than each of "
            f"{', '.join(controls)}, trained on random labels."
        )
    for head in heads:
        others = [m for m in methods if m != head]
        parts += [
            f"**{head}**, minus another method, paired:",
            _rows("measure", others, _differences(table, head, others)),
        ]
    return "\n\n".join(parts) + "\n"


def _chance(table: Table) -> str:
    methods = [m for m in table if m not in UNSEEING]
    return _rows(
        "photo",
        methods,
        {
            f"{metric}, minus {row}": [
                _difference(
                    table[m]["photo"][f"{metric}, {OTHER}"], table[row]["photo"][f"{metric}, {OWN}"]
                )
                for m in methods
            ]
            for metric in FIDELITY
            for row in UNSEEING
            if row in table
        },
    )


def _differences(table: Table, head: str, others: Sequence[str]) -> dict[str, list[str]]:
    return {
        f"{check}: {name}": [_difference(values, table[m][check][name]) for m in others]
        for check, found in table[head].items()
        for name, values in found.items()
        if not name.startswith(SAME_CLASS)  # the network's, and so the same for all
    }


def _rows(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", f"| :-- |{' :-- |' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def _mean(values: NDArray[np.float64]) -> str:
    return _cell(mean_interval(values), len(values))


def _difference(values: NDArray[np.float64], others: NDArray[np.float64]) -> str:
    return _cell(paired_difference(values, others), len(values), "+")


def _cell(interval: Interval, photos: int, sign: str = "") -> str:
    """A mean and its interval, with the number of photos that have a value where it is not all."""
    if not interval.n:
        return "-"
    mean, lo, hi = (f"{value:{sign}.3f}" for value in interval[:3])
    return f"{mean} [{lo}, {hi}]" + (f" n={interval.n}" if interval.n < photos else "")


def write_results(
    folder: Path,
    table: Table,
    passed: Mapping[str, Mapping[str, str]],
    photos: Sequence[str],
    settings: Mapping[str, Any],
    text: str,
) -> None:
    """Write ``results.json`` (settings, means with intervals, verdicts), ``values.csv`` (a row for each
    photo and measure) and ``report.md``."""
    summary = {
        method: {
            "verdicts": passed[method],
            "values": {
                check: {name: _plain(mean_interval(values)) for name, values in found.items()}
                for check, found in checks.items()
            },
        }
        for method, checks in table.items()
    }
    write_json(
        folder / "results.json", {"settings": settings, "photos": len(photos), "methods": summary}
    )
    with atomic_file(folder / "values.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["method", "check", "measure", "photo", "value"])
        for method, checks in table.items():
            for check, found in checks.items():
                for name, values in found.items():
                    rows = zip(photos, values.tolist(), strict=True)
                    writer.writerows(
                        [method, check, name, photo, "" if math.isnan(v) else repr(v)]
                        for photo, v in rows
                    )
    write_text(folder / "report.md", text)


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v
        for k, v in interval._asdict().items()
    }
