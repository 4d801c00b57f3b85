"""Sanity of trained heads: do their maps depend on weights, photo and class, and follow the object?

    python -m xattn.eval.studies head-sanity PHOTOS --heads FOLDER --explainers gradcam cam \\
        --output runs/sanity

:mod:`~xattn.eval.studies.sanity_checks` says what is checked. Beside the heads and explainers stand two
rows that see no network: ``random`` and ``centre``. Photos are measured in blocks; what is finished of a
method, a check and a block lies in a file and is read, not computed again. So a killed run goes on, and
a new method or check needs none of the others again.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.eval.evaluation.facts import describe
from xattn.eval.evaluation.split import Split
from xattn.eval.sanity import Cascade
from xattn.eval.studies.fold_rows import names
from xattn.eval.studies.kept import finished_values
from xattn.eval.studies.sanity_checks import CHECKS, Block, Method, Settings
from xattn.eval.studies.sanity_report import UNSEEING, Found, report, verdicts, write_results
from xattn.eval.studies.study_backbone import study_backbone
from xattn.explainers import create_explainer
from xattn.heads import load_head
from xattn.photos.images import list_images, load_image
from xattn.photos.view import prepare
from xattn.runtime.files import file_sha256, write_json

DEFAULTS = Settings()
Values = dict[str, list[float | None]]  # of a block's photos, by measure


@dataclass(frozen=True)
class Tested:
    """A method with what its numbers depend on."""

    method: Method
    record: Mapping[str, Any]


def tested(
    label: str, name: str, backbone: Backbone, cascade: Cascade, head: Any = None, **options: Any
) -> Tested:
    """The explainer ``name`` of ``backbone``, and the same on the twins of ``cascade``."""
    explainer = create_explainer(
        name, backbone, head, cascade.seed, cascade.max_forward_batch, **options
    )
    stages = [block for block, _ in cascade.twins]
    method = Method(label, explainer.attribute, cascade.method(name, head, **options), stages)
    return Tested(method, {**describe(explainer), "stages": stages, "seed": cascade.seed})


def labelled(texts: Sequence[str], argument: str) -> dict[str, str]:
    """``LABEL=REST`` by label; without a label the text is the label, of a path its last part.

    Raises:
        ValueError: a label twice.
    """
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
    methods: Sequence[Tested],
    photos: Sequence[Path],
    folder: Path,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    settings: Settings = DEFAULTS,
    block: int = 16,
    progress: bool = True,
) -> dict[str, dict[str, Found]]:
    """Values (n,) of ``photos`` by method, check and measure; see :mod:`~xattn.eval.studies.sanity_checks`.

    Raises:
        ValueError: an unknown check, fewer than two photos a block, a photo that cannot be read, or results
            in ``folder`` of other settings, other photos, or another method of the same label.
    """
    unknown = sorted(set(checks) - set(CHECKS))
    if unknown or not checks:
        raise ValueError(f"checks: got {checks}; choose among {', '.join(CHECKS)}")
    if block < 2 or len(photos) < 2:
        raise ValueError(
            f"block: got {block}, and {len(photos)} photos; give at least 2 of each, to compare"
        )
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
        label: {check: _joined(found) for check, found in of_checks.items()}
        for label, of_checks in parts.items()
    }


def _prepared(backbone: Backbone, paths: Sequence[Path]) -> Block:
    pixels = [prepare(load_image(path), backbone.preprocessing)[0] for path in paths]
    return Block.of(backbone, torch.stack(pixels))


def _plain(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values]


def _joined(parts: Sequence[Mapping[str, Sequence[float | None]]]) -> Found:
    return {
        name: np.concatenate([np.array(part[name], dtype=np.float64) for part in parts])
        for name in parts[0]
    }


@dataclass(frozen=True, kw_only=True)
class HeadSanity:
    """Check trained heads and explainers."""

    data: tyro.conf.Positional[str]
    """Photos: a folder or a list file."""
    heads: tuple[str, ...] = ()
    """Trained heads: LABEL=FOLDER:option=value,... or a shipped one's name (xattn list) for the folder."""
    random_labels: tuple[str, ...] = ()
    """Heads trained on random labels, which each of the heads has to beat, see
    xattn.eval.studies.random_labels."""
    explainers: tuple[str, ...] = ("gradcam",)
    """Methods to compare with: LABEL=NAME:option=value,..."""
    output: Path = Path("runs/sanity")
    """A folder for each method, the table of all, and the report."""
    photos: int | None = None
    """Check only so many, drawn by the seed."""
    backbone: str = "tf_efficientnet_lite0"
    """A timm model name."""
    weights: str = "package"
    """See xattn train --help."""
    taps: tuple[str, ...] = ()
    """See xattn train --help."""
    checks: tuple[str, ...] = tuple(CHECKS)
    """Which of weights, photo, class and corners to make."""
    fills: tuple[str, ...] = DEFAULTS.fills
    """Canvases behind photos in a corner: mean, blur, black."""
    stages: int = 5
    """In how many steps the weights are randomised, the classifier first."""
    block: int = 16
    """Photos that are measured at a time and compared with each other."""
    seed: int = 0
    """Of the random weights and the order of the photos."""
    max_forward_batch: int = 16
    """Images a forward pass."""
    channels_last: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Memory format of the backbone; faster on CPUs for convolutional networks."""


def check_heads(args: HeadSanity, progress: bool = True) -> str:
    """Make the checks, write the results, and return the report.

    Raises:
        ValueError: as :func:`measure`; unknown heads, explainers or options.
    """
    backbone = study_backbone(args.backbone, args.weights, args.taps, args.channels_last)
    paths = list_images(args.data)
    random.Random(args.seed).shuffle(paths)  # neighbours in a folder often have one class
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
) -> list[Tested]:
    """The heads by label, then the explainers, then those that see no network."""
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
    """Do what is not finished yet, and give the report."""
    yield check_heads(args)
