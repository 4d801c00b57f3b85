"""Compares relevance methods on a network: which is the most faithful, and what each rule adds.

    python -m xattn.eval.studies relevance PHOTOS -b vit_tiny_patch16_224 --weights FILE

Photos at even positions of the sorted list serve to choose the gammas of one row by SRG; photos at
odd positions are scored, in a random order. A row is an explainer with options, LibraGrad's
FullGrad+ with one kind of rule switched off, or the mean of an explainer's maps of four shifted
copies of a photo.

SRG, the symmetric relevance gain (Bluecher et al., arXiv 2401.06654), compares two areas under the
class's logit while squares are removed: least relevant first minus most relevant first. Removed
squares take the data set's mean colour. Deletion, insertion and ROAD read probabilities, as on
other pages. Finished results are loaded, for each part of the photos and each row.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone
from xattn.cli.heads import default_head
from xattn.eval.bootstrap import mean_interval, paired_difference
from xattn.eval.evaluation.results import Results
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.base import Column, Finish, MetricInfo, PerturbationMetric, Request, Sample
from xattn.eval.metrics.curves import InsertionDeletionMetric, auc, is_constant, removals
from xattn.eval.metrics.flipping import grid, rank_regions, with_clean
from xattn.eval.metrics.registry import create_metric
from xattn.eval.studies.fold_rows import DONE, score_explainer, with_compiled_passes
from xattn.eval.studies.options import Network, OutputAt, PhotosAt
from xattn.eval.studies.run_files import AGAIN, kept_values, reported
from xattn.explainers import Explainer, create_explainer
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.libragrad import LibraGrad
from xattn.explainers.relevance.rules import Composite, own_gradient
from xattn.explaining.photos import explain
from xattn.heads import load_head
from xattn.photos.image_names import photo_ids
from xattn.photos.images import list_images
from xattn.pictures.contact_sheet import contact_sheet_image
from xattn.runtime import strict_json
from xattn.runtime.files import check_folder
from xattn.runtime.tables import markdown

Off = Literal["none", "all", "attention", "LayerNorm", "activation", "biases"]
RULES_OFF: Mapping[Off, str] = {
    "attention": "scaled_dot_product_attention softmax matmul bmm",
    "LayerNorm": "layer_norm",
    "activation": "gelu relu relu6 silu hardswish hardtanh",
}
SHIFTS = ((0, 0), (0, 8), (8, 0), (8, 8))  # pixels down and to the right, half a patch
SECONDS, MANY_PASSES = "seconds.json", ("caap", "mda")
BATCH, PART = 16, 32  # photos explained at a time, and photos per part of the results
SHOWN = {"SRG": 2, "deletion": 3, "insertion": 3, "ROAD": 3}  # decimals
LOWER = ("deletion",)  # where lower is better
COLUMNS = ("SRG", "MoRF", "LeRF", "deletion", "insertion", "ROAD")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: of the explainer; "evidence" is the head that ships for the network.
        options: of the explainer.
        off: the rules of LibraGrad's FullGrad+ to switch off.
        shifts: whether to average over four shifted copies of a photo.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    off: Off = "none"
    shifts: bool = False

    def make(self, backbone: Backbone) -> Explainer:
        """The row's explainer for a network."""
        made: Explainer
        if self.off != "none":
            made = Without(backbone, off=self.off, max_forward_batch=BATCH)
        elif self.name == "evidence":
            head = load_head(str(default_head(backbone)), backbone)
            made = create_explainer("head", backbone, head)
        else:
            options = {"max_forward_batch": BATCH, **self.options}
            made = create_explainer(self.name, backbone, **options)
        return Shifted(backbone, of=made, max_forward_batch=BATCH) if self.shifts else made


TOKENS = {"at": "tokens"}
VIT_GAMMA = {**TOKENS, "gamma": 0.25, "linear_gamma": 0.05}
SHARES = {"base": "input_x_gradient"}
ROWS: Mapping[str, Mapping[str, Row]] = {
    "vit": {
        "random": Row("random"),
        "centre": Row("centre"),
        "input x gradient": Row("input_x_gradient"),
        "FullGrad+, LibraGrad": Row("libragrad"),
        "FullGrad+, no rules": Row("libragrad", off="all"),
        "FullGrad+, no attention rule": Row("libragrad", off="attention"),
        "FullGrad+, no LayerNorm rule": Row("libragrad", off="LayerNorm"),
        "FullGrad+, no activation rule": Row("libragrad", off="activation"),
        "FullGrad+, no biases": Row("libragrad", off="biases"),
        "zero, constant": Row("libragrad", SHARES),
        "zero, shared (AttnLRP)": Row("attn_lrp"),
        "residual 0.1, shared": Row("attn_lrp", {"residual": 0.1}),
        "residual 0.25, shared": Row("attn_lrp", {"residual": 0.25}),
        "residual 0.5, shared": Row("attn_lrp", {"residual": 0.5}),
        "residual 1, shared (ResLRP)": Row("attn_lrp", {"residual": 1.0}),
        "residual 1, constant": Row("lrp", {**TOKENS, "gamma": 0.0, "residual": 1.0}),
        "gamma, constant (vit)": Row("lrp", VIT_GAMMA),
        "gamma, shared": Row("lrp", {**VIT_GAMMA, "attention": "shared"}),
        "gamma, residual 1, constant": Row("lrp", {**VIT_GAMMA, "residual": 1.0}),
        "four shifts of FullGrad+": Row("libragrad", shifts=True),
        "four shifts of zero": Row("libragrad", SHARES, shifts=True),
        "four shifts of ResLRP": Row("attn_lrp", {"residual": 1.0}, shifts=True),
        "four shifts of gamma": Row("lrp", VIT_GAMMA, shifts=True),
        "generic_relevance": Row("generic_relevance"),
        "cam": Row("cam"),
        "gradcam": Row("gradcam"),
        "legrad": Row("legrad"),
        "gradient of tokens": Row("lrp", {**TOKENS, "composite": "gradient"}),
        "FullGrad, LibraGrad": Row("libragrad", {"base": "fullgrad"}),
        "gamma, at pixels": Row("lrp", {"composite": "vit"}),
        "dave, 16 copies": Row("dave", {"copies": 16}),
        "caap": Row("caap"),
        "mda": Row("mda", {"candidates": BATCH, "prior": "libragrad"}),
    },
    "cnn": {
        "random": Row("random"),
        "centre": Row("centre"),
        "input x gradient": Row("input_x_gradient"),
        "zero": Row("libragrad", {**SHARES, "at": "pixels"}),
        "gamma 0.25": Row("lrp"),
        "gamma 1": Row("lrp", {"gamma": 1.0}),
        "gamma_box": Row("lrp", {"composite": "gamma_box"}),
        "plus": Row("lrp", {"composite": "plus"}),
        "plus_flat": Row("lrp", {"composite": "plus_flat"}),
        "alpha_beta": Row("lrp", {"composite": "alpha_beta"}),
        "alpha_beta_flat": Row("lrp", {"composite": "alpha_beta_flat"}),
        "residual 0.25": Row("lrp", {"gamma": 0.0, "residual": 0.25}),
        "residual 1": Row("lrp", {"gamma": 0.0, "residual": 1.0}),
        "gamma 0.25, residual 1": Row("lrp", {"residual": 1.0}),
        "four shifts of input x gradient": Row("input_x_gradient", shifts=True),
        "four shifts of gamma 0.25": Row("lrp", shifts=True),
        "gradcam": Row("gradcam"),
        "cam": Row("cam"),
        "evidence": Row("evidence"),
        "fullgrad": Row("fullgrad"),
        "gamma 0.25, at blocks.4": Row("lrp", {"at": "blocks.4"}),
        "zero, at blocks.4": Row("lrp", {"at": "blocks.4", "composite": "libragrad"}),
        "dave, 16 copies": Row("dave", {"copies": 16}),
        "mda": Row("mda", {"candidates": BATCH}),
    },
}
CHOOSING: Mapping[str, Mapping[str, Sequence[float]]] = {
    "vit": {"gamma": (0.25,), "linear_gamma": (0.0, 0.05, 0.25, 1.0), "residual": (0.0, 1.0)},
    "cnn": {"gamma": (0.1, 0.25, 1.0, 4.0), "residual": (0.0, 1.0)},
}
"""Values of the options of ``lrp``; the photos at even positions choose those of one row."""
CHOSEN = "gammas chosen"
REFERENCE = {"vit": "FullGrad+, LibraGrad", "cnn": "input x gradient"}
PLUS, RES, ZERO = "FullGrad+, LibraGrad", "residual 1, shared (ResLRP)", "zero, constant"
CLAIMS: Mapping[str, tuple[tuple[str, str, Sequence[str]], ...]] = {
    "vit": (
        ("a", PLUS, [label for label in ROWS["vit"] if label.startswith("FullGrad+, no")]),
        (
            "b",
            "zero, shared (AttnLRP)",
            [*(f"residual {g}, shared" for g in (0.1, 0.25, 0.5)), RES],
        ),
        ("b", RES, ["residual 0.25, shared"]),
        ("c", PLUS, ["four shifts of FullGrad+"]),
        ("c", ZERO, ["four shifts of zero"]),
        ("c", RES, ["four shifts of ResLRP"]),
        ("c", "gamma, constant (vit)", ["four shifts of gamma"]),
        ("d", "zero, shared (AttnLRP)", [ZERO]),
        ("d", RES, ["residual 1, constant"]),
        ("d", "gamma, shared", ["gamma, constant (vit)"]),
    ),
    "cnn": (
        ("b", "zero", ["residual 0.25", "residual 1"]),
        ("c", "input x gradient", ["four shifts of input x gradient"]),
        ("c", "gamma 0.25", ["four shifts of gamma 0.25"]),
        ("e", "input x gradient", ["zero", "gamma 0.25", "gamma 1", "gamma_box", "alpha_beta"]),
        ("e", "gradcam", ["gamma 0.25", "plus_flat", "input x gradient"]),
    ),
}
"""Each claim: its name, the row that others are compared with, and the others."""


@dataclass(kw_only=True, eq=False, repr=False)
class Without(LibraGrad):
    """LibraGrad's FullGrad+ without the rules in ``off``: these functions keep their gradient."""

    off: Off = "none"

    @property
    def _composite(self) -> Composite:
        if self.off == "all":
            return Composite(plain=True)
        names = RULES_OFF.get(self.off, "").split()
        return Composite(rules=tuple((name, own_gradient) for name in names))

    def _engine(self, **options: Any) -> Engine:
        keep = options.pop("keep", False) and self.off != "biases"
        return Engine(self._composite, keep=keep, **options)


@dataclass(kw_only=True, eq=False, repr=False)
class Shifted(Explainer):
    """The mean (B, 1, H, W) of the maps that ``of`` makes for shifted copies of a photo.

    The copies wrap around at the border, and each map is shifted back.
    """

    name = "shifted"
    forwards = len(SHIFTS)
    of: Explainer

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros_like(images[:, :1])
        for shift in SHIFTS:
            maps = self.of.attribute(images.roll(shift, (2, 3)), target)
            maps = F.interpolate(maps, images.shape[2:], mode="nearest")
            total += maps.roll([-pixels for pixels in shift], (2, 3))
        return total / len(SHIFTS)


@dataclass(frozen=True)
class SymmetricGain(PerturbationMetric):
    """SRG and its two areas under the score while squares are removed.

    Args:
        mean: (3,), the data set's mean colour, which replaces the squares.
        patch: side of a square in pixels.
        steps: number of steps in each order.
    """

    mean: tuple[float, ...]
    patch: int = 16
    steps: int = 14
    info = {  # noqa: RUF012
        "SRG": MetricInfo("area, least relevant first, minus area, most relevant first", True),
        "LeRF": MetricInfo("area under the score, least relevant squares first", True),
        "MoRF": MetricInfo("area under the score, most relevant squares first", False),
    }

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        if is_constant(sample.raw):
            return lambda scores: dict.fromkeys(self.columns, float("nan"))
        height, width = sample.raw.shape[-2:]
        regions = rank_regions(grid(height, width, self.patch), sample.raw)
        each = -(-len(regions) // self.steps)
        for key, order in (("MoRF", regions), ("LeRF", regions[::-1])):
            groups = [torch.cat(order[i : i + each]) for i in range(0, len(order), each)]
            for i, image in enumerate(removals(sample.image, groups, "mean", mean=self.mean), 1):
                yield Request(key, image, shared=i == len(groups))

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            area = {k: float(auc(with_clean(sample.score, s))) for k, s in scores.items()}
            area["SRG"] = area["LeRF"] - area["MoRF"]
            return {column: area[column.metric] for column in self.columns}

        return finish


# ---------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class RelevanceStudy:
    """Numbers of photos, the rows and metrics, and how passes are run."""

    photos: int = 32  # Photos to score, at odd positions.
    choosing: int = 16  # Photos to choose the gammas of one row on, at even positions.
    few: int = 16  # Photos for dave and caap, which are expensive.
    bound: int = 5  # Photos for the bound mda, which is the most expensive.
    rows: tuple[str, ...] = ()  # Labels of the rows; by default, all that fit the network.
    steps: int = 14  # Steps of SRG, insertion and deletion.
    road: tuple[float, ...] = (0.2, 0.5)  # Levels of ROAD, whose imputation takes most of the time.
    precision: Literal["float32", "bfloat16"] = "float32"  # Precision of the scoring passes.
    compiled: bool = False  # Compile the scoring passes.
    srg: bool = False  # Measure only SRG, at a third of the cost; load other finished metrics.
    pictures: tuple[Path, ...] = ()  # Only draw the maps of these photos; measure nothing.


DEFAULTS = RelevanceStudy()
Values = dict[str, NDArray[Any]]  # a value per photo, by column; "photo" has the names


def timed(explainer: Explainer, precision: str) -> tuple[Explainer, dict[str, float]]:
    """``explainer``, made to compute each batch's maps once, and its costs: CPU seconds, maps."""
    made: dict[str, Tensor] = {}
    attribute, cost = explainer.attribute, {"seconds": 0.0, "maps": 0.0}

    def once(images: Tensor, target: Tensor) -> Tensor:
        pixels = images.contiguous().numpy().tobytes() + target.numpy().tobytes()
        key = hashlib.sha256(pixels).hexdigest()
        if key not in made:
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                made[key] = attribute(images, target)
            cost["seconds"] += time.process_time() - start
            cost["maps"] += len(images)
        return made[key]

    vars(explainer)["attribute"] = once
    return explainer, cost


class Measuring:
    """Scores rows on photos with ``backbone``, and explains a copy without compiled passes."""

    def __init__(self, backbone: Backbone, output: Path, config: RelevanceStudy) -> None:
        self.output, self.config = output, config
        backbone.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.scored, self.explained = copy.copy(backbone), backbone
        if config.compiled:
            with_compiled_passes(self.scored, config.precision)
        mean = tuple(float(v) for v in backbone.preprocessing.mean)
        black_and_blur = InsertionDeletionMetric(steps=config.steps, mean=mean)
        road = create_metric("road", levels=config.road)
        self.metrics: Mapping[str, Sequence[str | PerturbationMetric]] = {
            "logit": [SymmetricGain(mean, steps=config.steps)],
            "probability": [black_and_blur, road],
        }

    def row(
        self, row: Row, label: str, photos: Sequence[Path], folder: Path, split: Split,
        kinds: Sequence[str] = ("logit", "probability"),
    ) -> Values:  # fmt: skip
        """The values of ``photos`` by column, loaded from ``folder`` or measured now."""
        record = {"row": str(row), "compiled": self.config.compiled}
        made: list[tuple[Explainer, dict[str, float]]] = []

        def make() -> Explainer:
            many = row.name in MANY_PASSES  # as expensive as scoring, and done the same way
            network = self.scored if row.name == "mda" else self.explained
            precision = self.config.precision if many else "float32"
            made[:] = made or [timed(row.make(network), precision)]
            return made[0][0]

        values: Values = {}
        for kind in kinds:
            if self.config.srg and kind != "logit" and not (folder / kind / DONE).is_file():
                continue
            results = score_explainer(
                self.scored, label, make, record, photos, folder / kind, split,
                metrics=self.metrics[kind], precision=self.config.precision,
                max_forward_batch=BATCH, progress=False, logits=kind == "logit",
            )  # fmt: skip
            values |= values_of(results, label)
        kept_values(folder / SECONDS, lambda: made[0][1] if made else {})
        gap = np.full(len(photos), np.nan)
        return {key: gap for key in COLUMNS} | values

    def chosen(self, kind: str, photos: Sequence[Path], split: Split) -> tuple[Row, list[str]]:
        """``lrp`` with the options of the highest SRG on ``photos``, and lines with all SRGs."""
        folder, found = self.output / "choosing", {}
        split.choose(photos)
        names, values = CHOOSING[kind], CHOOSING[kind].values()
        for numbers in itertools.product(*values):
            options = (TOKENS if kind == "vit" else {}) | dict(zip(names, numbers, strict=True))
            row, label = Row("lrp", options), ", ".join(f"{k} {v}" for k, v in options.items())
            apart = Split("relevance, choosing")
            scores = self.row(row, label, photos, folder / label, apart, ["logit"])
            found[label] = (float(np.nanmean(scores["SRG"])), row)
        srg = [[label, f"{value:.2f}"] for label, (value, _) in found.items()]
        lines = list(markdown(["options of lrp", "SRG"], srg))
        return max(found.values(), key=lambda pair: pair[0])[1], lines


def values_of(results: Results, label: str) -> Values:
    found: Values = {c.key: v for c, v in results.methods[label].values.items()}
    return found | {"photo": np.array([image.id for image in results.images])}


def joined(parts: Sequence[Values], count: int) -> Values:
    """The values of all parts in one; NaN for photos that were not scored."""
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    found["photo"] = found["photo"].astype(object)
    gap = count - len(found["photo"])
    return {key: np.concatenate([v, np.full(gap, np.nan, v.dtype)]) for key, v in found.items()}


# ---------------------------------------------------------------------- the report


def means_table(table: Mapping[str, Values], costs: Mapping[str, str]) -> Iterator[str]:
    """Lines of the table of means with 95 % intervals."""
    rows = []
    for label, values in table.items():
        found = {key: mean_interval(values[key]) for key in SHOWN}
        cells = [found[key].text(digits) if found[key].n else "-" for key, digits in SHOWN.items()]
        rows.append([label, *cells, str(found["SRG"].n), costs[label]])
    arrows = [f"{key} {'↓' if key in LOWER else '↑'}" for key in SHOWN]
    return markdown(["method", *arrows, "photos", "CPU s a map"], rows, 6)


Pairs = Sequence[tuple[str, str, str]]  # what a comparison is about, and its rows


def differences_table(table: Mapping[str, Values], pairs: Pairs) -> Iterator[str]:
    """Lines of the table of paired differences: the second row of each pair minus the first."""
    rows = []
    for about, first, second in pairs:
        if first not in table or second not in table:
            continue
        cells = []
        for key, digits in SHOWN.items():
            found = paired_difference(table[second][key], table[first][key])
            if not found.n:
                cells.append("-")
                continue
            sign = found.lo > 0 or -(found.hi < 0)
            verdict = "=" if not sign else "better" if (sign > 0) != (key in LOWER) else "worse"
            low, high = f"{found.lo:+.{digits}f}", f"{found.hi:+.{digits}f}"
            cells.append(f"{found.mean:+.{digits}f} [{low}, {high}] {verdict}")
        rows.append([about, second, first, *cells])
    return markdown(["", "row", "minus", *SHOWN], rows, 7)


def report(kind: str, table: Mapping[str, Values], costs: Mapping[str, str]) -> list[str]:
    """The tables: means, all rows minus the reference, the pairs of the claims, and the bound."""
    first = REFERENCE[kind]
    pairs = [("", first, label) for label in table if label not in (first, "mda")]
    claims = [(name, base, other) for name, base, rows in CLAIMS[kind] for other in rows]
    lines = [*means_table({k: v for k, v in table.items() if k != "mda"}, costs)]
    lines += ["", *differences_table(table, pairs), "", *differences_table(table, claims)]
    if "mda" in table:
        few = np.isfinite(table["mda"]["SRG"])
        on_few = {k: {key: v[few] for key, v in values.items()} for k, values in table.items()}
        lines += ["", f"On {few.sum()} photos:", "", *means_table(on_few, costs)]
    return lines


def in_squares(explainer: Explainer, images: Tensor, target: Tensor) -> Tensor:
    """Maps as SRG reads them: one value per square, with a side of 1/14 of the image's."""
    return F.adaptive_avg_pool2d(explainer.attribute(images, target), 14)


def study(
    backbone: Network,
    data: PhotosAt,
    output: OutputAt = "runs/study-relevance",
    config: RelevanceStudy = DEFAULTS,
) -> Iterator[str]:
    """Measure the rows that are not finished yet, write report.md, and yield its lines.

    Args:
        backbone: a ViT or a CNN; it is not changed.
        data: photos; labels are not read, as the predicted class is explained.
        output: the folder for results, with a folder for each network.
    """
    kind = "vit" if hasattr(backbone.model, "patch_embed") else "cnn"
    output = Path(output) / backbone.name
    check_folder(output)
    rows = dict(ROWS[kind])
    if default_head(backbone) is None:
        rows.pop("evidence", None)
    if config.pictures:
        made = {label: rows[label].make(backbone) for label in config.rows or rows}
        explainers = {label: partial(in_squares, explainer) for label, explainer in made.items()}
        maps = explain(list(config.pictures), backbone, explainer=explainers)
        contact_sheet_image(maps, side=150).quantize(200).save(output / "maps.png")
        yield f"{output / 'maps.png'}"
        return
    paths = list_images(data)
    even, odd = paths[::2], paths[1::2]
    for part in (even, odd):
        random.Random(0).shuffle(part)
    measuring, split = Measuring(backbone, output, config), Split("relevance")
    lines: list[str] = []
    if not config.rows or CHOSEN in config.rows:
        rows[CHOSEN], lines = measuring.chosen(kind, even[: config.choosing], split)
    wanted = config.rows or tuple(rows)
    for label in set(wanted) - rows.keys():
        raise ValueError(f"rows: got {label!r}; give some of {', '.join(rows)}")
    photos, found = split.score(odd[: config.photos]), dict[str, list[Values]]()
    most = {"mda": config.bound, "dave": config.few, "caap": config.few}
    costs: dict[str, str] = {}
    for start in range(0, len(photos), PART):
        for label in wanted:
            name = rows[label].name
            some = photos[start : min(start + PART, most.get(name, len(photos)))]
            if not some:
                continue
            folder = output / f"part-{start // PART}" / label
            values = measuring.row(rows[label], label, some, folder, split)
            found.setdefault(label, []).append(values)
            cost = strict_json.read(folder / SECONDS, "output", AGAIN)
            costs.setdefault(label, f"{cost['seconds'] / cost['maps']:.2f}" if cost else "?")
            yield f"photos from {start}: {label}, SRG {np.nanmean(values['SRG']):.2f}"
    split.write(output / "split.json")
    table = {label: joined(found[label], len(photos)) for label in rows if label in found}
    raw = [
        {"method": label, "photo": photo} | {key: f"{values[key][i]:.5g}" for key in COLUMNS}
        for label, values in table.items()
        for i, photo in enumerate(photo_ids(photos))
        if isinstance(values["photo"][i], str)  # else it was not scored
    ]
    heading = f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(photos)} photos"
    yield from reported(
        output, [heading, "", *lines, "", *report(kind, table, costs)], {"values": raw}
    )
