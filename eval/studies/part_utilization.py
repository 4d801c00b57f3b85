"""Does Visual Part Utilization move a head's attention onto the evidence? (MemeTector, arXiv 2205.13268)

The task is macro or no macro, on a frozen backbone. Macros are photos with white capitals (their place
is known); the regular class has a share p_conc of web photos, of which a share p_txt carries text that
makes no macro, and for the rest the largest text-free crops of the very macros (VPU). p_conc = 1 is
training without VPU. With ``worn`` the macros, and so their crops, were made smaller and compressed
more, as an image is that passed from site to site, and the web photos were not: a head can tell them by
that alone, wherever it looks. Evidence is where the letters are; a head that relies on them has the
energy of its attention there,

    energy = sum of the map inside the text boxes / sum of the map    (area: the same of a flat map)

Folds split the photos: no photo, in whichever form, is in training and test. Half of a fold's training
photos become macros, the others web photos; each test photo is tested in every form.
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

from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.files import atomic_file, write_json

FORMS = ("plain", "text", "macro", "crop")
MACRO = FORMS.index("macro")
CLASSES = ("no macro", "macro")
TESTS = {  # of the regular class: (share of web photos, share of them with text)
    "web": (1.0, 0.0),
    "web, half with text": (1.0, 0.5),
    "web with text": (1.0, 1.0),
    "crops": (0.0, 0.0),
}


@dataclass(frozen=True)
class Scenario:
    """What the regular class of a training set is made of."""

    p_conc: float
    p_txt: float

    def __post_init__(self) -> None:
        if not (0 <= self.p_conc <= 1 and 0 <= self.p_txt <= 1):
            raise ValueError(
                f"p_conc, p_txt: got {self.p_conc}, {self.p_txt}; give shares in [0, 1]"
            )

    @property
    def label(self) -> str:
        return f"{self.p_conc:.2f}-{self.p_txt:.2f}"


@dataclass(frozen=True)
class Study:
    """What is trained and tested; ``p_conc`` and ``p_txt`` are combined, and 1 must be in ``p_conc``."""

    backbone: str = "vit_small_patch14_dinov2"
    weights: str | None = "package"
    taps: tuple[str, ...] | None = None  # by default the head's
    input_size: int = 224
    head: str = "memetector"
    worn: bool = True
    p_conc: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    p_txt: tuple[float, ...] = (0.0, 0.5, 1.0)
    folds: int = 5
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if 1.0 not in self.p_conc or self.folds < 2:
            raise ValueError(
                f"p_conc, folds: got {self.p_conc}, {self.folds}; give 1 among the shares and 2 folds"
            )

    @property
    def scenarios(self) -> list[Scenario]:
        return [Scenario(c, t) for t in self.p_txt for c in self.p_conc]


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
    from xattn.parts import cut_parts, draw_macro, draw_text, write_lettered
    from xattn.parts.macros import BOXES

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
) -> dict[str, NDArray[Any]]:
    """Values of the test photos: ``correct`` (n, 4) by form, NaN where there is no crop, energies and
    area in [0, 1] of their macros, and the attention (n, h, w)."""
    from xattn.eval.functional import upsample
    from xattn.eval.metrics.localization import energy_pointing_values

    correct = np.full((len(test), len(FORMS)), np.nan)
    attention, difference = [], []
    head.eval()
    with torch.inference_mode():
        for form in range(len(FORMS)):
            there = np.flatnonzero(rows[form, test] >= 0)
            for part in np.array_split(there, max(1, math.ceil(len(there) / 32))):
                tokens = features.batch(rows[form, test[part]])
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


def train(
    head: Any, features: Any, rows: NDArray[np.int64], chosen: list[tuple[int, int]], seed: int
) -> None:
    index = torch.tensor([rows[form, photo] for form, photo in chosen])
    labels = torch.tensor([int(form == MACRO) for form, _ in chosen])
    generator = torch.Generator().manual_seed(seed)
    epochs, batch = 20, 64
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-3)
    steps = epochs * math.ceil(len(index) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    head.train()
    for _ in range(epochs):
        for part in torch.randperm(len(index), generator=generator).split(batch):
            logits = head.logits(features.batch(index[part]))
            loss = torch.nn.functional.cross_entropy(logits, labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


# ---------------------------------------------------------------------- the study


def run(data: str | Path, output: str | Path, study: Study) -> Iterator[str]:
    """Train and test every scenario and fold; yields lines of progress, then the report.

    ``output`` keeps images, features and the values of every trained head: a run with the same
    arguments goes on where one stopped.

    Raises:
        ValueError: a photo cannot be read, too few photos, or ``output`` is of another study.
    """
    from xattn.backbone import load_backbone
    from xattn.heads import create_head
    from xattn.images import list_images
    from xattn.training.features import cache_features

    output = Path(output)
    photos = list_images(data)[: study.limit]
    if len(photos) < 4 * study.folds:
        raise ValueError(f"data: got {len(photos)} photos; give at least {4 * study.folds}")
    kind = "worn" if study.worn else "same"
    forms = make_forms(photos, output / kind, study.worn, study.seed)
    yield f"{len(photos)} photos, {sum(f is not None for f in forms.files[-1])} of whose macros have a crop"
    backbone = load_backbone(
        study.backbone, study.weights, study.taps or _taps(study), input_size=study.input_size
    )
    # Text stands at the edges: the model sees the whole image, squeezed.
    backbone.preprocessing = replace(backbone.preprocessing, crop_pct=1.0, crop_mode="squash")
    files = [f for column in forms.files for f in column if f is not None]
    folder = output / f"features-{study.backbone}-{kind}"
    features = cache_features(backbone, files, folder, dtype="float16", progress=False)
    if features.skipped:
        raise ValueError(f"data: {features.skipped[0][0]}: {features.skipped[0][1]}")
    rows = np.full((len(FORMS), len(photos)), -1)
    there = np.array([[f is not None for f in column] for column in forms.files])
    rows[there] = np.arange(len(files))
    masks = _masks(forms, backbone.preprocessing)
    results: dict[str, dict[str, NDArray[Any]]] = {}
    for scenario in study.scenarios:
        parts = []
        for fold in range(study.folds):
            name = f"{study.backbone}-{study.head}-{kind}-{scenario.label}-{fold}.npz"
            path = output / "heads" / name
            if not path.is_file():
                rng = np.random.default_rng([study.seed, fold])
                test, rest = _split(len(photos), study.folds, fold, study.seed)
                chosen = training_set(rng.permutation(rest), scenario, there[-1])
                torch.manual_seed(study.seed * study.folds + fold)
                head = create_head(study.head, backbone, classes=len(CLASSES))
                train(head, features, rows, chosen, study.seed * study.folds + fold)
                values = measure(head, features, rows, masks, test)
                with atomic_file(path) as temporary:
                    np.savez(temporary, **values)
                yield _line(scenario, fold, values)
            with np.load(path) as stored:
                parts.append(dict(stored))
        results[scenario.label] = {
            key: np.concatenate([part[key] for part in parts]) for key in parts[0]
        } | {"fold": np.repeat(np.arange(study.folds), [len(p["photos"]) for p in parts])}
    name = f"{study.backbone}-{study.head}-{kind}"
    write_json(output / f"{name}.json", summary(study, results))
    yield from report(study, results)


def _taps(study: Study) -> tuple[str, ...]:
    if study.backbone.startswith("vit_"):
        return ("block.0", "block.3", "block.6", "block.9")
    return ("stage.1", "stage.2", "stage.3")


def _split(
    count: int, folds: int, fold: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Photos to test and to train on."""
    order = np.random.default_rng(seed).permutation(count)
    test = np.sort(order[fold::folds])
    return test, np.setdiff1d(order, test)


def _masks(forms: Forms, preprocessing: Any) -> torch.Tensor:
    """(n, 1, H, W) bool: the text of every macro in the model's input."""
    from xattn.eval.annotations import Boxes
    from xattn.images import load_image, make_view

    boxes = Boxes(forms.boxes, {0: "text"}, {1: "text"})
    masks = []
    for path in forms.files[MACRO]:
        assert path is not None
        photo = load_image(path)
        mask = boxes.of(path, make_view((photo.height, photo.width), preprocessing)).mask(1)
        assert mask is not None  # the whole image is seen
        masks.append(mask)
    return torch.stack(masks)


def accuracy(correct: NDArray[np.float64], test: str) -> NDArray[np.float64]:
    """(n,): of each test photo, the expected accuracy on it as a macro and as a regular image."""
    near, with_text = TESTS[test]
    plain, text, macro, crop = correct.T
    web = (1 - with_text) * plain + with_text * text
    regular = web if near == 1 else near * web + (1 - near) * crop
    return (macro + regular) / 2


def columns(values: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Per photo, in percent, what the tables show."""
    shown = {test: accuracy(values["correct"], test) for test in TESTS}
    shown |= {"energy": values["energy"], "class energy": values["class_energy"]}
    return {name: 100 * column for name, column in shown.items()}


def summary(study: Study, results: dict[str, dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Means, paired differences with minus without VPU, with intervals over photos, and by fold."""
    table: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for scenario in study.scenarios:
        shown = columns(results[scenario.label])
        fold = results[scenario.label]["fold"]
        table[scenario.label] = {
            name: _interval(mean_interval(column)) | {"folds": _by_fold(column, fold)}
            for name, column in shown.items()
        }
        if scenario.p_conc == 1:
            continue
        without = columns(results[replace(scenario, p_conc=1.0).label])
        differences[scenario.label] = {
            name: _interval(paired_difference(column, without[name]))
            | {"folds": _by_fold(column - without[name], fold)}
            for name, column in shown.items()
        }
    area = 100 * float(np.mean(results[study.scenarios[0].label]["area"]))
    return {
        "study": json.loads(json.dumps(asdict(study))),
        "area": round(area, 3),
        "table": table,
        "differences": differences,
    }


def _by_fold(column: NDArray[np.float64], fold: NDArray[np.int64]) -> list[float]:
    return [round(float(np.nanmean(column[fold == k])), 3) for k in np.unique(fold)]


def _interval(value: Interval) -> dict[str, Any]:
    return {
        "mean": round(value.mean, 3),
        "lo": round(value.lo, 3),
        "hi": round(value.hi, 3),
        "n": value.n,
    }


def _line(scenario: Scenario, fold: int, values: dict[str, NDArray[Any]]) -> str:
    shown = "  ".join(f"{name} {np.nanmean(v):.1f}" for name, v in columns(values).items())
    return f"p_conc {scenario.p_conc:.2f}  p_txt {scenario.p_txt:.2f}  fold {fold}: {shown}"


def report(study: Study, results: dict[str, dict[str, NDArray[Any]]]) -> Iterator[str]:
    """The tables in Markdown."""
    found = summary(study, results)
    names = list(columns(results[study.scenarios[0].label]))
    head = "| p_txt | p_conc | " + " | ".join(names) + " |"
    rule = "| --: | --: |" + " --: |" * len(names)
    yield head
    yield rule
    for scenario in study.scenarios:
        yield _row(scenario, [found["table"][scenario.label][n] for n in names], "")
    yield ""
    yield head
    yield rule
    for scenario in study.scenarios:
        if scenario.p_conc < 1:
            yield _row(scenario, [found["differences"][scenario.label][n] for n in names], "+")
    yield ""
    yield f"area of the text: {found['area']:.1f} % of the image"


def _row(scenario: Scenario, cells: list[dict[str, Any]], sign: str) -> str:
    shown = " | ".join(f"{c['mean']:{sign}.1f} [{c['lo']:.1f}, {c['hi']:.1f}]" for c in cells)
    return f"| {scenario.p_txt:.2f} | {scenario.p_conc:.2f} | {shown} |"
