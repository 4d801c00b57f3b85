"""Words on frozen tokens: does a caption's word match its photo, and does its map find the object?

    python -m xattn.eval.studies words photos/ --labels classes.json --annotations coco/ \\
        -b vit_tiny_patch16_224

The head ``words`` learns from photos with one known word each, the name of their class. A caption
has that word and random others; the loss asks which of them is the photo's. The baseline ``gap``
learns from the same captions, by a linear classifier on the mean of the same patches, scaled in the
same way. Captions are matched by folds of the photos. For the maps, heads learn from all photos and
explain other photos, in which objects are outlined.

Finished results stay in the output folder, and the same command resumes from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.backbone import Backbone
from xattn.eval.annotations import MaskFolder
from xattn.eval.annotations.coco import THING_IDS, THINGS
from xattn.eval.bootstrap import Interval, mean_interval, paired_difference
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.localization import energy_pointing_values, pointing_values
from xattn.eval.studies.options import Network, ObjectsAt, OutputAt, PhotosAt, Quick
from xattn.eval.studies.run_files import Found, measure_rows, raw_rows, reported
from xattn.eval.studies.small_training import minimize
from xattn.explainers import create_explainer
from xattn.heads import AttentiveHead, Tokens, WordHead, save_head
from xattn.heads.base import seeded_head
from xattn.photos.images import list_images, load_image
from xattn.photos.labels import Labels, read_labels
from xattn.photos.sources import Files, open_photos
from xattn.photos.view import make_view
from xattn.runtime.files import check_folder
from xattn.training.features import Features, cache_features
from xattn.training.labelled import stratified_folds


@dataclass(frozen=True)
class WordStudyConfig:
    """Settings of the word head: how it is trained by captions, and on which tokens."""

    tokens: tuple[str, ...] = ()
    """Taps to compare, such as block.7 and head; by default, the tokens that enter the last third
    of the blocks, and the final ones."""
    caption: int = 4  # Words per caption: the photo's own, and random others.
    width: int = 32  # Width of the table of words.
    heads: int = 3  # Heads of the attention to words.
    steps: int = 150  # Steps of AdamW; the rate rises for a tenth, then half a cosine to 0.
    lr: float = 4e-3  # Peak learning rate.
    weight_decay: float = 0.05  # Of all weights.
    batch_size: int = 32  # Photos per step.
    folds: int = 4  # Parts of the photos; each is tested once by heads that learn from the others.
    seeds: int = 3  # Heads for each fold, and heads on all photos for the maps.
    seed: int = 0  # For the folds and the test captions.

    def quick(self) -> WordStudyConfig:
        """A few steps, to check that everything runs; its figures mean nothing."""
        return replace(self, steps=min(self.steps, 3), folds=2, seeds=1)


DEFAULTS = WordStudyConfig()
HEADS = ("words", "gap")
COVERED = {
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "mammal": "horse, sheep, cow, elephant, bear, zebra, giraffe",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
}
"""COCO's categories for words that are not categories: its groups, minus those with their own word."""


@dataclass(frozen=True)
class Object:
    """What a word names in a photo: indices of photo and word, and pixels (1, H, W) bool."""

    photo: int
    word: int
    mask: Tensor


@dataclass(frozen=True)
class Material:
    """Features of the labelled photos and of photos with objects, by the name of the tokens."""

    backbones: Mapping[str, Backbone]
    photos: Mapping[str, Features]
    labels: Labels
    others: Mapping[str, Features]
    objects: Sequence[Object]
    centre: Tensor  # (1, 1, H, W): a map that ignores the photo, a Gaussian around the centre.


def study(
    backbone: Network,
    data: PhotosAt,
    objects: ObjectsAt,
    labels: str | Path | None = None,
    output: OutputAt = "runs/study-words",
    config: WordStudyConfig = DEFAULTS,
    quick: Quick = False,
    *,
    progress: bool = True,
) -> Iterator[str]:
    """Train and test the heads that are not finished yet, write report.md, and yield its lines.

    Args:
        data, labels: photos and their words, as for ``xattn probe``.
        objects: a folder with images/ and masks/ of COCO's categories.
        output: the folder for features, trained heads, measurements and the report.
    """
    config = config.quick() if quick else config
    output = Path(output)
    check_folder(output)
    found = material(backbone, data, labels, Path(objects), output, config, progress)
    rows = {
        f"{tap}-{head}": partial(measure, found, tap, head, config, output)
        for tap in found.photos
        for head in HEADS
    }
    measured = measure_rows(output, _settings(found, config), rows, config.seeds)
    lines = [
        f"{backbone.name}, {len(found.labels.used)} photos of {len(found.labels.names)} words, captions of "
        f"{config.caption}, {config.folds} folds, {config.seeds} seeds; {len(found.objects)} objects in "
        f"{len({o.photo for o in found.objects})} other photos",
        *_matches(found, measured, config),
        *_maps(found, measured),
        *_differences(found, measured),
    ]
    yield from reported(output, lines, {"values": raw_rows(measured)})


def material(
    backbone: Backbone,
    data: str | Path,
    labels: str | Path | None,
    objects: Path,
    output: Path,
    config: WordStudyConfig,
    progress: bool = True,
) -> Material:
    """The photos, their features and objects; features are stored in ``output``."""
    everything = open_photos(data)
    if not isinstance(everything, Files):
        raise ValueError(f"data: {data} holds no files; give a folder or a list of photos")
    known = read_labels([everything.name(i) for i in range(len(everything))], labels)
    chosen = everything.part(known.used)
    taps = config.tokens or (*WordHead.default_taps(backbone.depth), "head")
    backbones = {tap: backbone.with_taps([tap]) for tap in taps}
    others = list_images(objects / "images")
    photos, found = (
        {
            tap: cache_features(own, some, output / "features" / f"{tap}-{part}", progress=progress)
            for tap, own in backbones.items()
        }
        for part, some in (("photos", chosen), ("objects", others))
    )
    first = next(iter(photos.values()))
    words = read_labels(first.names, labels)
    outlined = _objects(backbone, others, objects / "masks", words.names)
    if not outlined:
        raise ValueError(
            f"objects: no mask in {objects} shows any of {', '.join(words.names)}; give photos of them"
        )
    blank = torch.zeros(1, 3, *backbone.preprocessing.input_size)
    centre = create_explainer("centre", backbone).attribute(blank, torch.zeros(1, dtype=torch.long))
    return Material(backbones, photos, words, found, outlined, centre)


def _objects(
    backbone: Backbone, photos: Sequence[Path], masks: Path, words: Sequence[str]
) -> list[Object]:
    """The objects of each word in a photo, merged, as far as the model's crop shows them."""
    named = {category: category for category in THINGS}
    for group, categories in COVERED.items():
        named.update({c: group for c in categories.split(", ") if c not in words})
    word_of = {category: words.index(w) for category, w in named.items() if w in words}
    everything = {i: THING_IDS.get(i, f"stuff {i}") for i in range(1, 256)}
    folder = MaskFolder(masks, everything, dict(enumerate(THINGS)))
    found = []
    for number, path in enumerate(photos):
        photo = load_image(path)
        view = make_view((photo.height, photo.width), backbone.preprocessing)
        by_word: dict[int, Tensor] = {}
        for k, mask in folder.of(path, view).masks.items():
            word = word_of.get(THINGS[k])
            if word is not None:
                by_word[word] = by_word[word] | mask if word in by_word else mask
        found += [Object(number, word, mask) for word, mask in sorted(by_word.items())]
    return found


def _settings(found: Material, config: WordStudyConfig) -> dict[str, Any]:
    """The settings that all results depend on; seeds may be added later."""
    return {
        "features": {tap: some.digest for tap, some in found.photos.items()},
        "objects": {tap: some.digest for tap, some in found.others.items()},
        "labels": found.labels.index.tolist(),
        "outlined": [[o.photo, o.word, int(o.mask.sum())] for o in found.objects],
        "config": {k: v for k, v in asdict(config).items() if k not in ("tokens", "seeds")},
    }


# ---------------------------------------------------------------------- training


def draw_captions(labels: Tensor, words: int, length: int, generator: torch.Generator) -> Tensor:
    """(n, K) bool: a caption of ``length`` words for each photo, with its own word and random others."""
    drawn = torch.rand(len(labels), words, generator=generator)
    drawn[torch.arange(len(labels)), labels] = 2
    chosen = drawn.topk(min(length, words), 1).indices
    return torch.zeros(len(labels), words, dtype=torch.bool).scatter(1, chosen, True)


def read(head: AttentiveHead, features: Features, index: Sequence[int]) -> Tokens:
    """The tokens of photos. For ``gap`` they are scaled in the same way as in the head ``words``,
    so that their size makes no difference between the two."""
    tokens = head.tokens(features.taps(index))
    if isinstance(head, WordHead):
        return tokens
    scaled = tuple(F.layer_norm(x, x.shape[-1:]) for x in tokens.patches)
    return tokens._replace(patches=scaled)


def matches(head: AttentiveHead, tokens: Tokens, captions: Tensor) -> Tensor:
    """Logits (B, K) of the words of each caption, -inf for the others; ``gap`` reads no caption."""
    if isinstance(head, WordHead):
        return head.match(tokens, captions)
    return head.logits(tokens).masked_fill(~captions, -torch.inf)


def train(
    head: AttentiveHead,
    features: Features,
    labels: Tensor,
    index: Sequence[int],
    config: WordStudyConfig,
    seed: int,
) -> float:
    """Train ``head`` by captions of the photos ``index`` and return the CPU seconds of one thread."""
    generator = torch.Generator().manual_seed(seed)
    tokens, own = read(head, features, index), labels[list(index)]

    def losses() -> Iterator[Tensor]:
        for _ in range(config.steps):
            rows = torch.randint(len(own), (config.batch_size,), generator=generator)
            captions = draw_captions(own[rows], head.num_classes, config.caption, generator)
            yield F.cross_entropy(matches(head, _rows(tokens, rows), captions), own[rows])

    return minimize(head, losses(), config.steps, config.lr, config.weight_decay)


def _rows(tokens: Tokens, rows: Tensor) -> Tokens:
    return Tokens(tuple(x[rows] for x in tokens.patches), tokens.prefix[rows], tokens.grid)


def _new_head(
    found: Material, tap: str, name: str, config: WordStudyConfig, seed: int
) -> AttentiveHead:
    options: dict[str, Any] = {"class_names": found.labels.names}
    if name == "words":
        options |= {"width": config.width, "heads": config.heads, "norm": False}
    head = seeded_head(name, found.backbones[tap], seed, **options)
    assert isinstance(head, AttentiveHead)
    return head


# ---------------------------------------------------------------------- measuring


def measure(
    found: Material,
    tap: str,
    name: str,
    config: WordStudyConfig,
    output: Path,
    split: Split,
    seed: int,
) -> dict[str, Any]:
    """Train and test a head for each fold, and one on all photos; word heads are saved in ``output``.

    Returns:
        For each photo, whether its word is ``matched`` within its caption and among ``all`` words; the CPU
        ``seconds`` of each training; and :func:`measure_maps` for each kind of ``maps``.
    """
    labels, features, captions = found.labels.index, found.photos[tap], _tested(found, config)
    right = {"matched": [0.0] * len(labels), "all": [0.0] * len(labels)}
    seconds = []
    paths = [Path(photo) for photo in features.names]
    for seen, fold in _folds(found, config):
        own = split.fold(paths)
        head = _new_head(found, tap, name, config, seed)
        seconds.append(train(head, features, labels, own.fit(seen), config, seed))
        tokens = read(head, features, own.score(fold))
        with torch.no_grad():
            answers = {"matched": matches(head, tokens, captions[fold]), "all": head.logits(tokens)}
        for key, logits in answers.items():
            for i, same in zip(fold, (logits.argmax(1) == labels[fold]).tolist(), strict=True):
                right[key][i] = float(same)
    own = split.fold(paths)
    head = _new_head(found, tap, name, config, seed)
    seconds.append(train(head, features, labels, own.fit(range(len(labels))), config, seed))
    if name == "words":
        save_head(head, output / f"{tap}-words-{seed}")
    own.score([Path(photo) for photo in found.others[tap].names])
    maps = {kind: measure_maps(found, tap, head, kind) for kind in _kinds(name)}
    return {**right, "seconds": seconds, "maps": maps}


def _tested(found: Material, config: WordStudyConfig) -> Tensor:
    """The test captions, (n, K) bool, which are the same for all heads."""
    generator = torch.Generator().manual_seed(config.seed)
    return draw_captions(found.labels.index, len(found.labels.names), config.caption, generator)


def _folds(found: Material, config: WordStudyConfig) -> Iterator[tuple[list[int], list[int]]]:
    """The training photos and the test photos of each fold."""
    groups = [found.labels.names[i] for i in found.labels.index.tolist()]
    for fold in stratified_folds(groups, config.folds, config.seed):
        yield sorted(set(range(len(groups))) - set(fold)), fold


def _frequent(found: Material, config: WordStudyConfig) -> dict[str, list[float]]:
    """Like :func:`measure`, for a baseline that reads no photo: the most frequent word in training."""
    labels, captions = found.labels.index, _tested(found, config)
    right = {"matched": [0.0] * len(labels), "all": [0.0] * len(labels)}
    for seen, fold in _folds(found, config):
        split = Split("words, the most frequent", next(iter(found.photos.values())).names)
        counts = torch.bincount(labels[split.fit(seen)], minlength=captions.shape[1])
        for i in split.score(fold):
            asked = counts.masked_fill(~captions[i], -1)
            right["matched"][i] = float(asked.argmax() == labels[i])
            right["all"][i] = float(counts.argmax() == labels[i])
    return right


def _kinds(name: str) -> tuple[str, ...]:
    return ("shares", "attention", "another word") if name == "words" else ("shares",)


@torch.no_grad()
def measure_maps(
    found: Material, tap: str, head: AttentiveHead, kind: str
) -> dict[str, list[float | None]]:
    """For each object, whether the maximum of its word's map lies on it, and which share of the
    map's positive part does; None if the map has no positive part.

    Args:
        kind: ``"shares"`` of the word's logit; ``"attention"``, where the word is read; or ``"another
            word"``, the mean shares of all words that the photo does not show.
    """
    values: dict[str, list[float | None]] = {"pointing": [], "energy": []}
    for one in found.objects:
        tokens = read(head, found.others[tap], [one.photo])
        shown = {o.word for o in found.objects if o.photo == one.photo}
        words = [one.word]
        if kind == "another word":
            words = [k for k in range(head.num_classes) if k not in shown]
        if kind == "attention":
            assert isinstance(head, WordHead)
            maps = head.reading_maps(tokens)[:, words]
        else:
            maps = head.class_maps(tokens, torch.tensor([words])).maps
        size = one.mask.shape[-2:]
        fine = F.interpolate(maps, size, mode="bilinear").transpose(0, 1)
        masks = one.mask[None].expand(len(words), -1, -1, -1)
        hits = pointing_values(fine, masks, tolerance=0) / 100
        shares = energy_pointing_values(fine.clamp_min(0), masks)
        values["pointing"].append(float(hits.mean()))
        share = float(shares.nanmean())
        values["energy"].append(None if np.isnan(share) else share)
    return values


def _unseeing(found: Material) -> dict[str, list[float | None]]:
    """:func:`measure_maps` for the centre map; ``area`` is the energy of a constant map."""
    values: dict[str, list[float | None]] = {"pointing": [], "energy": [], "area": []}
    for one in found.objects:
        hit = pointing_values(found.centre, one.mask[None], tolerance=0)
        values["pointing"].append(float(hit) / 100)
        values["energy"].append(float(energy_pointing_values(found.centre, one.mask[None])))
        values["area"].append(float(one.mask.double().mean()))
    return values


# ---------------------------------------------------------------------- tables


def _matches(found: Material, measured: Found, config: WordStudyConfig) -> Iterator[str]:
    words = len(found.labels.names)
    yield ""
    yield (
        f"| tokens | head | match, of {config.caption} words | of all {words} words | "
        f"CPU seconds of a training |"
    )
    yield "| :-- | :-- | --: | --: | --: |"
    for tap in found.photos:
        for name in HEADS:
            records = measured[f"{tap}-{name}"]
            cells = [mean_interval(_mean(records, key)).text(3) for key in ("matched", "all")]
            seconds = [s for record in records for s in record["seconds"]]
            spent = f"{np.mean(seconds):.1f}, at most {max(seconds):.1f}"
            yield f"| {tap} | {name} | {' | '.join(cells)} | {spent} |"
    cells = [mean_interval(values).text(3) for values in _frequent(found, config).values()]
    yield f"| none | the most frequent word | {' | '.join(cells)} | |"
    chances = (1 / min(config.caption, words), 1 / words)
    yield f"| none | by chance | {chances[0]:.3f} | {chances[1]:.3f} | |"


def _maps(found: Material, measured: Found) -> Iterator[str]:
    yield ""
    yield "| tokens | map | pointing | energy on the object | energy less area |"
    yield "| :-- | :-- | --: | --: | --: |"
    unseeing = _by_photo(found, [_unseeing(found)])
    area = unseeing["area"]
    for tap in found.photos:
        for name in HEADS:
            for kind in _kinds(name):
                records = [record["maps"][kind] for record in measured[f"{tap}-{name}"]]
                yield _row(f"{tap} | {name}, {kind}", _by_photo(found, records), area)
    yield _row("none | centre", unseeing, area)
    yield f"| none | everywhere alike | | {mean_interval(area).text(3)} | |"


def _differences(found: Material, measured: Found) -> Iterator[str]:
    """Differences paired by photo: the maps and matches of ``words`` minus those of its controls."""
    yield ""
    yield "| tokens | words less | match | pointing | energy on the object |"
    yield "| :-- | :-- | --: | --: | --: |"
    for tap in found.photos:
        both = [measured[f"{tap}-{name}"] for name in HEADS]
        matched = paired_difference(*(_mean(records, "matched") for records in both))
        own = _by_photo(found, [record["maps"]["shares"] for record in both[0]])
        gap = _by_photo(found, [record["maps"]["shares"] for record in both[1]])
        others = _by_photo(found, [record["maps"]["another word"] for record in both[0]])
        for label, first, control in (
            ("gap", _signed(matched), gap),
            ("maps of other words", "", others),
        ):
            cells = [_signed(paired_difference(own[k], control[k])) for k in ("pointing", "energy")]
            yield f"| {tap} | {label} | {first} | {' | '.join(cells)} |"


def _row(label: str, values: Mapping[str, Sequence[float]], area: Sequence[float]) -> str:
    above = paired_difference(values["energy"], area)
    cells = [mean_interval(values[key]).text(3) for key in ("pointing", "energy")]
    return (
        f"| {label} | {' | '.join(cells)} | {above.mean:+.3f} [{above.lo:+.3f}, {above.hi:+.3f}] |"
    )


def _by_photo(
    found: Material, records: Sequence[Mapping[str, Sequence[float | None]]]
) -> dict[str, list[float]]:
    """For each photo, the mean over seeds and over the photo's objects; NaN without a value."""
    photos = np.array([one.photo for one in found.objects])
    values = {}
    for key in records[0]:
        table = np.array([record[key] for record in records], dtype=np.float64)
        columns = [table[:, photos == photo].ravel() for photo in np.unique(photos)]
        values[key] = [
            float(np.nanmean(column)) if (~np.isnan(column)).any() else np.nan for column in columns
        ]
    return values


def _signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.lo:+.3f}, {found.hi:+.3f}]"


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean over seeds, for each photo."""
    return [float(x) for x in np.mean([record[key] for record in records], 0)]
