"""Probing heads side by side: accuracy, calibration, parameters and operations of each in one table.

    xattn probe --data PHOTOS --heads gap efficient_probe abmilp

Features are cached once for each set of taps that the heads ask for. Every head is trained on the same
photos, stopped early by the same validation photos, and reported on the test photos, which nothing
else looks at. Of several folds or seeds the test answers are put together.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xattn.backbone import Backbone, load_backbone
from xattn.config import ProbeConfig
from xattn.eval.bootstrap import Interval, mean_intervals
from xattn.eval.heads_bench import macs
from xattn.eval.speed import median_ratio, times, write_photos
from xattn.heads import AttentiveHead, Tokens, create_head, head_class, parse_options
from xattn.photos.base import Photos
from xattn.photos.image_files import Files
from xattn.photos.sources import open_photos
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, write_json
from xattn.training.attention_training import create_perturbation
from xattn.training.features import Features, cache_features
from xattn.training.labels import Labels, read_labels, split
from xattn.training.probe import ProbeScores, answers, create_optimizer, probe
from xattn.training.run_folder import RUN_FILE
from xattn.training.sample import SAMPLE_FOLDER, Sample


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """What ``xattn probe`` does.

    ``heads`` are names, with options in ``options`` as ``head.name=value``. ``folds`` of five tell
    which photos are reported; ``seeds`` are those of the heads' weights and of the order of photos.
    The split is a function of ``split_seed`` alone. ``taps`` replace those that each head asks for.
    With ``sample`` so many photos are explained at each checkpoint of each head, in ``sample`` beside it.
    """

    backbone: Backbone
    data: Any
    labels: str | Path | None
    heads: Sequence[str]
    options: Sequence[str] = ()
    taps: Sequence[str] | None = None
    config: ProbeConfig = field(default_factory=ProbeConfig)
    folds: Sequence[int] = (0,)
    seeds: Sequence[int] = (0,)
    split_seed: int = 0
    views: int = 1
    dtype: Any = "float32"
    batch_size: int = 16
    workers: int = 0
    features: Path = Path("runs/probe/features")
    sample: int = 0


@dataclass
class ProbeRow:
    """One head of the table. ``correct`` (photos, seeds) holds 1 where the answer was right, ``ece``
    is that of all answers together, ``macs`` counts one photo's multiply-adds, tokens to logits."""

    head: str
    accuracy: Interval
    ece: float
    parameters: int
    macs: int
    seconds: float
    best_epochs: list[int]
    correct: np.ndarray


def run_probes(
    job: ProbeJob,
    output: Path,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[list[ProbeRow], Labels, list[tuple[str, str]]]:
    """Cache, split, train and report; the rows, the labels, and photos that could not be read.

    The heads lie in ``output/<head>/head``, with several folds or seeds in
    ``output/<head>/fold-<k>-seed-<s>/head``. With ``resume`` finished heads are not trained again;
    without it an ``output`` that holds one of them is refused.
    """
    if not job.heads or not job.folds or not job.seeds:
        raise ValueError("heads, folds, seeds: got none of one of them; give at least one of each")
    if len(set(job.heads)) < len(job.heads):
        raise ValueError(f"heads: got one twice in {', '.join(job.heads)}")
    for name, numbers in (("folds", job.folds), ("seeds", job.seeds)):
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name}: got one twice in {', '.join(map(str, numbers))}")
    fixed = [n for n in job.heads if not getattr(head_class(n), "learns_scores", True)]
    if job.config.attention != "none" and fixed:
        raise ValueError(
            f"attention: the scores of {', '.join(fixed)} are fixed; train only heads that learn their "
            f"scores, with --heads efficient_probe abmilp for example"
        )
    options = _options(job)
    runs = [
        _folder(job, output, *run) for run in itertools.product(job.heads, job.folds, job.seeds)
    ]
    begun = [folder for folder in runs if (folder / RUN_FILE).is_file()]
    if begun and not resume:
        raise ValueError(
            f"output: {begun[0]} holds a run already; go on with it by --resume, or give another "
            f"--output"
        )
    photos = open_photos(job.data)
    everything = read_labels([photos.name(i) for i in range(len(photos))], job.labels)
    for fold in job.folds:  # refused before the features are computed
        split(everything, job.split_seed, fold)
    true_names: dict[Path, str] = {}
    if isinstance(photos, Files):  # those without a label need no features
        true_names = {
            photos.paths[i]: everything.names[everything.index[i]] for i in everything.used
        }
        photos = Files([photos.paths[i] for i in everything.used])
    seen: list[Path] = []
    if job.sample:  # refused before the features are computed, too
        seen = Sample(job.backbone, photos, output / SAMPLE_FOLDER, job.sample).paths
    backbones, caches = _features(job, photos, progress)
    features = next(iter(caches.values()))
    labels = read_labels(features.names, job.labels)
    parts = [split(labels, job.split_seed, fold) for fold in job.folds]
    say(
        f"{len(labels.used)} photos of {len(labels.names)} classes: "
        f"{', '.join(f'{n} {int((labels.index == i).sum())}' for i, n in enumerate(labels.names))}; "
        f"{len(everything.index) - len(everything.used)} without a label, "
        f"{len(features.skipped)} not readable"
    )
    rows = []
    for name in job.heads:
        backbone = backbones[name]
        cache = caches[backbone.taps]
        collected: list[ProbeScores] = []
        seconds: list[float] = []
        best: list[int] = []
        for fold, part in zip(job.folds, parts, strict=True):
            for seed in job.seeds:
                config = replace(job.config, seed=seed)
                head = _head(name, backbone, options[name], labels.names, seed)
                folder = _folder(job, output, name, fold, seed)
                shown = None
                if seen:
                    place = folder / SAMPLE_FOLDER
                    classes = {path: labels.names.index(true_names[path]) for path in seen}
                    shown = Sample(backbone, seen, place, job.sample, classes=classes)
                result = probe(
                    head,
                    cache,
                    labels.index,
                    config,
                    train=part.train,
                    validation=part.validation,
                    output=folder,
                    resume=resume and (folder / RUN_FILE).is_file(),
                    progress=progress,
                    on_checkpoint=shown,
                )
                logits = answers(result.head, cache, part.test)
                collected.append(ProbeScores(logits, labels.index[part.test]))
                seconds += result.seconds
                best.append(result.best_epoch)
        rows.append(_row(name, head, cache, collected, len(job.seeds), seconds, best))
    return rows, labels, features.skipped


def _folder(job: ProbeJob, output: Path, head: str, fold: int, seed: int) -> Path:
    several = len(job.folds) * len(job.seeds) > 1
    return output / head / f"fold-{fold}-seed-{seed}" if several else output / head


def _options(job: ProbeJob) -> dict[str, dict[str, Any]]:
    options: dict[str, dict[str, Any]] = {name: {} for name in job.heads}
    for pair in job.options:
        name, found, rest = pair.partition(".")
        if not found or name not in options:
            raise ValueError(
                f"options: got {pair!r}; write head.name=value with a head of {', '.join(options)}"
            )
        options[name].update(parse_options([rest]))
    return options


def _features(
    job: ProbeJob, photos: Photos, progress: bool
) -> tuple[dict[str, Backbone], dict[tuple[str, ...], Features]]:
    """The backbone of every head, one a set of taps over the same weights, and a cache for each set."""
    backbones: dict[str, Backbone] = {}
    by_taps: dict[tuple[str, ...], Backbone] = {}
    for name in job.heads:
        kind = head_class(name)
        if not issubclass(kind, AttentiveHead):
            raise ValueError(f"heads: {name!r} is no classifier; give attentive heads")
        own = job.backbone
        taps = own.taps if own.adapter else tuple(job.taps or kind.default_taps(own.depth))
        if taps not in by_taps:
            by_taps[taps] = own if taps == own.taps else own.with_taps(taps)
        backbones[name] = by_taps[taps]
    caches = {}
    for backbone in dict.fromkeys(backbones.values()):
        folder = job.features / "+".join(backbone.taps)
        caches[backbone.taps] = cache_features(
            backbone,
            photos,
            folder,
            batch_size=job.batch_size,
            workers=job.workers,
            dtype=job.dtype,
            views=job.views,
            seed=job.split_seed,
            progress=progress,
        )
    return backbones, caches


def _head(
    name: str, backbone: Backbone, options: dict[str, Any], classes: Sequence[str], seed: int
) -> AttentiveHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = create_head(name, backbone, class_names=list(classes), **options)
    assert isinstance(head, AttentiveHead)
    return head


def _row(
    name: str,
    head: AttentiveHead,
    features: Features,
    collected: list[ProbeScores],
    seeds: int,
    seconds: list[float],
    best: list[int],
) -> ProbeRow:
    # Photos are resampled, not answers: seeds answer the same photos.
    folds = [collected[i : i + seeds] for i in range(0, len(collected), seeds)]
    correct = np.concatenate(
        [np.stack([s.correct.numpy() for s in fold], 1).astype(np.float64) for fold in folds]
    )
    together = ProbeScores(
        torch.cat([s.logits for s in collected]), torch.cat([s.labels for s in collected])
    )
    return ProbeRow(
        head=name,
        accuracy=mean_intervals(correct.mean(1, keepdims=True))[0],
        ece=together.ece,
        parameters=sum(p.numel() for p in head.parameters()),
        macs=_macs(head, features),
        seconds=statistics.median(seconds) if seconds else math.nan,
        best_epochs=best,
        correct=correct,
    )


def _macs(head: AttentiveHead, features: Features) -> int:
    """Multiply-adds of the products and convolutions from one photo's tokens to its logits."""
    tokens = _moved(head.tokens(features.taps([0])), head)
    return macs(head, tokens) + head.classifier.weight.numel()


def _moved(tokens: Tokens, head: AttentiveHead) -> Tokens:
    device = head.classifier.weight.device
    patches = tuple(p.to(device) for p in tokens.patches)
    return Tokens(patches, tokens.prefix.to(device), tokens.grid)


# ---------------------------------------------------------------------- the table

COLUMNS = ("head", "accuracy %", "ECE %", "parameters", "MACs", "s an epoch")
RESULTS, TABLE = "results.json", "results.csv"


def format_rows(rows: Sequence[ProbeRow]) -> str:
    """Markdown: accuracy with its 95 % bootstrap interval over photos, ECE, parameters, MACs, seconds."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| :-- | --: | --: | --: | --: | --: |"]
    for row in rows:
        a = row.accuracy
        cells = (
            row.head,
            f"{100 * a.mean:.1f} [{100 * a.lo:.1f}, {100 * a.hi:.1f}]",
            f"{100 * row.ece:.1f}",
            f"{row.parameters:,}",
            f"{row.macs:,}",
            f"{row.seconds:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_results(folder: Path) -> None:
    """Refuse a ``folder`` whose ``results.json`` or ``results.csv`` another job has written."""
    try:
        found = strict_json.parse((folder / RESULTS).read_bytes(), nan=True)
        own = isinstance(found, dict) and {"folds", "seeds", "split_seed", "heads"} <= found.keys()
    except FileNotFoundError:
        own = not (folder / TABLE).exists()
    except ValueError:
        own = False
    if not own:
        raise ValueError(
            f"output: {folder} holds results that are not of xattn probe; give another --output"
        )


def write_results(
    rows: Sequence[ProbeRow], labels: Labels, job: ProbeJob, folder: Path
) -> tuple[Path, Path]:
    """``results.json`` and ``results.csv`` in ``folder``.

    Raises:
        ValueError: they are there and of another job, see :func:`check_results`.
    """
    check_results(folder)
    records = [
        {
            "head": row.head,
            "accuracy": row.accuracy.mean,
            "accuracy_lo": row.accuracy.lo,
            "accuracy_hi": row.accuracy.hi,
            "photos": row.accuracy.n,
            "ece": row.ece,
            "parameters": row.parameters,
            "macs": row.macs,
            "seconds_an_epoch": None if math.isnan(row.seconds) else row.seconds,
        }
        for row in rows
    ]
    write_json(
        folder / RESULTS,
        {
            "backbone": {"name": job.backbone.name, "sha256": job.backbone.fingerprint},
            "classes": labels.names,
            "photos": len(labels.used),
            "folds": list(job.folds),
            "seeds": list(job.seeds),
            "split_seed": job.split_seed,
            "config": asdict(job.config),
            "heads": [
                {**record, "best_epochs": row.best_epochs}
                for record, row in zip(records, rows, strict=True)
            ],
        },
    )
    with (
        atomic_file(folder / TABLE) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, records[0])
        writer.writeheader()
        writer.writerows(records)
    return folder / RESULTS, folder / TABLE


# ---------------------------------------------------------------------- speed


def bench(backbones: Sequence[str], rounds: int, data: Path | None = None) -> Iterator[str]:
    """Lines: epochs from cached features beside running the backbone, and attention training steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield f"{device}, {torch.get_num_threads()} threads; weights are random"
    with tempfile.TemporaryDirectory() as temporary:
        folder = data or write_photos(Path(temporary))
        for name in backbones:
            backbone = load_backbone(name, weights=None, taps=("head",), device=device)
            features = cache_features(backbone, folder, Path(temporary) / name, progress=False)
            yield f"\n{name}: {len(features)} photos, grid {features.grid[0]} x {features.grid[1]}\n"
            yield "| head | epoch through the backbone / from features | wanted |"
            yield "| :-- | --: | --: |"
            for head in ("gap", "efficient_probe", "abmilp"):
                ratio = epoch_ratio(
                    _head(head, backbone, {}, ["a", "b"], 0), backbone, features, rounds
                )
                yield f"| {head} | {ratio:.1f}x | at least 20x |"
            yield "\n| head | training | step / plain step | wanted |"
            yield "| :-- | :-- | --: | --: |"
            for head in ("efficient_probe", "abmilp"):
                ratios = step_ratios(_head(head, backbone, {}, ["a", "b"], 0), features, rounds)
                for training, ratio in ratios.items():
                    wanted = {"at": "at most 3.2x", "vat": "at most 4.5x"}.get(training, "")
                    yield f"| {head} | {training} | {ratio:.2f}x | {wanted} |"


def epoch_ratio(
    head: AttentiveHead, backbone: Backbone, features: Features, rounds: int, batch: int = 16
) -> float:
    """Time of an epoch of training ``head`` through ``backbone``, over that from ``features``; photos
    are decoded for the former beforehand, so that the ratio is of the passes alone."""
    index = list(range(len(features)))
    parts = [index[i : i + batch] for i in range(0, len(index), batch)]
    size = backbone.preprocessing.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *size, generator=generator).to(backbone.device)
    step = _stepper(head, "none")

    def cached() -> None:
        for part in parts:
            step(head.tokens(features.taps(part)))

    def through() -> None:
        for part in parts:
            with torch.no_grad():
                taps = backbone(images[: len(part)])
            step(head.tokens(taps))

    took = times({"through": through, "cached": cached}, rounds)
    return median_ratio(took["through"], took["cached"])


def step_ratios(
    head: AttentiveHead, features: Features, rounds: int, batch: int = 32
) -> dict[str, float]:
    """Time of a step with each kind of attention training, over a plain one."""
    tokens = head.tokens(features.taps([i % len(features) for i in range(batch)]))
    kinds = ("none", "random", "at", "iat", "vat", "ivat")

    def repeated(kind: str) -> Callable[[], None]:
        step = _stepper(head, kind)

        def run() -> None:
            for _ in range(5):
                step(tokens)

        return run

    took = times({kind: repeated(kind) for kind in kinds}, rounds, warmup=2)
    return {kind: median_ratio(took[kind], took["none"]) for kind in kinds[1:]}


def _stepper(head: AttentiveHead, kind: str) -> Callable[[Any], None]:
    """A training step as :func:`~xattn.training.probe.probe` takes it, labels 0 and 1 in turn."""
    optimizer = create_optimizer(head, ProbeConfig("small", lr=1e-4))
    perturbation = create_perturbation(kind, **({} if kind == "none" else {"epsilon": 1.0}))
    head.train()

    def step(tokens: Any) -> None:
        attended = head.attend(_moved(tokens, head))
        target = torch.arange(len(attended.scores), device=attended.scores.device) % 2
        loss = perturbation.loss(
            attended.scores,
            lambda scores: head.classify(attended._replace(scores=scores)),
            target,
            module=head,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return step
