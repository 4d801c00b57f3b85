"""Trains the heads of a probing job on cached features, and scores them on the test photos."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xattn.backbone import Backbone
from xattn.eval.evaluation.split import Split
from xattn.eval.probing.probe_job import ProbeJob
from xattn.eval.probing.probe_table import HeadScores, ProbeRow, table_row
from xattn.heads import AttentiveHead, head_class
from xattn.heads.base import seeded_head
from xattn.photos.base import Photos
from xattn.photos.labels import Labels, read_labels
from xattn.photos.sources import Files, open_photos
from xattn.training import labelled as splits
from xattn.training.features import Features, cache_features
from xattn.training.probe import ProbeScores, predict_logits, probe
from xattn.training.run_folder import RUN_FILE
from xattn.training.sample import SAMPLE_FOLDER, Sample


def run_probes(
    job: ProbeJob,
    output: Path,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[list[ProbeRow], Labels, list[tuple[str, str]]]:
    """Cache the features, split the photos, and train and score all heads.

    Each head is written to ``output/<head>/head``, or to ``output/<head>/fold-<k>-seed-<s>/head`` if there
    are several folds or seeds. With ``resume``, finished heads are not trained again.

    Returns:
        The rows of the table, the labels, and the unreadable photos.

    Raises:
        ValueError: a setting is not valid, or ``output`` contains a run and ``resume`` is False.
    """
    job.check()
    options = job.head_options()
    job.check_output(output, resume)
    photos, everything, class_of = _labelled_photos(job)
    sampled: Files | None = None
    if job.sample:  # made now, so that errors are raised before the features are computed
        sampled = Sample(job.backbone, photos, output / SAMPLE_FOLDER, job.sample).photos
    backbones, caches = _cache_taps(job, photos, progress)
    features = next(iter(caches.values()))
    labels = read_labels(features.names, job.labels)
    parts = [splits.split(labels, job.split_seed, fold) for fold in job.folds]
    say(
        f"{len(labels.used)} photos of {len(labels.names)} classes: "
        f"{', '.join(f'{n} {int((labels.index == i).sum())}' for i, n in enumerate(labels.names))}; "
        f"{len(everything.index) - len(everything.used)} without a label, "
        f"{len(features.skipped)} not readable"
    )
    classes = {path: labels.names.index(name) for path, name in class_of.items()}
    training = _Training(job, output, labels, sampled, classes, resume, progress)
    rows = []
    for name in job.heads:
        backbone = backbones[name]
        cache = caches[backbone.taps]
        scores = HeadScores(len(job.seeds))
        for fold, part in zip(job.folds, parts, strict=True):
            for seed in job.seeds:
                head = new_head(name, backbone, options[name], labels.names, seed)
                training.train(head, name, backbone, cache, fold, part, seed, scores)
        rows.append(table_row(name, head, cache, scores))
    return rows, labels, features.skipped


def _labelled_photos(job: ProbeJob) -> tuple[Photos, Labels, dict[Any, str]]:
    """The photos to use, the labels of all given photos, and the class of each photo that is a file.

    If the photos are files, those without a label are left out, since their features are not needed.
    """
    photos = open_photos(job.data)
    labels = read_labels([photos.name(i) for i in range(len(photos))], job.labels)
    for fold in job.folds:  # so that errors are raised before the features are computed
        splits.split(labels, job.split_seed, fold)
    if not isinstance(photos, Files):
        return photos, labels, {}
    class_of = {photos.paths[i]: labels.names[labels.index[i]] for i in labels.used}
    return photos.part(labels.used), labels, class_of


def _cache_taps(
    job: ProbeJob, photos: Photos, progress: bool
) -> tuple[dict[str, Backbone], dict[tuple[str, ...], Features]]:
    """The backbone of every head, and a feature cache for each set of taps.

    Heads with the same taps share a backbone, and all backbones share their weights.
    """
    backbones: dict[str, Backbone] = {}
    by_taps: dict[tuple[str, ...], Backbone] = {}
    for name in job.heads:
        kind = head_class(name)
        if not issubclass(kind, AttentiveHead):
            raise ValueError(f"heads: {name!r} is not a classifier; give attentive heads")
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


def new_head(
    name: str, backbone: Backbone, options: dict[str, Any], classes: Sequence[str], seed: int
) -> AttentiveHead:
    """Create an untrained head whose initial weights depend only on ``seed``."""
    head = seeded_head(name, backbone, seed, class_names=list(classes), **options)
    assert isinstance(head, AttentiveHead)
    return head


@dataclass(frozen=True)
class _Training:
    """Trains heads one after another with shared settings.

    ``sampled`` are the photos that are explained at each checkpoint, and ``classes`` maps each photo file
    to the index of its class.
    """

    job: ProbeJob
    output: Path
    labels: Labels
    sampled: Files | None
    classes: Mapping[Path, int]
    resume: bool
    progress: bool

    def train(
        self,
        head: AttentiveHead,
        name: str,
        backbone: Backbone,
        features: Features,
        fold: int,
        part: splits.Split,
        seed: int,
        scores: HeadScores,
    ) -> None:
        """Train ``head`` on one split of the photos, and add its predictions for the test photos to
        ``scores``."""
        folder = self.job.folder(self.output, name, fold, seed)
        sample = None
        if self.sampled:
            sample = Sample(
                backbone,
                self.sampled,
                folder / SAMPLE_FOLDER,
                self.job.sample,
                classes=self.classes,
            )
        index = self.labels.index
        split = Split(f"probe, {name}", features.names)
        result = probe(
            head,
            features,
            index,
            replace(self.job.config, seed=seed),
            train=split.fit(part.train),
            validation=split.choose(part.validation),
            output=folder,
            resume=self.resume and (folder / RUN_FILE).is_file(),
            progress=self.progress,
            on_checkpoint=sample,
        )
        logits = predict_logits(result.head, features, split.score(part.test))
        split.write(folder / "split.json")
        scores.tests.append(ProbeScores(logits, index[part.test]))
        sure, guess = logits.softmax(1).max(1)
        names = self.labels.names
        for i, k, p in zip(part.test, guess.tolist(), sure.tolist(), strict=True):
            path = Path(features.names[i])
            scores.answers.append(
                {
                    "head": name, "fold": fold, "seed": seed,
                    "photo": f"{path.parent.name}/{path.name}", "class": names[int(index[i])],
                    "answer": names[k], "confidence": p,
                }
            )  # fmt: skip
        scores.seconds += result.seconds
        scores.best_epochs.append(result.best_epoch)
