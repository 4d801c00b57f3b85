"""Do exported files give PyTorch's numbers, and two processes those of one?

    python -m xattn.eval.studies exports PHOTOS

A backbone and its head are exported to .pt2 and .onnx. Each photo is explained for its predicted
class and for class 0, by the file and by PyTorch. The largest differences between the two are taken

    over the logits, and over the pixels of the map, whose values are in [0, 1],

the former also relative to the photo's largest logit. Then ``xattn evaluate`` runs with one process and
with two, and the largest difference over all scores is taken for each photo and method.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xattn.backbone import Backbone, load_backbone
from xattn.eval import read_json
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import kept_record, kept_values, reported
from xattn.explaining.exporting import ExplainedClassifier, Run, export
from xattn.heads import Head, create_head, load_head
from xattn.photos.images import load_image
from xattn.photos.sources import limit_photos
from xattn.photos.view import prepare

LITE0, VIT = "tf_efficientnet_lite0", "vit_base_patch16_224"
BATCH = 5  # photos at once


@dataclass(frozen=True)
class ExportsConfig:
    """How many photos are compared."""

    photos: int = 20  # Photos that exported files explain.
    evaluated: int = 50  # Photos evaluated with one process and with two.
    seed: int = 0  # Seed of the choice of photos and of random weights.
    vit: str = VIT  # The timm ViT that gets random weights.

    def quick(self) -> ExportsConfig:
        """Two photos and a ViT-Ti: no figure means anything."""
        return replace(self, photos=2, evaluated=4, vit="vit_tiny_patch16_224")


DEFAULTS = ExportsConfig()
Made = tuple[Backbone, Head]
Row = dict[str, Any]


def trained() -> Made:
    """EfficientNet-Lite0 and the trained head that is shipped for it."""
    backbone = load_backbone(LITE0, "package")
    return backbone, load_head("ttame-efficientnet-lite0", backbone)


def untrained(name: str, fusion: str, seed: int) -> Made:
    """A ViT and a ``ttame`` head with random weights, noisy enough for maps to differ between classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = load_backbone(name, None, taps="norm1")
        head = create_head("ttame", backbone, fusion=fusion).eval()
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return backbone, head


def study(
    data: PhotosAt,
    output: OutputAt = "runs/study-exports",
    config: ExportsConfig = DEFAULTS,
    quick: Quick = False,
) -> Iterator[str]:
    """Make the comparisons that are not finished yet, write report.md, and yield its lines."""
    config = config.quick() if quick else config
    output = Path(output)
    random = {
        f"{config.vit}, {fusion}": partial(untrained, config.vit, fusion, config.seed)
        for fusion in ("classifier", "per_class")
    }
    planned = {(f"{LITE0}, shipped", suffix): trained for suffix in (".pt2", ".onnx")}
    planned |= {(name, ".onnx"): make for name, make in random.items()}
    photos = limit_photos(data, config.photos, config.seed)[0].paths
    evaluated = limit_photos(data, config.evaluated, config.seed)[0].paths
    names = sorted({_name(path) for path in [*photos, *evaluated]})
    kept_record(output / "record.json", {**asdict(config), "names": names})
    rows: list[Row] = []
    for (model, suffix), make in planned.items():
        differences = partial(compared, make, suffix, photos)
        found = kept_values(output / f"{model.replace(', ', '-')}{suffix}.json", differences)
        rows += [{"model": model, "file": suffix, **row} for row in found]
    found = kept_values(output / "processes.json", partial(processes, evaluated, output))
    yield from reported(
        output, [*_report(rows, found)], {"values": rows, "values-processes": found}
    )


# ---------------------------------------------------------------------- files


@torch.no_grad()
def compared(make: Any, suffix: str, photos: list[Path]) -> list[Row]:
    """Export the networks that ``make`` returns, and compare the file with PyTorch on every photo."""
    backbone, head = make()
    module = ExplainedClassifier(backbone, head).eval()
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        run = opened(export(backbone, head, Path(folder) / f"model{suffix}"))
        for start in range(0, len(photos), BATCH):
            batch = Split("exports", photos).score(photos[start : start + BATCH])
            images = [prepare(load_image(p), backbone.preprocessing, "crop")[0] for p in batch]
            rows += differences(module, run, torch.stack(images).float(), batch)
    return rows


def differences(module: Run, run: Run, images: Tensor, photos: list[Path]) -> list[Row]:
    """For each photo, how far ``run`` is from ``module``, for the predicted class and for class 0."""
    rows: list[Row] = []
    for target, index in (("predicted", -1), ("class 0", 0)):
        classes = torch.full((len(images),), index)
        (logits, maps), (others, shown) = module(images, classes), run(images, classes)
        off = (logits - others).abs().amax(1)
        relative = off / logits.abs().amax(1)
        of_map = (maps - shown).abs().amax((1, 2, 3))
        columns = zip(photos, off.tolist(), relative.tolist(), of_map.tolist(), strict=True)
        for photo, *values in columns:
            named = dict(zip(("logits", "relative", "map"), values, strict=True))
            rows.append({"photo": _name(photo), "target": target, **named})
    return rows


def _name(photo: Path) -> str:
    return f"{photo.parent.name}/{photo.name}"


def opened(path: Path) -> Run:
    """An exported file as a function of images and classes."""
    if path.suffix == ".pt2":
        program: Run = torch.export.load(path).module()
        return program
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)

    def run(images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = session.run(None, {"images": images.numpy(), "class_index": index.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(maps)

    return run


# ---------------------------------------------------------------------- processes


def processes(photos: list[Path], output: Path) -> list[Row]:
    """Evaluate with one process and with two: how far their scores differ, by photo and method."""
    Split("exports", photos).score(photos)
    listed = output / "photos.txt"
    listed.write_text("".join(f"{path.resolve()}\n" for path in photos), encoding="utf-8")
    results = []
    for count in (1, 2):
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone"]
        launch += [] if count == 1 else ["--nproc-per-node", str(count)]
        to = output / f"processes-{count}"
        asked = ["evaluate", str(listed), "--no-sanity", "--overwrite", "--output", str(to)]
        command = [sys.executable, *launch, "-m", "xattn", *asked]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{count} processes: {done.stderr[-2000:]}")
        results.append(read_json(to / "results.json"))
    one, two = results
    assert [r.id for r in one.images] == [r.id for r in two.images]
    rows: list[Row] = []
    for name, method in one.methods.items():
        both = [np.stack([*m.scores.values()]) for m in (method, two.methods[name])]
        nowhere = np.isnan(both[0]) & np.isnan(both[1])
        off = np.where(nowhere, 0.0, np.abs(both[0] - both[1])).max(0)
        for photo, record, other, difference in zip(
            photos, one.images, two.images, off, strict=True
        ):
            first = {"photo": _name(photo), "method": name, "scores": len(both[0])}
            rows.append({**first, "score": float(difference), "p": abs(record.p - other.p)})
    return rows


# ---------------------------------------------------------------------- report


def _report(rows: list[Row], found: list[Row]) -> Iterator[str]:
    yield "The largest difference from PyTorch over all photos, for the predicted class and for class 0:"
    yield "\n| model | file | photos | logits | relative | map |"
    yield "| :-- | :-- | --: | --: | --: | --: |"
    for model, file in dict.fromkeys((row["model"], row["file"]) for row in rows):
        own = [row for row in rows if (row["model"], row["file"]) == (model, file)]
        worst = [f"{max(row[key] for row in own):.1e}" for key in ("logits", "relative", "map")]
        photos = len({row["photo"] for row in own})
        yield f"| {model} | {file} | {photos} | {' | '.join(worst)} |"
    scores = max(row["score"] for row in found)
    p = max(row["p"] for row in found)
    yield (
        f"\nTwo processes less one, {len({row['photo'] for row in found})} photos, "
        f"{', '.join(dict.fromkeys(row['method'] for row in found))}: scores differ by at most "
        f"{scores:.1e}, probabilities by {p:.1e}"
    )
