"""Does Visual Part Utilization move a head's attention onto the evidence? (MemeTector, arXiv 2205.13268)

The task is macro or no macro, on a frozen backbone. Macros are photos with white capitals at known
places. In the regular class, a share p_conc are web photos, of which a share p_txt carries text
that does not make a macro; the rest are the largest text-free crops of the same macros (VPU).
p_conc = 1 is training without VPU. With ``worn``, the macros, and so their crops, were scaled down
and compressed more, like an image that is passed from site to site, and the web photos were not. A
head can then tell them apart by that alone, wherever it looks. The evidence is where the letters
are; a head that relies on them has the energy of its attention there,

    energy = sum of the map inside the text boxes / sum of the map    (area: the same for a flat map)

Folds split the photos: no photo, in any form, is in both training and test. Half of a fold's
training photos become macros, the others web photos; each test photo is tested in every form.

The study compares training sets, called scenarios, and reports tables with intervals over photos
and a figure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from xattn.backbone import Backbone, load_backbone
from xattn.cli.model import weight_source
from xattn.config import ProbeConfig
from xattn.eval.annotations import Boxes
from xattn.eval.bootstrap import Interval, mean_interval, paired_difference, t_interval
from xattn.eval.evaluation.split import Split
from xattn.eval.functional import upsample
from xattn.eval.metrics.localization import energy_pointing_values
from xattn.eval.studies.options import OutputAt, PhotosAt
from xattn.eval.studies.run_files import kept_record
from xattn.heads import AttentiveHead, create_head, head_class
from xattn.parts import cut_parts, draw_macro, draw_text, write_lettered
from xattn.parts.macros import BOXES
from xattn.photos.images import load_image
from xattn.photos.sources import limit_photos, open_photos
from xattn.photos.view import make_view
from xattn.pictures.overlay import overlay
from xattn.runtime.files import atomic_file, write_json, write_rows
from xattn.training.features import Features, cache_features
from xattn.training.probe import probe


@dataclass(frozen=True)
class PartStudyConfig:
    """Settings of the study, which pairs each share of web photos with each share of text."""

    backbone: str = "vit_small_patch14_dinov2"  # A timm model.
    input_size: int = 224  # Side of the model's input in pixels.
    head: str = "memetector"  # An attentive head that learns its scores.
    hidden: tuple[int, ...] = (256, 128)
    """Widths of memetector's MLP; published, for 10,000 memes: 2048 1024."""
    p_conc: tuple[float, ...] = (1 / 3, 1.0)
    """Shares of web photos in the regular class; the rest are crops of the macros, none at 1."""
    p_txt: tuple[float, ...] = (0.0, 0.5, 1.0)  # Shares of the web photos that carry text.
    worn: bool = True  # Scale down the macros and compress them more, but not the web photos.
    folds: int = 5  # Parts of the photos; each is tested once, by heads with a seed of their own.
    seed: int = 0  # For macros, folds, training and the choice of photos under a limit.
    limit: int | None = None  # Use only this many photos, spread over their folders.

    @property
    def images(self) -> str:
        """The folder for the macros, the photos with text and the crops."""
        return "worn" if self.worn else "same"

    @property
    def features(self) -> str:
        """The folder for the features, in which each choice of taps has its own folder."""
        return f"features-{self.backbone}-{self.input_size}-{self.images}"

    @property
    def name(self) -> str:
        """The name of the results."""
        return f"{self.backbone}-{self.input_size}-{self.head}-{self.images}"


@dataclass(frozen=True)
class Scenario:
    """The composition of a training set's regular class."""

    p_conc: float
    p_txt: float

    def __post_init__(self) -> None:
        if not (0 <= self.p_conc <= 1 and 0 <= self.p_txt <= 1):
            raise ValueError(
                f"p_conc, p_txt: got {self.p_conc}, {self.p_txt}; give shares in [0, 1]"
            )

    @property
    def label(self) -> str:
        """Both shares with all their digits, as a third is not 0.33."""
        return f"{float(self.p_conc)!r}-{float(self.p_txt)!r}"


def scenarios(study: PartStudyConfig) -> list[Scenario]:
    return [Scenario(c, t) for t in study.p_txt for c in study.p_conc]


TESTS = {  # what the regular class is in a test: (share of web photos, share of these with text)
    "web": (1.0, 0.0),
    "web, half with text": (1.0, 0.5),
    "web with text": (1.0, 1.0),
    "crops": (0.0, 0.0),
}
Values = dict[str, NDArray[Any]]  # of test photos, see measure


def accuracy(correct: NDArray[np.float64], test: str) -> NDArray[np.float64]:
    """(n,): for each test photo, the expected accuracy on it as a macro and as a regular image."""
    near, with_text = TESTS[test]
    plain, text, macro, crop = correct.T
    web = (1 - with_text) * plain + with_text * text
    regular = web if near == 1 else near * web + (1 - near) * crop
    return (macro + regular) / 2


def columns(values: Values) -> dict[str, NDArray[np.float64]]:
    """The columns of the tables: a value per photo, in percent."""
    shown = {test: accuracy(values["correct"], test) for test in TESTS}
    shown |= {"energy": values["energy"], "class energy": values["class_energy"]}
    return {name: 100 * column for name, column in shown.items()}


def summary(
    study: PartStudyConfig, scenarios: list[Scenario], results: dict[str, Values]
) -> dict[str, Any]:
    """Means, and paired differences between training with and without VPU.

    Both have intervals over photos for fixed heads, and Student's t intervals over folds, hence
    heads.
    """
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


def photo_rows(scenario: Scenario, values: Values, photos: Sequence[Path]) -> list[dict[str, Any]]:
    """A row for each photo: whether the head was right on each form, and its maps' energies."""
    rows = []
    for i, photo in enumerate(values["photos"]):
        start = {"p_txt": scenario.p_txt, "p_conc": scenario.p_conc, "fold": int(values["fold"][i])}
        right = {
            form: None if np.isnan(value) else int(value)
            for form, value in zip(FORMS, values["correct"][i], strict=True)
        }
        shares = {name: float(values[name][i]) for name in ("energy", "class_energy", "area")}
        rows.append(start | {"photo": photos[photo].name} | right | shares)
    return rows


def line(scenario: Scenario, fold: int, values: Values) -> str:
    shown = "  ".join(f"{name} {np.nanmean(v):.1f}" for name, v in columns(values).items())
    return f"p_conc {scenario.p_conc:.2f}  p_txt {scenario.p_txt:.2f}  fold {fold}: {shown}"


def report(
    study: PartStudyConfig, scenarios: list[Scenario], results: dict[str, Values]
) -> Iterator[str]:
    """Lines of the tables in Markdown."""
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
    """Draw the first macros of the test photos, with the attention of heads without and with VPU.

    Both heads are trained at p_txt = 0.5, or the study's middle value; VPU has the smallest p_conc.
    A map is shown from 0 to its maximum.
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


DEFAULTS = PartStudyConfig()

FORMS = ("plain", "text", "macro", "crop")
MACRO = FORMS.index("macro")
CLASSES = ("no macro", "macro")


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Forms:
    """Every photo in the four forms of :data:`FORMS`; ``files[form][photo]`` is None where a macro has
    no crop. ``boxes`` is the JSON file of the macros' text boxes."""

    files: list[list[Path | None]]
    boxes: Path

    def __len__(self) -> int:
        return len(self.files[0])


def make_forms(photos: Sequence[Path], output: Path, worn: bool, seed: int) -> Forms:
    """Make the photos with text, the macros and their crops, or find them in ``output``."""
    made: dict[str, list[Path]] = {}
    for form, draw in (("text", draw_text), ("macro", draw_macro)):
        folder = output / form
        if (folder / BOXES).is_file():
            made[form] = sorted(folder.glob("*.jpg"))
        else:
            used = worn and form == "macro"
            made[form] = write_lettered(photos, folder, draw, seed=seed, worn=used)
        if len(made[form]) != len(photos):
            raise ValueError(f"output: {folder} is of other photos; choose another folder")
    boxes = output / "macro" / BOXES
    parts = cut_parts(made["macro"], boxes, output / "crop", seed=seed, progress=False)
    crops = [output / "crop" / r["file"] if "file" in r else None for r in parts.records]
    return Forms([list(photos), list(made["text"]), list(made["macro"]), crops], boxes)


def training_set(
    photos: NDArray[np.int64], scenario: Scenario, has_crop: NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """(form, photo) of each image: half of ``photos`` as macros, as many for the regular class."""
    bases, web = np.array_split(photos, 2)
    count = len(web)
    near = round(scenario.p_conc * count)
    with_text = round(scenario.p_txt * near)
    crops = bases[has_crop[bases]][: count - near]
    forms = {"macro": bases, "text": web[:with_text], "plain": web[with_text:near], "crop": crops}
    return [(FORMS.index(form), int(i)) for form, chosen in forms.items() for i in chosen]


# ---------------------------------------------------------------------- one head


def measure(
    head: Any, features: Any, rows: NDArray[np.int64], masks: torch.Tensor, test: NDArray[np.int64]
) -> Values:
    """Values of the test photos: ``correct`` (n, 4) by form, NaN where there is no crop; for the
    macros, the energies and the area in [0, 1] and the ``attention`` (n, h, w)."""
    correct = np.full((len(test), len(FORMS)), np.nan)
    attention, difference = [], []
    head.eval()
    with torch.inference_mode():
        for form in range(len(FORMS)):
            there = np.flatnonzero(rows[form, test] >= 0)
            for part in np.array_split(there, max(1, math.ceil(len(there) / 32))):
                tokens = head.tokens(features.taps(rows[form, test[part]]))
                guess = head.logits(tokens).argmax(1).numpy()
                correct[part, form] = guess == (form == MACRO)
                if form == MACRO:
                    attention.append(head.query_maps(tokens).mean(1, keepdim=True))
                    shares = head.class_maps(tokens).maps
                    difference.append((shares[:, 1:] - shares[:, :1]).clamp_min(0))
    inside = masks[torch.from_numpy(test)]
    size = inside.shape[2:]
    flat = torch.ones(len(test), 1, *size)
    maps = torch.cat(attention)
    return {
        "photos": test,
        "correct": correct,
        "energy": energy_pointing_values(upsample(maps, size), inside).numpy(),
        "class_energy": energy_pointing_values(
            upsample(torch.cat(difference), size), inside
        ).numpy(),
        "area": energy_pointing_values(flat, inside).numpy(),
        "attention": maps[:, 0].numpy().astype(np.float32),
    }


def recipe(seed: int) -> ProbeConfig:
    """MemeTector's training: AdamW with its learning rate, decay, batch size and epochs.

    Its 532 warm-up batches are 2 epochs here. The weights with the best validation accuracy are
    kept.
    """
    return ProbeConfig(
        recipe="small",
        epochs=20,
        warmup=2,
        batch_size=64,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=1e-3,
        patience=0,
        monitor="accuracy",
        seed=seed,
    )


# ---------------------------------------------------------------------- the study


def study(
    data: PhotosAt,
    output: OutputAt = "runs/study-vpu",
    config: PartStudyConfig = DEFAULTS,
    weights: str | Path | None = "auto",
) -> Iterator[str]:
    """Train and test every scenario and fold; yield lines of progress, then the report.

    ``output`` keeps the images, the features and every head's values: a run with the same arguments
    resumes where the last one stopped.
    """
    if isinstance(weights, str):
        weights = weight_source(weights, config.backbone)
    kind_of_head = head_class(config.head)
    if not issubclass(kind_of_head, AttentiveHead):
        raise ValueError(f"head: {config.head!r} is not a classifier; give an attentive head")
    output, photos = Path(output), limit_photos(data, config.limit, config.seed)[0].paths
    if len(photos) < 20 * config.folds:
        raise ValueError(f"data: got {len(photos)} photos; give at least {20 * config.folds}")
    _claim(output, photos, config)
    forms = make_forms(photos, output / config.images, config.worn, config.seed)
    yield f"{len(photos)} photos, {sum(f is not None for f in forms.files[-1])} of whose macros have a crop"
    inputs = _inputs(config, kind_of_head, forms, output, weights)
    results: dict[str, Values] = {}
    planned = scenarios(config)
    for scenario in planned:
        stored = []
        for fold in range(config.folds):
            path = output / "heads" / f"{config.name}-{scenario.label}-{fold}.npz"
            if not path.is_file():
                split = Split("parts", photos)
                values = _train_and_measure(config, inputs, scenario, fold, split)
                with atomic_file(path) as temporary:
                    np.savez(temporary, **values)  # type: ignore[arg-type]
                split.write(output / "splits" / f"{path.stem}.json")
                yield line(scenario, fold, values)
            with np.load(path) as file:
                stored.append(dict(file))
        results[scenario.label] = {
            key: np.concatenate([part[key] for part in stored]) for key in stored[0]
        } | {"fold": np.repeat(np.arange(config.folds), [len(p["photos"]) for p in stored])}
    table, picture = (output / f"{config.name}.{suffix}" for suffix in ("json", "jpg"))
    write_json(table, summary(config, planned, results))
    rows = [row for plan in planned for row in photo_rows(plan, results[plan.label], photos)]
    write_rows(output / f"{config.name}.csv", rows)
    macros = [f for f in forms.files[MACRO] if f is not None]
    figure(picture, planned, results, macros)
    yield from report(config, planned, results)
    yield f"{table}, {picture}, {output / config.name}.csv"


@dataclass(frozen=True)
class _Inputs:
    """The data that all heads are trained and tested on.

    ``rows`` (forms, photos): the index of each image among the ``features``, -1 where there is
    none; ``labels``, by that index; ``masks`` (photos, 1, H, W): where the text of each macro is.
    """

    backbone: Backbone
    features: Features
    rows: NDArray[np.int64]
    labels: torch.Tensor
    masks: torch.Tensor


def _inputs(
    study: PartStudyConfig,
    kind_of_head: type[AttentiveHead],
    forms: Forms,
    output: Path,
    weights: str | Path | None,
) -> _Inputs:
    """The features of every form of every photo, computed or found in ``output``."""
    backbone = load_backbone(study.backbone, weights, input_size=study.input_size)
    backbone = backbone.with_taps(kind_of_head.default_taps(backbone.depth))
    # Text is near the edges, so the model sees the whole image, squeezed.
    whole = replace(backbone.preprocessing, crop_pct=1.0, crop_mode="squash")
    backbone = backbone.with_preprocessing(whole)
    files = [f for column in forms.files for f in column if f is not None]
    folder = output / study.features / "+".join(backbone.taps)
    features = cache_features(backbone, files, folder, dtype="float16", progress=False)
    if features.skipped:
        raise ValueError(f"data: {features.skipped[0][0]}: {features.skipped[0][1]}")
    there = np.array([[f is not None for f in column] for column in forms.files])
    rows = np.full(there.shape, -1)
    rows[there] = np.arange(len(files))
    labels = torch.tensor([int(form == MACRO) for form in np.nonzero(there)[0]])
    masks = _masks(forms, backbone.preprocessing)
    return _Inputs(backbone, features, rows, labels, masks)


def _train_and_measure(
    study: PartStudyConfig, inputs: _Inputs, scenario: Scenario, fold: int, split: Split
) -> Values:
    """The values of a head trained on one scenario and tested on one fold."""
    rows = inputs.rows
    test, rest = _split(rows.shape[1], study.folds, fold, study.seed)
    seed = study.seed * study.folds + fold
    few, most = np.split(np.random.default_rng(seed).permutation(rest), [len(rest) // 10])
    validation, train = (
        [int(rows[form, i]) for form, i in training_set(part, scenario, rows[-1] >= 0)]
        for part in (split.choose(few), split.fit(most))
    )
    options: dict[str, Any] = {"hidden": study.hidden} if study.head == "memetector" else {}
    torch.manual_seed(seed)
    head = create_head(study.head, inputs.backbone, class_names=CLASSES, **options)
    assert isinstance(head, AttentiveHead)
    probe(
        head,
        inputs.features,
        inputs.labels,
        recipe(seed),
        train=train,
        validation=validation,
        progress=False,
    )
    return measure(head, inputs.features, rows, inputs.masks, split.score(test))


def _claim(output: Path, photos: Sequence[Path], study: PartStudyConfig) -> None:
    """Refuse an ``output`` made with other photos, folds or settings of training."""
    own = {
        "photos": open_photos(photos).describe(),
        "folds": study.folds,
        "seed": study.seed,
        "hidden": list(study.hidden),
        "recipe": asdict(recipe(study.seed)),
    }
    kept_record(output / "study.json", own)


def _split(
    count: int, folds: int, fold: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The photos to test on, and those to train on."""
    order = np.random.default_rng(seed).permutation(count)
    test = np.sort(order[fold::folds])
    return test, np.setdiff1d(order, test)


def _masks(forms: Forms, preprocessing: Any) -> torch.Tensor:
    """(n, 1, H, W) bool: where every macro's text is in the model's input."""
    boxes = Boxes(forms.boxes, {0: "text"}, {1: "text"})
    masks = []
    for path in forms.files[MACRO]:
        assert path is not None
        photo = load_image(path)
        mask = boxes.of(path, make_view((photo.height, photo.width), preprocessing)).mask(1)
        assert mask is not None  # the whole image is seen
        masks.append(mask)
    return torch.stack(masks)
