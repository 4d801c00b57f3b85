"""Sanity checks of trained heads: do maps depend on weights, photo and class, and follow objects?

    python -m xattn.eval.studies head-sanity PHOTOS --heads FOLDER --explainers gradcam cam \\
        --output runs/sanity

:mod:`~xattn.eval.studies.sanity_checks` describes the checks. Besides the heads and explainers there are
two
rows that use no network: ``random`` and ``centre``. Photos are measured in blocks. Finished results
for a method, check and block are read from a file and not computed again, so a killed run resumes,
and a new method or check does not repeat the others.

The report gives a verdict for each check, means, and paired differences.

All intervals are 95 % bootstrap intervals over photos. A check is passed if the whole interval of
each of its values lies on the sound side of the bound; values that fail are named.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm.auto import tqdm

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.eval.evaluation.facts import describe
from xattn.eval.evaluation.results import MIN_IMAGES, SURVIVES, TOO_FEW
from xattn.eval.evaluation.split import Split
from xattn.eval.sanity import Cascade
from xattn.eval.studies.fold_rows import names
from xattn.eval.studies.run_files import finished_values, joined
from xattn.eval.studies.sanity_checks import (
    ALL_RANDOM,
    ANOTHER,
    CHECKS,
    FIDELITY,
    MEASURES,
    OTHER,
    OWN,
    SAME_CLASS,
    TWO_CLASSES,
    Block,
    Method,
    Settings,
)
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import create_explainer
from xattn.heads import load_head
from xattn.photos.images import list_images, load_image
from xattn.photos.view import prepare
from xattn.runtime.files import atomic_file, file_sha256, write_json, write_text

Found = dict[str, NDArray[np.float64]]  # (n,) by measure, NaN where a photo has no value
Table = Mapping[str, Mapping[str, Found]]  # by method and check
UNSEEING = ("random", "centre")
"""Explainers that see no network; every table has them."""
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
    """A mean is sound above ``value``, or below it if ``above`` is false.

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
    """The basis of a verdict: values (n,) by name, and the bound of their mean.

    ``chance`` holds the values of a method that uses no network in this check.
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
    """``"passed"``, the values that fail, or a note that there are too few photos for a verdict."""
    return _verdict(judged(check, found, chance))


def labels_verdict(found: Found, controls: Mapping[str, Found]) -> str:
    """Whether a head is more faithful than the ``controls``, which were trained on random labels.

    All values are from the check ``photo``.
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
    """The verdicts by method and check; the row ``centre``, if there is one, gives chance.

    ``heads`` have another verdict, ``labels``, if there are ``controls`` and their fidelity was measured.
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
        if not name.startswith(SAME_CLASS)  # depends only on the network, so it is the same for all
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
    """A mean and its interval, and the number of photos that have a value, if not all have one."""
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
                check: {
                    name: _plain_interval(mean_interval(values)) for name, values in found.items()
                }
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


def _plain_interval(interval: Interval) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v
        for k, v in interval._asdict().items()
    }


DEFAULTS = Settings()
Values = dict[str, list[float | None]]  # the values of a block's photos, by measure


@dataclass(frozen=True)
class TestedMethod:
    """A method, and the settings that its results depend on."""

    method: Method
    record: Mapping[str, Any]


def tested(
    label: str, name: str, backbone: Backbone, cascade: Cascade, head: Any = None, **options: Any
) -> TestedMethod:
    """The explainer ``name`` of ``backbone``, and the same explainer on the networks of ``cascade``."""
    explainer = create_explainer(
        name, backbone, head, cascade.seed, cascade.max_forward_batch, **options
    )
    stages = [block for block, _ in cascade.twins]
    method = Method(label, explainer.attribute, cascade.method(name, head, **options), stages)
    return TestedMethod(method, {**describe(explainer), "stages": stages, "seed": cascade.seed})


def labelled(texts: Sequence[str], argument: str) -> dict[str, str]:
    """``LABEL=REST`` by label; without one, the text itself or the last part of a path is the label."""
    found: dict[str, str] = {}
    for text in texts:
        label, equals, rest = text.partition("=")
        if not equals or ":" in label or "/" in label:
            label, rest = text.rstrip("/").rpartition("/")[2], text
        if label in found:
            raise ValueError(f"{argument}: got {label!r} twice; write LABEL=... before one of them")
        found[label] = rest
    return found


def measure(
    backbone: Backbone,
    methods: Sequence[TestedMethod],
    photos: Sequence[Path],
    folder: Path,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    settings: Settings = DEFAULTS,
    block: int = 16,
    progress: bool = True,
) -> dict[str, dict[str, Found]]:
    """Values (n,) of ``photos`` by method, check and measure; see the module sanity_checks."""
    parts: dict[str, dict[str, list[Values]]] = {
        one.method.label: {check: [] for check in checks} for one in methods
    }
    split = Split("head sanity")
    photos = split.score(photos)
    split.write(folder / "split.json")
    total = len(photos) * len(methods) * len(checks)
    with tqdm(total=total, disable=not progress, desc="check", unit="map") as bar:
        for number, start in enumerate(range(0, len(photos), block)):
            paths = photos[start : start + block]
            facts = {
                "backbone": [backbone.fingerprint, repr(backbone.preprocessing)],
                "settings": asdict(settings),
                "photos": dict(zip(names(paths), map(file_sha256, paths), strict=True)),
            }
            prepared: Block | None = None
            for one, check in itertools.product(methods, checks):
                file = folder / one.method.label / f"{check}-{number:03}.json"
                record = json.loads(json.dumps({"check": check, "method": one.record, **facts}))
                values = finished_values(file, record)
                if values is None:
                    prepared = prepared or _prepared(backbone, paths)
                    measured = CHECKS[check](backbone, one.method, prepared, settings)
                    values = {name: _plain(column.tolist()) for name, column in measured.items()}
                    write_json(file, {"record": record, "values": values})
                parts[one.method.label][check].append(values)
                bar.update(len(paths))
    return {
        label: {check: joined(found) for check, found in of_checks.items()}
        for label, of_checks in parts.items()
    }


def _prepared(backbone: Backbone, paths: Sequence[Path]) -> Block:
    pixels = [prepare(load_image(path), backbone.preprocessing)[0] for path in paths]
    return Block.of(backbone, torch.stack(pixels))


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


@dataclass(frozen=True, kw_only=True)
class HeadSanity:
    """Check trained heads and explainers."""

    data: tyro.conf.Positional[str]  # Photos: a folder or a list file.
    heads: tuple[str, ...] = ()
    """Trained heads: LABEL=FOLDER:option=value,..., or a shipped head's name (xattn list) as FOLDER."""
    random_labels: tuple[str, ...] = ()
    """Heads trained on random labels, which each of the heads has to beat, see
    xattn.eval.studies.random_labels."""
    explainers: tuple[str, ...] = ("gradcam",)
    """Methods to compare with: LABEL=NAME:option=value,..."""
    output: Path = Path("runs/sanity")
    """Folder for the results of each method, the table of all methods, and the report."""
    photos: int | None = None  # Check only this many, drawn by the seed.
    backbone: str = "tf_efficientnet_lite0"  # A timm model name.
    weights: str = "package"  # See xattn train --help.
    taps: tuple[str, ...] = ()  # See xattn train --help.
    checks: tuple[str, ...] = tuple(CHECKS)  # Which checks to run: weights, photo, class, corners.
    fills: tuple[str, ...] = DEFAULTS.fills
    """Canvases behind the photos in a corner: mean, blur, black."""
    stages: int = 5  # Steps in which weights are randomised, the classifier first.
    block: int = 16  # Photos that are measured together and compared with each other.
    seed: int = 0  # Seed of the random weights and the photos' order.
    max_forward_batch: int = 16  # Images per forward pass.
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs for convolutional networks."""


def check_heads(args: HeadSanity, progress: bool = True) -> str:
    """Run the checks, write the results, and return the report."""
    backbone = study_backbone(args.backbone, args.weights, args.taps, args.channels_last)
    paths = list_images(args.data)
    random.Random(args.seed).shuffle(paths)  # neighbours in a folder often have the same class
    paths = paths[: args.photos]
    heads = labelled(args.heads, "heads")
    controls = labelled(args.random_labels, "random_labels")
    settings = Settings(args.fills, max_forward_batch=args.max_forward_batch)
    table = measure(
        backbone, _methods(args, backbone, heads, controls), paths, args.output,
        checks=args.checks, settings=settings, block=args.block, progress=progress,
    )  # fmt: skip
    about = f"{len(paths)} photos, {backbone.name}, weights sha256 {backbone.fingerprint[:12]}."
    text = report(table, list(heads), about, list(controls))
    passed = verdicts(table, list(heads), list(controls))
    record = {"backbone": backbone.fingerprint, "stages": args.stages, "seed": args.seed}
    record |= asdict(settings)
    write_results(args.output, table, passed, names(paths), record, text)
    return text


def _methods(
    args: HeadSanity, backbone: Backbone, heads: Mapping[str, str], controls: Mapping[str, str]
) -> list[TestedMethod]:
    """The heads by label, then the explainers, then those that use no network."""
    others = {**labelled(args.explainers, "explainers"), **{name: name for name in UNSEEING}}
    labels = [*heads, *controls, *others]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"heads: got {', '.join(twice)} twice; write LABEL=... before one of them")
    cascade = Cascade(backbone, args.stages, args.seed, args.max_forward_batch)
    methods = []
    for label, text in {**heads, **controls}.items():
        source, options = parse_mechanism(text)
        head = load_head(source, backbone)
        methods.append(tested(label, "head", backbone, cascade, head, **options))
    for label, text in others.items():
        name, options = parse_mechanism(text)
        methods.append(tested(label, name, backbone, cascade, **options))
    return methods


def study(args: HeadSanity) -> Iterator[str]:
    """Run the checks that are not finished yet, and yield the report."""
    yield check_heads(args)
