"""Does Visual Part Utilization move a head's attention onto the evidence? (MemeTector, arXiv 2205.13268)

The task is macro or no macro, on a frozen backbone. Macros are photos with white capitals (their place
is known); the regular class has a share p_conc of web photos, of which a share p_txt carries text that
makes no macro, and for the rest the largest text-free crops of the very macros (VPU). p_conc = 1 is
training without VPU. With ``worn`` the macros, and so their crops, were scaled down and compressed
more, like an image that is passed from site to site, and the web photos were not: a head can tell them
apart by that alone, wherever it looks. Evidence is where the letters are; a head that relies on them
has the energy of its attention there,

    energy = sum of the map inside the text boxes / sum of the map    (area: the same of a flat map)

Folds split the photos: no photo, in whichever form, is in training and test. Half of a fold's training
photos become macros, the others web photos; each test photo is tested in every form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from xattn.backbone import Backbone, load_backbone
from xattn.cli.model import weight_source
from xattn.config import ProbeConfig
from xattn.eval.annotations import Boxes
from xattn.eval.evaluation.split import Split
from xattn.eval.functional import upsample
from xattn.eval.metrics.localization import energy_pointing_values
from xattn.eval.studies.kept import raw_rows
from xattn.eval.studies.options import OutputAt, PhotosAt
from xattn.eval.studies.part_report import Values, figure, line, report, summary
from xattn.eval.studies.part_scenarios import PartStudyConfig, Scenario, scenarios
from xattn.heads import AttentiveHead, create_head, head_class
from xattn.parts import cut_parts, draw_macro, draw_text, write_lettered
from xattn.parts.macros import BOXES
from xattn.photos.images import load_image
from xattn.photos.part import limited
from xattn.photos.sources import open_photos
from xattn.photos.view import make_view
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, write_json, write_rows
from xattn.training.features import Features, cache_features
from xattn.training.probe import probe

DEFAULTS = PartStudyConfig()

FORMS = ("plain", "text", "macro", "crop")
MACRO = FORMS.index("macro")
CLASSES = ("no macro", "macro")


# ---------------------------------------------------------------------- data


@dataclass(frozen=True)
class Forms:
    """Every photo in the four forms of :data:`FORMS`; ``files[form][photo]`` is None where a macro has
    no crop. ``boxes``: the JSON of the macros' text boxes."""

    files: list[list[Path | None]]
    boxes: Path

    def __len__(self) -> int:
        return len(self.files[0])


def make_forms(photos: Sequence[Path], output: Path, worn: bool, seed: int) -> Forms:
    """Make, or find in ``output``, the photos with text, the macros and their crops."""
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
    """(form, photo) of each image: half of ``photos`` as macros, and as many of the regular class."""
    bases, web = np.array_split(photos, 2)
    count = len(web)
    near = round(scenario.p_conc * count)
    with_text = round(scenario.p_txt * near)
    crops = bases[has_crop[bases]][: count - near]
    forms = {
        "macro": bases,
        "text": web[:with_text],
        "plain": web[with_text:near],
        "crop": crops,
    }
    return [(FORMS.index(form), int(i)) for form, chosen in forms.items() for i in chosen]


# ---------------------------------------------------------------------- one head


def measure(
    head: Any,
    features: Any,
    rows: NDArray[np.int64],
    masks: torch.Tensor,
    test: NDArray[np.int64],
) -> Values:
    """Values of the test photos: ``correct`` (n, 4) by form, NaN where there is no crop, energies and
    area in [0, 1] of their macros, and the attention (n, h, w)."""
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
    """AdamW, learning rate, decay, batch and epochs are MemeTector's, its 532 batches of warm-up are 2
    epochs here; the weights with the best validation accuracy are kept."""
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
    """Train and test every scenario and fold; yields lines of progress, then the report.

    ``output`` keeps images, features and the values of every trained head: a run with the same
    arguments resumes where one stopped.

    Raises:
        ValueError: a photo cannot be read, there are too few photos, or ``output`` belongs to another
            study.
    """
    if isinstance(weights, str):
        weights = weight_source(weights, config.backbone)
    kind_of_head = head_class(config.head)
    if not issubclass(kind_of_head, AttentiveHead):
        raise ValueError(f"head: {config.head!r} is not a classifier; give an attentive head")
    output, photos = Path(output), limited(data, config.limit, config.seed)[0].paths
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
                    np.savez(temporary, **values)
                split.write(output / "splits" / f"{path.stem}.json")
                yield line(scenario, fold, values)
            with np.load(path) as file:
                stored.append(dict(file))
        results[scenario.label] = {
            key: np.concatenate([part[key] for part in stored]) for key in stored[0]
        } | {"fold": np.repeat(np.arange(config.folds), [len(p["photos"]) for p in stored])}
    table, picture = (output / f"{config.name}.{suffix}" for suffix in ("json", "jpg"))
    write_json(table, summary(config, planned, results))
    by_row = {
        label: [{k: v.tolist() for k, v in values.items() if k != "attention"}]
        for label, values in results.items()
    }
    write_rows(output / f"{config.name}.csv", raw_rows(by_row))
    macros = [f for f in forms.files[MACRO] if f is not None]
    figure(picture, planned, results, macros)
    yield from report(config, planned, results)
    yield f"{table}, {picture}, {output / config.name}.csv"


@dataclass(frozen=True)
class _Inputs:
    """What all heads are trained and tested on.

    ``rows`` (forms, photos): the place of each image among the ``features``, -1 where there is none;
    ``labels`` by that place; ``masks`` (photos, 1, H, W): where the text of each macro is.
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
    # Text stands at the edges: the model sees the whole image, squeezed.
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
    """The values of the head that is trained on one scenario and tested on one fold."""
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
    """Refuse an ``output`` of other photos, folds or recipe."""
    own = {
        "photos": open_photos(photos).describe(),
        "folds": study.folds,
        "seed": study.seed,
        "hidden": list(study.hidden),
        "recipe": asdict(recipe(study.seed)),
    }
    path = output / "study.json"
    if path.is_file():
        if strict_json.read(path, "output", "choose another") != own:
            raise ValueError(f"output: {output} is of other photos or settings; choose another")
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"output: {output} is not empty and holds no study; choose a new folder")
    else:
        write_json(path, own)


def _split(
    count: int, folds: int, fold: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Photos to test and to train on."""
    order = np.random.default_rng(seed).permutation(count)
    test = np.sort(order[fold::folds])
    return test, np.setdiff1d(order, test)


def _masks(forms: Forms, preprocessing: Any) -> torch.Tensor:
    """(n, 1, H, W) bool: the text of every macro in the model's input."""
    boxes = Boxes(forms.boxes, {0: "text"}, {1: "text"})
    masks = []
    for path in forms.files[MACRO]:
        assert path is not None
        photo = load_image(path)
        mask = boxes.of(path, make_view((photo.height, photo.width), preprocessing)).mask(1)
        assert mask is not None  # the whole image is seen
        masks.append(mask)
    return torch.stack(masks)
