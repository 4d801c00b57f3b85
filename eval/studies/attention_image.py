"""Attention training on images: do the maps of attentive heads then agree better with what matters?

    python -m xattn.eval.studies image PHOTOS --labels FILE --annotations COCO

Heads on a frozen backbone learn to distinguish coarse groups, with and without perturbed scores
 (:mod:`xattn.training.attention_training`). Fold k of the photos is tested with seed k, the next fold
stops training early, and the study chooses nothing else: epsilon is ``strength`` sqrt(N), which is the same
change per token for each number N of tokens. With a the mean query map, for every photo of the test fold:

    pixels      Pearson(a, |dL/dx_n|), L the cross-entropy of the label, x_n the pixels of cell n
    tokens      the same with x_n as token n of all taps, which the head pools: mostly attention itself, as
                the gradient by value n is a_n times a vector that all tokens share
    deletion    Pearson(a, p - p_n), p of the predicted class, p_n without token n in the pooling
    shares      the same with the class map of the prediction in place of a
    stability   Pearson of a with and without Gaussian noise on the pixels
    energy      the share of a inside the objects of COCO photos, minus their area
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from xattn.backbone import Backbone, Taps, load_backbone
from xattn.config import AttentionTraining, ProbeConfig
from xattn.correlation import pearson
from xattn.eval.annotations import MaskFolder
from xattn.eval.annotations.coco import THING_IDS
from xattn.eval.bootstrap import mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import ObjectsAt, OutputAt, PhotosAt
from xattn.eval.studies.run_files import kept_record, raw_rows
from xattn.heads import AttentiveHead, Tokens, head_class
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images, load_image
from xattn.photos.labels import read_labels
from xattn.photos.sources import open_photos
from xattn.photos.view import make_view, prepare
from xattn.runtime.files import atomic_file, check_folder, file_sha256, write_json, write_rows
from xattn.training import labelled as splits
from xattn.training.features import cache_features
from xattn.training.probe import probe


@dataclass(frozen=True)
class ImageStudyConfig:
    """Which networks are trained and tested on photos, and how."""

    backbones: tuple[str, ...] = ("tf_efficientnet_lite0", "vit_small_patch14_dinov2")
    """timm models with package weights."""
    heads: tuple[str, ...] = ("efficient_probe", "memetector", "abmilp")
    """Attentive heads that learn their scores."""
    methods: tuple[AttentionTraining, ...] = ("none", "random", "at", "iat", "iat_released")
    """Training methods; the others are compared with none, which is plain training."""
    strength: float = 0.3  # RMS perturbation of a token's score: epsilon / sqrt(tokens).
    noise: float = 0.1  # Standard deviation of the noise on pixels in [0, 1].
    folds: int = 5  # Parts of the photos; each is tested once, with a seed of its own.
    input_size: int = 224  # Side of the model's input in pixels.


DEFAULTS = ImageStudyConfig()


METRICS = ("accuracy", "pixels", "tokens", "deletion", "shares", "stability", "energy")
SETTINGS = "settings.json"
# MemeTector's MLP of 2048 and 1024 units needs thousands of photos; AbMILP's self-attention
# would mix the tokens whose removal is measured.
OPTIONS: dict[str, dict[str, Any]] = {
    "memetector": {"hidden": [256]},
    "abmilp": {"self_attention": "none"},
}


class Run(NamedTuple):
    """One head, trained and tested."""

    backbone: str
    head: str
    method: str
    fold: int

    @property
    def file(self) -> str:
        return f"{self.backbone}-{self.head}-{self.method}-{self.fold}.npz"


class Material(NamedTuple):
    """Features of one backbone at the taps of one head.

    ``clean`` holds those of the labelled photos, ``noisy`` (each of them Taps) those of the same photos
    with noise, and ``objects`` those of COCO photos; ``inside`` (n, h, w) is the share of each patch
    that lies on an object."""

    clean: Any
    noisy: list[Taps]
    objects: Any
    inside: Tensor


def study(
    data: PhotosAt,
    objects: ObjectsAt,
    labels: Path | None = None,
    output: OutputAt = "runs/study-image",
    config: ImageStudyConfig = DEFAULTS,
) -> Iterator[str]:
    """Train and test everything; yields lines of progress, then the tables.

    Args:
        data: photos, with one folder per class.
        labels: see :func:`~xattn.photos.labels.read_labels`.
        objects: a folder with ``images/`` and ``masks/`` or ``boxes/``.
        output: the folder for features and the values of every run; the same command resumes from there.
    """
    data, output = Path(data), Path(output)
    for kind in config.heads:
        _attentive(kind)
    for name, path in (("data", data), ("labels", labels), ("objects", objects)):
        if path is not None and not path.exists():
            raise ValueError(f"{name}: no file or folder {path}")
    check_folder(output)
    inputs = {
        "data": open_photos(data).describe(),
        "labels": None if labels is None else file_sha256(labels),
        "objects": open_photos(objects / "images").describe(),
        "metrics": METRICS,
    }
    kept_record(output / SETTINGS, {**inputs, **asdict(config)})
    results: dict[tuple[str, str, str], dict[str, NDArray[Any]]] = {}
    for backbone in config.backbones:
        for head in config.heads:
            runs = [
                Run(backbone, head, method, fold)
                for fold in range(config.folds)
                for method in config.methods
            ]
            if not all((output / run.file).is_file() for run in runs):
                yield from _runs(runs, data, labels, objects, output, config)
            stored = {run: _stored(output / run.file) for run in runs}
            check_photos(stored)
            for method in config.methods:
                parts = [values for run, values in stored.items() if run.method == method]
                results[backbone, head, method] = _joined(parts)
    write_json(output / "results.json", summary(results))
    for backbone in config.backbones:
        own = {", ".join(key[1:]): [_lists(v)] for key, v in results.items() if key[0] == backbone}
        write_rows(output / f"values-{backbone}.csv", raw_rows(own))
    yield from report(results, config)


def _runs(
    runs: Sequence[Run],
    data: Path,
    labels: Path | None,
    objects: Path,
    output: Path,
    config: ImageStudyConfig,
) -> Iterator[str]:
    """Carry out the runs of one backbone and head that are not finished yet."""
    name, kind = runs[0].backbone, runs[0].head
    backbone = load_backbone(name, "package", input_size=config.input_size)
    if backbone.is_vit or kind != "memetector":  # memetector reads a CNN's default taps
        backbone = backbone.with_taps(_attentive(kind).default_taps(backbone.depth))
    photos = list_images(data)
    used = read_labels([str(p) for p in photos], labels).used
    photos = [photos[i] for i in used]
    classes = read_labels([str(p) for p in photos], labels)
    found = material(backbone, photos, objects, output / f"features-{name}-{kind}", config)
    tokens = int(np.prod(found.clean.grid))
    left = [run for run in runs if not (output / run.file).is_file()]
    for fold in sorted({run.fold for run in left}):
        parts, own = splits.split(classes, 0, fold, config.folds), Split("image", photos)
        heads: dict[Run, AttentiveHead] = {}
        epochs: dict[Run, int] = {}
        for run in (run for run in left if run.fold == fold):
            options = {"class_names": classes.names, **OPTIONS.get(kind, {})}
            head = seeded_head(kind, backbone, fold, **options)
            assert isinstance(head, AttentiveHead)
            recipe = ProbeConfig(
                recipe="small",
                epochs=40,
                patience=10,
                attention=run.method,  # type: ignore[arg-type]
                epsilon=config.strength * tokens**0.5,
                seed=fold,
            )
            done = probe(
                head, found.clean, classes.index, recipe, train=own.fit(parts.train),
                validation=own.choose(parts.validation), progress=False,
            )  # fmt: skip
            heads[run], epochs[run] = head, done.best_epoch + 1
        tested = own.score(parts.test)
        # One pass through the backbone serves the heads of all methods.
        slopes = [
            pixel_gradients(backbone, photos[i], list(heads.values()), classes.index[i : i + 1])
            for i in tested
        ]
        own.score([Path(name) for name in found.objects.names])
        own.write(output / f"split-{name}-{kind}-{fold}.json")
        for head, run, by_photo in zip(
            heads.values(), heads, zip(*slopes, strict=True), strict=True
        ):
            values = measure(head, found, classes.index, tested, by_photo)
            values["names"] = np.array(
                [f"{photos[i].parent.name}/{photos[i].name}" for i in tested]
            )
            with atomic_file(output / run.file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **values)  # type: ignore[arg-type]
            shown = "  ".join(f"{k} {np.nanmean(v):.3f}" for k, v in values.items() if k in METRICS)
            yield f"{name} {kind} {run.method} fold {fold}: {epochs[run]} epochs  {shown}"


def _attentive(kind: str) -> type[AttentiveHead]:
    found = head_class(kind)
    if not issubclass(found, AttentiveHead):
        raise ValueError(f"heads: {kind!r} does not pool by attention; see AttentiveHead")
    return found


def material(
    backbone: Backbone,
    photos: Sequence[Path],
    objects: Path,
    folder: Path,
    config: ImageStudyConfig,
) -> Material:
    """The features of all photos; those without noise are cached in ``folder``."""
    others = list_images(objects / "images")
    clean = cache_features(backbone, photos, folder / "clean", progress=False)
    coco = cache_features(backbone, others, folder / "objects", progress=False)
    for features in (clean, coco):
        if features.skipped:
            raise ValueError(f"data: {features.skipped[0][0]}: {features.skipped[0][1]}")
    names = {i: THING_IDS.get(i, f"stuff {i}") for i in range(1, 256)}
    masks = MaskFolder(objects / "masks", names, dict(enumerate(THING_IDS.values())))
    inside = []
    for path in others:
        photo = load_image(path)
        view = make_view((photo.height, photo.width), backbone.preprocessing)
        found = masks.of(path, view).masks.values()
        whole = torch.stack(list(found)).any(0) if found else torch.zeros(1, *view.input_size)
        inside.append(F.adaptive_avg_pool2d(whole.float(), coco.grid)[0])
    noisy = [_noisy(backbone, path, i, config.noise) for i, path in enumerate(photos)]
    return Material(clean, noisy, coco, torch.stack(inside))


@torch.inference_mode()
def _noisy(backbone: Backbone, path: Path, seed: int, noise: float) -> Taps:
    image = prepare(load_image(path), backbone.preprocessing)[0]
    noise_of = torch.Generator().manual_seed(seed)
    image = (image + noise * torch.randn(image.shape, generator=noise_of)).clamp(0, 1)
    return backbone(image[None].to(backbone.device))  # type: ignore[no-any-return]


@torch.no_grad()
def measure(
    head: AttentiveHead,
    found: Material,
    labels: Tensor,
    test: Sequence[int],
    slopes: Sequence[Tensor],
) -> dict[str, NDArray[Any]]:
    """Values (n,) of the test photos and, under ``energy``, those of the photos with objects.

    ``slopes`` holds the gradients (N,) that :func:`pixel_gradients` gives for each test photo."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for i, slope in zip(test, slopes, strict=True):
        tokens = head.tokens(found.clean.taps([i]))
        target = labels[i : i + 1]
        logits = head.logits(tokens)
        guess = int(logits.argmax())
        attention = head.query_maps(tokens).mean(1).flatten()
        drop = deletion(head, tokens, guess)
        noisy = head.query_maps(head.tokens(found.noisy[i])).mean(1).flatten()
        values["accuracy"].append(float(guess == int(target)))
        pairs = {
            "pixels": (attention, slope),
            "tokens": (attention, gradient(head, tokens, target)),
            "deletion": (attention, drop),
            "shares": (head.class_maps(tokens, guess).maps.flatten(), drop),
            "stability": (attention, noisy),
        }
        for name, (a, b) in pairs.items():
            values[name].append(float(pearson(a[None], b[None])))
    for i in range(len(found.objects)):
        a = head.query_maps(head.tokens(found.objects.taps([i]))).mean(1)[0]
        inside = found.inside[i]
        share = float((a * inside).sum() / a.sum()) - float(inside.mean())
        values["energy"].append(share if 0 < inside.mean() < 1 else float("nan"))
    return {"photos": np.array(test), **{k: np.array(v) for k, v in values.items()}}


def gradient(head: AttentiveHead, tokens: Tokens, target: Tensor) -> Tensor:
    """(N,): the norm of the loss's gradient with respect to each token in all taps, for one photo."""
    with torch.enable_grad():
        patches = tuple(p.detach().requires_grad_() for p in tokens.patches)
        loss = F.cross_entropy(head.logits(tokens._replace(patches=patches)), target)
        slopes = torch.autograd.grad(loss, patches)
    return torch.stack([s[0].square().sum(-1) for s in slopes]).sum(0).sqrt()


def pixel_gradients(
    backbone: Backbone, photo: Path, heads: Sequence[AttentiveHead], target: Tensor
) -> list[Tensor]:
    """For each head (N,): the RMS of the loss's gradient over the pixels of each token's cell."""
    pixels = prepare(load_image(photo), backbone.preprocessing)[0][None].to(backbone.device)
    pixels.requires_grad_()
    found = []
    with torch.enable_grad():
        taps = backbone(pixels)
        for head in heads:
            tokens = head.tokens(taps)
            loss = F.cross_entropy(head.logits(tokens), target)
            slope = torch.autograd.grad(loss, pixels, retain_graph=True)[0]
            squares = slope.square().sum(1, keepdim=True)
            found.append(F.adaptive_avg_pool2d(squares, tokens.grid).flatten().sqrt())
    return found


def deletion(head: AttentiveHead, tokens: Tokens, target: int) -> Tensor:
    """(N,): the drop in the probability of class ``target`` without each token of one photo."""
    attended = head.attend(tokens)
    first = attended.scores.shape[-1] - tokens.grid[0] * tokens.grid[1]

    def without(position: Tensor) -> Tensor:
        hidden = torch.arange(attended.scores.shape[-1]) == position
        scores = attended.scores.masked_fill(hidden, -torch.inf)
        return head.classify(attended.with_scores(scores)).softmax(1)[0, target]

    positions = torch.arange(first, attended.scores.shape[-1])
    left = torch.vmap(without, chunk_size=64)(positions)
    return head.classify(attended).softmax(1)[0, target] - left


# ---------------------------------------------------------------------- tables


def _stored(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def check_photos(stored: dict[Run, dict[str, NDArray[Any]]]) -> None:
    """Check that compared runs were tested on the same photos.

    For one backbone and head, every method in a fold must have been tested on the same photos as the
    method ``none``, in the same order, and each photo must be in exactly one fold. Photos are identified
    by their index among those with a label and, if both runs stored it, by their name.
    """
    for run, values in stored.items():
        plain = run._replace(method="none")
        for key in ("photos", "names"):
            both = key in values and key in stored[plain]
            if both and not np.array_equal(values[key], stored[plain][key]):
                raise ValueError(
                    f"output: {run.file} and {plain.file} tested other photos; delete both, and run "
                    f"the same command again"
                )
        if len(values["energy"]) != len(stored[Run(*run[:2], "none", 0)]["energy"]):
            raise ValueError(
                f"output: {run.file} tested other photos with objects; delete it, and run the same "
                f"command again"
            )
    plain_runs = [run for run in stored if run.method == "none"]
    tested = np.bincount(np.concatenate([stored[run]["photos"] for run in plain_runs]))
    if (tested != 1).any():
        photo = int(np.flatnonzero(tested != 1)[0])
        raise ValueError(
            f"output: photo {photo} is tested {tested[photo]} times in the folds of "
            f"{plain_runs[0].backbone} {plain_runs[0].head}, not once; delete these runs, and run the "
            f"same command again"
        )


def _joined(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The folds joined in order; energy (photos with objects) is averaged over the folds' heads."""
    joined = {
        k: np.concatenate([p[k] for p in parts]) for k in ("names", *METRICS) if k != "energy"
    }
    return {**joined, "energy": np.mean([p["energy"] for p in parts], 0)}


def _lists(values: dict[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in values.items() if array.ndim == 1}


def summary(results: dict[tuple[str, str, str], dict[str, NDArray[Any]]]) -> list[dict[str, Any]]:
    """One record per backbone, head and method: means, and differences from ``none``, with intervals."""
    records = []
    for (backbone, head, method), values in results.items():
        record: dict[str, Any] = {"backbone": backbone, "head": head, "method": method}
        plain = results[backbone, head, "none"]
        for name in METRICS:
            record[name] = mean_interval(values[name])._asdict()
            if method != "none":
                difference = paired_difference(values[name], plain[name])
                record[f"{name} - none"] = difference._asdict()
        records.append(record)
    return records


def report(
    results: dict[tuple[str, str, str], dict[str, NDArray[Any]]], config: ImageStudyConfig
) -> Iterator[str]:
    """Markdown tables: means for ``none``, differences for the others, bold if their interval
    excludes 0."""
    records = summary(results)
    for backbone in config.backbones:
        yield ""
        yield f"{backbone}: `none`, and differences from it with paired 95 % intervals"
        yield ""
        yield "| head | method | " + " | ".join(METRICS) + " |"
        yield "| :-- | :-- |" + " --: |" * len(METRICS)
        for record in records:
            if record["backbone"] == backbone:
                suffix = "" if record["method"] == "none" else " - none"
                cells = " | ".join(_cell(record[name + suffix], suffix) for name in METRICS)
                yield f"| {record['head']} | {record['method']} | {cells} |"


def _cell(value: dict[str, float], suffix: str) -> str:
    text = f"{value['mean']:{'+' if suffix else ''}.3f} [{value['lo']:.3f}, {value['hi']:.3f}]"
    apart = suffix and (value["lo"] > 0 or value["hi"] < 0)
    return f"**{text}**" if apart else text
