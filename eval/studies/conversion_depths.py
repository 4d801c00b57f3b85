"""How many of a ViT's last blocks can be converted, training first the mechanism alone, then also updates.

    python -m xattn.eval.studies depths photos/ --labels classes.json -b vit_tiny_patch16_224 --weights FILE

For the last 3, 6, 9 and 12 blocks, the mechanism is distilled on the tokens of the trained network,
then on its own tokens, and measured; then low-rank updates around it are trained too. Each fold's
network learns from the photos of the other folds and is measured on its own, so that all photos
count. Labels are used only for measuring.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xattn.attention.model.spec import format_layers, parse_mechanism
from xattn.backbone import Backbone, load_conversion
from xattn.backbone.conversion import WEIGHTS_FILE
from xattn.config import DistillConfig
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import LabelsAt, Network, OutputAt, PhotosAt
from xattn.eval.studies.run_files import kept_record, write_report
from xattn.eval.studies.study_photos import Photo, images_of, labelled_photos, photos_record
from xattn.eval.studies.swap.measuring import Block, Explaining, quality
from xattn.photos.sources import open_photos
from xattn.runtime.files import check_folder, write_json, write_text
from xattn.training.distilling import CONVERSION_FOLDER, REPORT, distill
from xattn.training.run_folder import RUN_FILE
from xattn.training.students.closeness import HeadCloseness, head_closeness, head_csv


@dataclass(frozen=True)
class DepthStudyConfig:
    """Which blocks are converted, and how long they are trained."""

    attention: str = "hedgehog"
    """The mechanism, as NAME:option=value,...; it needs trainable parameters."""
    last: tuple[int, ...] = (3, 6, 9, 12)  # Numbers of blocks, counted from the last.
    photos: int = 500  # How many photos, drawn by the seed.
    folds: int = 2  # Parts of the photos; a network for each learns from the other parts.
    epochs: int = 6  # Passes on the tokens of the trained network.
    student_epochs: int = 3  # Passes on the tokens of the converted network.
    finetune_epochs: int = 6  # Passes that also train low-rank updates.
    finetune_lr: float = 1e-3  # Their peak learning rate.
    heads: int = 32  # Photos per fold on which rows are compared head by head.
    seed: int = 0  # Seed of the photos' order and of training.
    workers: int = 0  # Loader processes for training.


STAGES = {"alone": "the mechanism alone", "lora": "low-rank updates as well"}
PHOTO_VALUES = ("right", "dense", "same", "patch cosine")
AT_ONCE = 25  # photos that are measured at once
HEADING = (
    "| blocks | trained | top-1, % | loss, points | same class, % | patch cosine | KL of rows "
    "| KL with elu + 1 | KL with Taylor | minutes |"
)
DEFAULTS = DepthStudyConfig()


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    output: OutputAt = "runs/study-depths",
    config: DepthStudyConfig = DEFAULTS,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Train and measure what is not finished yet, write report.md and heads.csv, and yield the report.

    Args:
        data: photos, see :func:`xattn.explaining.naming.named_photos`; ``labels`` has their classes.
        output: folder for the conversions and the measurements, from which the same command resumes.
    """
    output = Path(output)
    photos = labelled_photos(backbone, data, labels, config.seed)[: config.photos]
    blocks: Any = getattr(backbone.model, "blocks", ())
    if len(blocks) < max(config.last):
        raise ValueError(f"last: got {config.last}; {backbone.name} has {len(blocks)} blocks")
    if len(photos) < config.folds:
        raise ValueError(f"folds: got {config.folds} for {len(photos)} photos; give fewer")
    check_folder(output)
    # Other depths may be added later.
    settings = {k: v for k, v in asdict(config).items() if k not in ("last", "workers")}
    kept_record(output / "record.json", photos_record(backbone, photos, settings))
    lines = [f"{backbone.name}, {config.attention}, {len(photos)} photos", "", HEADING]
    lines.append("| :-- | :-- |" + " --: |" * 8)
    yield from lines
    heads: list[str] = []
    values: list[dict[str, Any]] = []
    for last in config.last:
        layers = range(len(blocks) - last, len(blocks))
        for stage in STAGES:
            found = [
                _of_fold(backbone, photos, layers, stage, fold, output, config, progress)
                for fold in range(config.folds)
            ]
            lines.append(_line(layers, stage, found))
            heads.append(f"blocks {format_layers(layers)}, {STAGES[stage]}\n{_heads_csv(found)}")
            yield lines[-1]
            for fold, one in enumerate(found):
                values += [
                    {"blocks": format_layers(layers), "trained": STAGES[stage], "photo": photo.name}
                    | {key: one[key][i] for key in PHOTO_VALUES}
                    for i, photo in enumerate(photos[fold :: config.folds])
                ]
    write_text(output / "heads.csv", "\n".join(heads))
    files = [*write_report(output, lines, {"values": values}), output / "heads.csv"]
    yield f"\nreport: {', '.join(map(str, files))}"


def _of_fold(
    backbone: Backbone,
    photos: Sequence[Photo],
    layers: range,
    stage: str,
    fold: int,
    output: Path,
    config: DepthStudyConfig,
    progress: bool,
) -> dict[str, Any]:
    """The measurements of one network, which is trained first if it is not there yet."""
    folder = output / f"last-{len(layers)}" / f"fold-{fold}"
    file = folder / stage / "result.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    own = [photo for i, photo in enumerate(photos) if i % config.folds == fold]
    others = [photo.path for i, photo in enumerate(photos) if i % config.folds != fold]
    split = Split("depths")
    own, others = split.score(own), split.fit(others)
    run = folder / stage / "run"
    name, options = parse_mechanism(config.attention)
    if not (run / CONVERSION_FOLDER / WEIGHTS_FILE).is_file():
        start = folder / "alone" / "run" / CONVERSION_FOLDER if stage == "lora" else None
        distill(
            backbone, name, layers, options, data=others, validation=others[:8],
            config=_training(config, stage), start=start, output=run,
            resume=(run / RUN_FILE).is_file(), progress=progress,
        )  # fmt: skip
    network = load_conversion(run / CONVERSION_FOLDER, backbone)
    result = measured(backbone, network, own, config.heads)
    report = json.loads((run / REPORT).read_text(encoding="utf-8"))
    write_json(file, {**result, "seconds": report["seconds"], "split": split.record()})
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _training(config: DepthStudyConfig, stage: str) -> DistillConfig:
    common: dict[str, Any] = {"measured": 8, "workers": config.workers, "seed": config.seed}
    if stage == "lora":
        return DistillConfig(
            epochs=0, finetune="lora", finetune_epochs=config.finetune_epochs,
            finetune_lr=config.finetune_lr, **common,
        )  # fmt: skip
    return DistillConfig(epochs=config.epochs, student_epochs=config.student_epochs, **common)


def measured(
    backbone: Backbone, network: Backbone, photos: Sequence[Photo], heads: int
) -> dict[str, Any]:
    """``right``, ``dense``, ``same`` and ``patch cosine`` of every photo, and figures of the heads."""
    values: dict[str, list[float]] = {}
    for start in range(0, len(photos), AT_ONCE):
        some = photos[start : start + AT_ONCE]
        images = images_of(backbone, some)
        labels = torch.tensor([p.label for p in some], device="cpu")
        block = Block(images, labels, backbone, Explaining("rollout", 1))
        found = quality(block, range(len(some)), network)
        found["dense"] = (block.seen[1].argmax(1).cpu() == labels).double().tolist()
        for key in PHOTO_VALUES:
            values.setdefault(key, []).extend(found[key])
    paths = open_photos([photo.path for photo in photos])
    return {**values, "heads": [asdict(x) for x in head_closeness(backbone, network, paths, heads)]}


def _line(layers: range, stage: str, found: Sequence[Mapping[str, Any]]) -> str:
    def mean(key: str) -> float:
        values = [value for one in found for value in one[key]]
        return sum(values) / len(values)

    right, dense = 100 * mean("right"), 100 * mean("dense")
    cells = [format_layers(layers), STAGES[stage], f"{right:.1f}", f"{dense - right:.1f}"]
    cells += [f"{100 * mean('same'):.1f}", f"{mean('patch cosine'):.3f}"]
    by_map: dict[str, list[float]] = {}
    for head in (head for one in found for head in one["heads"]):
        by_map.setdefault(head["map"], []).append(head["divergence"])
    cells += [f"{sum(values) / len(values):.3f}" for values in by_map.values()]
    cells.append(f"{sum(one['seconds'] for one in found) / len(found) / 60:.1f}")
    return f"| {' | '.join(cells)} |"


def _heads_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """CSV of means over the folds, a line for each head and map."""
    means = []
    for same in zip(*(one["heads"] for one in found), strict=True):
        numbers = {
            key: sum(head[key] for head in same) / len(same)
            for key in ("divergence", "entropy", "softmax_entropy", "order")
        }
        means.append(HeadCloseness(**{**same[0], **numbers}))
    return head_csv(means)
