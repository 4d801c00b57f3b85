"""Measure the explanations of many methods on many images with one bounded stream of forward passes.

    images -> clean pass (score, class) -> maps of each method -> grey masks -> probes -> scorer

Images stream through in chunks of ``max_forward_batch``; clean passes, explanations and perturbed
passes all run at that one batch shape, so results do not depend on how many images there are.
Under ``torchrun`` each process takes every n-th chunk, and all return the results of all images.
What is finished goes into a :class:`~xattn.eval.store.Store` at once: a killed run goes on from it.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.eval import functional
from xattn.eval.metrics.base import Finish, Probe, Sample
from xattn.eval.metrics.masking import MaskingProbe
from xattn.eval.metrics.measure import sample_seed, scores_of, submit_all
from xattn.eval.metrics.randomization import RandomizationProbe
from xattn.eval.metrics.registry import create_probe
from xattn.eval.protocol import SCORES, Protocol
from xattn.eval.results import Results, collect
from xattn.eval.scorer import MaskedScorer, Ticket, pad_batch
from xattn.eval.store import ImageRow, ResultRow, Store
from xattn.eval.stream import ImageStream, Item
from xattn.explaining.photos import top_classes
from xattn.photos.images import MAX_PIXELS
from xattn.runtime.distributed import gather, processes
from xattn.runtime.version import __version__

if TYPE_CHECKING:
    from xattn.eval.annotations import Annotation, Annotations

Randomized = Mapping[str, Callable[[int, Tensor, Tensor], Tensor]]
_T = TypeVar("_T")


def evaluate(
    backbone: Any,
    explainers: Mapping[str, Any],
    images: Any,
    *,
    metrics: Sequence[str | Probe] = ("masking",),
    levels: Sequence[float] | None = None,
    max_forward_batch: int = 32,
    view: str | None = None,
    seed: int | None = None,
    protocol: Protocol | None = None,
    progress: bool = True,
    classes: int | str | Sequence[int | str] | None = None,
    max_pixels: int | None = MAX_PIXELS,
    limit: int | None = None,
    annotations: Annotations | None = None,
    randomized: Randomized | None = None,
    again_limit: int | None = 2,
    state: str | Path | None = None,
    kept_maps: int = 0,
) -> Results:
    """Every metric of every explainer on the same images; by default AD, IC, ADD and AG.

    Args:
        backbone: a :class:`xattn.Backbone`; it alone scores, whatever an explainer looks at.
        explainers: by the name of their row in the table.
        images: a photo, folder or list file; a list of paths or PIL images; or float tensors
            (3, H, W) or (B, 3, H, W) in [0, 1] at the model's input size, also from a generator.
        metrics: groups by name (:data:`xattn.eval.metrics.PROBES`), or probes.
        protocol: its ``class_policy`` follows ``classes``, its ``score`` the backbone's task unless
            it is ``"logit"``.
        levels, view, seed: replace the protocol's own: (1.0, 0.5, 0.15), ``"crop"``, 0.
        max_forward_batch: images a forward pass; also how many are explained at a time. A multiple
            of 4 keeps results bit-equal whatever else is scored in the same run.
        classes: explain these instead of the predicted class: one for all images, or one an image
            (unreadable ones included), as index or name.
        max_pixels: larger photos are skipped as decompression bombs.
        limit: only the first so many images.
        annotations: where objects are, see :func:`xattn.eval.load_annotations`.
        randomized: by method, (stage, images, targets) -> its maps on a network with randomised
            weights, see :class:`xattn.eval.Cascade`.
        again_limit: metrics that explain again are measured on this many images for explainers that
            run many perturbed passes; None for all.
        state: an SQLite file that keeps what is finished. A run with the same arguments goes on
            from it.
        kept_maps: of how many of the first images ``state`` keeps the maps as explained, and the first
            classes; such that an earlier run did not keep are explained again, and not measured.

    Raises:
        ValueError: no image could be read, an explainer returns a wrong shape or fails on all of
            the first images, a class or metric is unknown, or ``state`` belongs to another run.
        OSError: the path ``images`` does not exist, or ``state`` cannot be written.
    """
    if not explainers:
        raise ValueError("explainers: got none; give {name: explainer}")
    if not getattr(backbone, "has_classes", True):
        backbone.require_classes()
    given = {"levels": levels, "view": view, "seed": seed}
    protocol = protocol or Protocol()
    protocol = replace(
        protocol,
        score="logit" if protocol.score == "logit" else SCORES[backbone.task],
        class_policy="predicted" if classes is None else "given",
        **{k: v for k, v in given.items() if v is not None},  # type: ignore[arg-type]
    )
    stream = ImageStream(images, backbone.preprocessing, protocol.view, max_pixels, limit)
    if stream.tensors:
        protocol = replace(protocol, view="tensor")
    elif protocol.view == "tensor":
        raise ValueError("view: 'tensor' is for images given as tensors; choose 'crop' or 'whole'")
    probes = create_probes(metrics, protocol, backbone.preprocessing.mean)
    if any(probe.needs_annotation for probe in probes) and annotations is None:
        raise ValueError(
            "metrics: localization needs to know where objects are; give annotations, or leave it out"
        )
    if any(probe.needs_annotation for probe in probes) and stream.tensors:
        raise ValueError("metrics: localization needs photos with file names; tensors have none")
    if randomized is None and any(isinstance(p, RandomizationProbe) for p in probes):
        raise ValueError(
            "metrics: randomization needs each method on randomised networks; give randomized, see "
            "Cascade (xattn compare does)"
        )
    if again_limit is not None and again_limit < 1:
        raise ValueError(f"again_limit: got {again_limit}; give at least 1, or None for all images")
    wanted = _wanted_classes(backbone, classes, stream.length)
    ranks, rank = processes(backbone.device)
    scorer = MaskedScorer(backbone, max_forward_batch, protocol.score, protocol.precision)
    facts = _facts(backbone, explainers, protocol, probes, scorer, again_limit)
    facts["annotations"] = None if annotations is None else annotations.fingerprint
    facts["classes"], facts["randomized"] = wanted, sorted(randomized or {})
    path = None if state is None else Path(state)
    with closing(Store(path, facts, rank)) as store:
        run = _Run(
            backbone,
            explainers,
            protocol,
            probes,
            scorer,
            store,
            annotations,
            randomized or {},
            again_limit,
            kept_maps if path is not None else 0,
        )

        from tqdm import tqdm

        with tqdm(
            total=None if stream.length is None else stream.length * len(explainers),
            desc="evaluate",
            unit="map",
            disable=not progress or rank > 0,
            dynamic_ncols=True,
        ) as bar:
            for chunk in stream.blocks(max_forward_batch, rank, ranks):
                if chunk:
                    run.add(chunk, _targets(wanted, chunk), bar.update)
                bar.set_postfix_str(f"{len(stream.skipped)} skipped" if stream.skipped else "")
                if ranks > 1 and chunk:  # the other processes' share
                    bar.update((chunk[-1].position + 1) * len(explainers) - bar.n)
        run.finish(stream)
        costs = gather(run.cost())
        cost = {key: sum(part[key] for part in costs) for key in costs[0]}
        cost["max_forward_batch"] = max_forward_batch
        _put_together(store, ranks, rank, path)
        return collect(store, protocol, probes, explainers, backbone, cost, stream.length)


def create_probes(
    metrics: Sequence[str | Probe], protocol: Protocol, mean: Sequence[float]
) -> list[Probe]:
    """The probes of groups by name; a ValueError where a column would stand twice."""
    if not metrics:
        raise ValueError("metrics: got none; give names of xattn list")
    probes = [
        create_probe(m, protocol, tuple(float(v) for v in mean)) if isinstance(m, str) else m
        for m in metrics
    ]
    for probe in probes:
        if protocol.score == "logit" and isinstance(probe, MaskingProbe) and probe.bounded:
            raise ValueError(
                "score: AD, ADD and AG are of probabilities; for logits give MaskingProbe(bounded=False, "
                "metrics=('AD', 'IC')), or the preset torch-cam"
            )
    columns = [column for probe in probes for column in probe.columns]
    twice = sorted({c.key for c in columns if columns.count(c) > 1})
    if twice:
        raise ValueError(f"metrics: {', '.join(twice)} asked for twice; leave one out")
    return probes


@dataclass(eq=False)
class _Pending:
    """One explanation whose scores are not all there yet."""

    row: ResultRow
    finishes: list[tuple[Finish, dict[str, list[Ticket]]]]

    @property
    def done(self) -> bool:
        return all(t.done for _, keys in self.finishes for row in keys.values() for t in row)


class _Run:
    """The state of one evaluation: what waits for its scores; all else is in the store."""

    def __init__(
        self,
        backbone: Any,
        explainers: Mapping[str, Any],
        protocol: Protocol,
        probes: Sequence[Probe],
        scorer: MaskedScorer,
        store: Store,
        annotations: Annotations | None,
        randomized: Randomized,
        again_limit: int | None,
        kept_maps: int,
    ) -> None:
        self.backbone, self.explainers, self.protocol = backbone, explainers, protocol
        self.probes, self.scorer, self.store = probes, scorer, store
        self.annotations, self.randomized, self.again_limit = annotations, randomized, again_limit
        self.kept_maps = kept_maps
        self._pending: deque[_Pending] = deque()
        self._worked = {name for name in explainers if store.worked(name)}
        self._failures: dict[str, int] = {}

    # ------------------------------------------------------------------ chunks

    def add(self, chunk: list[Item], targets: Tensor | None, done: Callable[[int], Any]) -> None:
        """Clean pass, explanations and requests of one chunk; stores what is finished."""
        sizes = {tuple(item.image.shape) for item in chunk}
        if len(sizes) > 1:
            raise ValueError(f"images: got sizes {sorted(sizes)}; prepare them to one size")
        finished = self.store.finished(chunk[0].position, chunk[-1].position)
        names = set(self.explainers)
        left = [item for item in chunk if not names <= finished.get(item.position, set())]
        done(len(names) * len(chunk) - sum(self._left(i, finished) for i in left))
        for item in chunk:
            known = self.store.image(item.position) if item.position in finished else None
            if known is not None and known.id != item.id:
                raise ValueError(
                    f"state: image {item.position} was {known.id} and is {item.id} now; give another "
                    f"file than {self.store.path}, or the same images"
                )
            if known is not None and known.digest != _digest(item.image):
                raise ValueError(
                    f"state: {item.id} is not the picture that was measured; give another file than "
                    f"{self.store.path}, or the same images"
                )
        if chunk[0].position < self.kept_maps:
            self._keep_missing(chunk)
        if not left:
            return
        if targets is not None:
            kept = {item.position for item in left}
            targets = targets[[i for i, item in enumerate(chunk) if item.position in kept]]
        images = torch.stack([item.image for item in left]).to(self.backbone.device)
        scores, classes, every = self.scorer.clean_classes(images, targets)
        self._keep_tops(left, every)
        notes = [self._annotation(item) for item in left]
        self._record(left, scores, classes, [n if isinstance(n, str) else None for n in notes])
        for name in self.explainers:
            rows = [i for i, x in enumerate(left) if name not in finished.get(x.position, set())]
            for part in self._passes(name, rows):
                self._explain(name, part, left, images, scores, classes, notes, done)
        self.scorer.forget()

    def _passes(self, name: str, rows: list[_T]) -> list[list[_T]]:
        """What one method explains at a time."""
        if getattr(self.explainers[name], "one_by_one", False):
            return [[row] for row in rows]
        return [rows] if rows else []

    def _left(self, item: Item, finished: Mapping[int, set[str]]) -> int:
        return len(set(self.explainers) - finished.get(item.position, set()))

    def _record(
        self, items: list[Item], scores: Tensor, classes: Tensor, notes: list[str | None]
    ) -> None:
        names = self.backbone.class_names
        rows = []
        each = zip(items, scores.tolist(), classes.tolist(), notes, strict=True)
        for item, value, target, note in each:
            if not math.isfinite(value):
                raise ValueError(f"backbone: its logits for {item.id} are not finite")
            seen = _digest(item.image)
            name = names[target]
            rows.append(ImageRow(item.position, item.id, target, name, value, None, note, seen))
        self.store.add_images(rows)

    def _keep_tops(self, items: Sequence[Item], scores: Tensor) -> None:
        """The first classes of images, from their (b, K) scores."""
        if self.protocol.score == "logit":
            scores = self.backbone.probabilities(scores)
        names = self.backbone.class_names
        kept = [(item, row) for item, row in zip(items, scores, strict=True) if self._kept(item)]
        self.store.add_tops([(i.position, top_classes(row, names)) for i, row in kept])

    def _keep_missing(self, chunk: list[Item]) -> None:
        """Maps and first classes of finished images that an earlier run did not keep."""
        ends = chunk[0].position, chunk[-1].position
        bare = self.store.without_top(*ends)
        items = [item for item in chunk if item.position in bare and self._kept(item)]
        if items:
            images = torch.stack([item.image for item in items]).to(self.backbone.device)
            self._keep_tops(items, self.scorer.clean_classes(images)[2])
            self.scorer.forget()
        missing = self.store.without_map(*ends)
        for name in self.explainers:
            rows = [i for i in chunk if name in missing.get(i.position, set()) and self._kept(i)]
            for part in self._passes(name, rows):
                images = torch.stack([item.image for item in part]).to(self.backbone.device)
                known = [self.store.image(item.position) for item in part]
                classes = [row.target for row in known if row is not None]
                if not all(
                    k is not None and 0 <= k < len(self.backbone.class_names) for k in classes
                ):
                    raise self.store.damaged("a class that the classifier does not have")
                targets = torch.tensor(classes, device="cpu")
                maps, reasons = self._maps(name, images, targets)
                for item, values, reason in zip(part, maps, reasons, strict=True):
                    if reason is None:
                        self._keep_map(name, item.position, values)

    def _keep_map(self, name: str, position: int, values: Tensor) -> None:
        self.store.add_map(position, name, values[0].detach().float().cpu().numpy())

    def _kept(self, item: Item) -> bool:
        return item.position < self.kept_maps

    def _annotation(self, item: Item) -> Annotation | str | None:
        """Where objects are, None where nobody asks, or why that cannot be said."""
        if self.annotations is None or item.source is None or item.view is None:
            return None
        try:
            return self.annotations.of(item.source, item.view)
        except (ValueError, OSError) as error:
            return " ".join(str(error).split())

    def _explain(
        self,
        name: str,
        rows: list[int],
        items: list[Item],
        images: Tensor,
        scores: Tensor,
        classes: Tensor,
        notes: list[Annotation | str | None],
        done: Callable[[int], Any],
    ) -> None:
        """Maps of one method on some images of a chunk, and the requests of all probes on them."""
        started = time.perf_counter()
        maps, reasons = self._maps(name, images[rows], classes[rows])
        seconds = (time.perf_counter() - started) / len(rows)
        is_mask = bool(getattr(self.explainers[name], "is_mask", False))
        size = images.shape[-2:]
        for j, i in enumerate(rows):
            note = notes[i]
            grey = raw = images.new_zeros(1, *size)
            if reasons[j] is None:
                one = maps[j][None].detach().to(images.device)
                grey_one, valid = functional.saliency(
                    one,
                    size,
                    is_mask=is_mask,
                    normalization=self.protocol.normalization,
                    resize=self.protocol.resize,
                )
                grey = grey_one[0]
                if bool(valid):
                    raw = functional.upsample(one.float(), size, self.protocol.resize)[0]
                    if not is_mask and bool(grey.amax() == grey.amin()):
                        reasons[j] = "constant map after resizing"
                    elif self._kept(items[i]):
                        self._keep_map(name, items[i].position, maps[j])
                else:
                    reasons[j] = "constant map" if one.isfinite().all() else "non-finite map"
            sample = Sample(
                image=images[i],
                grey=grey,
                raw=raw,
                target=int(classes[i]),
                score=float(scores[i]),
                seed=sample_seed(self.protocol.seed, items[i].position),
                is_mask=is_mask,
                resize=self.protocol.resize,
                normalization=self.protocol.normalization,
                explain=self._again(name, int(classes[i])),
                explain_randomized=self._randomized(name, int(classes[i])),
                annotation=None if isinstance(note, str) else note,
            )
            self._request(name, items[i].position, sample, reasons[j], seconds)
            self._collect()
            done(1)

    def _request(
        self, name: str, position: int, sample: Sample, reason: str | None, seconds: float
    ) -> None:
        measured: dict[str, float] = {}
        finishes, failed = [], []
        before = self.scorer.requested
        for probe in self.probes:
            if not self._applies(probe, name, position, sample):
                continue
            measured.update({column.key: math.nan for column in probe.columns})
            if reason is not None:
                continue
            tickets: dict[str, list[Ticket]] = {}
            try:
                finish = submit_all(probe.measure(sample), self.scorer, sample.target, tickets)
            except MemoryError:
                raise
            except Exception as error:
                if not probe.explains_again:
                    raise
                failed.append(f"{probe.columns[0].metric}: {_reason(error)}")
                continue
            finishes.append((finish, tickets))
        tied = int(reason is None and self._tied(sample))
        requests = self.scorer.requested - before
        keep = reason is None and self.store.path is not None
        small = _png(sample.grey) if keep else None
        why = "; ".join(failed) or None
        row = ResultRow(position, name, reason, tied, requests, seconds, measured, {}, small, why)
        self._pending.append(_Pending(row, finishes))

    def _applies(self, probe: Probe, name: str, position: int, sample: Sample) -> bool:
        if probe.needs_annotation:
            note = sample.annotation
            return note is not None and note.mask(sample.target) is not None
        if not probe.explains_again:
            return True
        if any(column.metric.startswith("randomization") for column in probe.columns):
            if name not in self.randomized:
                return False
        limited = bool(getattr(self.explainers[name], "perturbs", False))
        return not limited or self.again_limit is None or position < self.again_limit

    # ------------------------------------------------------------------ maps

    def _maps(
        self, name: str, images: Tensor, targets: Tensor
    ) -> tuple[Sequence[Tensor], list[str | None]]:
        """Raw maps (1, h, w), and for each the reason why there is none.

        An explainer that never worked and fails on its first three images does not work at all:
        its error is raised.
        """
        try:
            maps = self._attribute(name, images, targets)
            self._worked.add(name)
            return list(maps), [None] * len(images)
        except (MemoryError, _Refused):
            raise
        except Exception as error:
            failure = error
        if len(images) > 1:
            parts = [
                self._maps(name, images[i : i + 1], targets[i : i + 1]) for i in range(len(images))
            ]
            return [p[0][0] for p in parts], [p[1][0] for p in parts]
        self._failures[name] = self._failures.get(name, 0) + 1
        if name not in self._worked and self._failures[name] == 3:
            raise failure
        return [images[0, :1]], [_reason(failure)]

    def _attribute(self, name: str, images: Tensor, targets: Tensor) -> Tensor:
        """(b, 1, h, w); padded to the one batch shape, but for methods that see to theirs."""
        explainer, count = self.explainers[name], len(images)
        targets = targets.to(images.device)
        if not getattr(explainer, "one_by_one", False):
            size = self.scorer.max_forward_batch
            images, targets = pad_batch(images, size), pad_batch(targets, size)
        maps = explainer.attribute(images, targets)
        if not isinstance(maps, Tensor) or maps.ndim != 4 or maps.shape[:2] != (len(images), 1):
            got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise _Refused(f"explainers: {name} returned {got}; it has to return (B, 1, h, w)")
        return maps[:count]

    def _again(self, name: str, target: int) -> Callable[[Tensor], Tensor]:
        def explain(images: Tensor) -> Tensor:
            targets = torch.full((len(images),), target, device=images.device)
            return self.explainers[name].attribute(images, targets)  # type: ignore[no-any-return]

        return explain

    def _randomized(self, name: str, target: int) -> Callable[[int, Tensor], Tensor] | None:
        function = self.randomized.get(name)
        if function is None:
            return None
        return lambda stage, images: function(
            stage, images, torch.full((len(images),), target, device=images.device)
        )

    def _tied(self, sample: Sample) -> bool:
        """Whether ties at a threshold keep more than 2 points above a level."""
        for level in self.protocol.levels:
            kept = sample.mask(level, self.protocol.threshold) > 0
            if int(kept.sum()) > (level + 0.02) * kept.numel():
                return True
        return False

    # ------------------------------------------------------------------ results

    def _collect(self) -> None:
        while self._pending and self._pending[0].done:
            pending = self._pending.popleft()
            row = pending.row
            for finish, tickets in pending.finishes:
                scores = scores_of(tickets)
                if not all(bool(values.isfinite().all()) for values in scores.values()):
                    row = row._replace(
                        failed="; ".join(filter(None, [row.failed, "non-finite score"]))
                    )
                    row.scores.update({key: values.tolist() for key, values in scores.items()})
                    continue
                row.measured.update({c.key: float(v) for c, v in finish(scores).items()})
                row.scores.update({key: values.tolist() for key, values in scores.items()})
            self.store.add(row)

    def finish(self, stream: ImageStream) -> None:
        """Run what waits, store it, and list what could not be read."""
        self.scorer.flush()
        self._collect()
        self.store.add_images(
            [
                ImageRow(position, item.id, None, None, None, item.reason)
                for position, item in stream.skipped.items()
            ]
        )

    def cost(self) -> dict[str, int]:
        return {
            "scores_requested": self.scorer.requested,
            "images_scored": self.scorer.scored,
            "forward_batches": self.scorer.batches,
        }


class _Refused(ValueError):
    """What an explainer returns is no map at all: a mistake of the program, not of one image."""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.contiguous().numpy().data).hexdigest()


def _png(grey: Tensor) -> bytes:
    """(1, H, W) in [0, 1] -> an 8-bit grey PNG of at most 56 pixels a side."""
    height, width = (min(side, 56) for side in grey.shape[-2:])
    small = torch.nn.functional.adaptive_avg_pool2d(grey[None].float(), (height, width))[0, 0]
    stream = io.BytesIO()
    pixels = (small * 255).round().to(torch.uint8).cpu().numpy()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _put_together(store: Store, ranks: int, rank: int, path: Path | None) -> None:
    """All processes' rows into the store of each, or into the one file."""
    if path is None:
        for other, (images, results) in enumerate(gather(store.rows()) if ranks > 1 else []):
            if other != rank:
                store.take_in(images, results)
        return
    if rank > 0:
        store.close()
    gather(None)  # all have written
    if rank == 0:
        store.merge()
    gather(None)
    if rank > 0:
        store.reopen()


def _facts(
    backbone: Any,
    explainers: Mapping[str, Any],
    protocol: Protocol,
    probes: Sequence[Probe],
    scorer: MaskedScorer,
    again_limit: int | None,
) -> dict[str, Any]:
    """What a stored result depends on; methods each under a key, so that one can be added."""
    return {
        "protocol": {**protocol.to_dict(), "id": protocol.id},
        "backbone": [backbone.fingerprint, backbone.task, repr(backbone.preprocessing)],
        "metrics": [[type(p).__name__, p.options()] for p in probes],
        "xattn": __version__,
        "max_forward_batch": scorer.max_forward_batch,
        "again_limit": again_limit,
        **{f"method {name}": describe(method) for name, method in explainers.items()},
    }


def describe(explainer: Any) -> dict[str, Any]:
    """What an explainer is: its class, options, and the hashes of its head and network."""
    hidden = ("head", "backbone", "reader")  # a reader's layer has a name among the options
    options = {
        key: _fact(value)
        for key, value in getattr(explainer, "__dict__", {}).items()
        if not key.startswith("_") and key not in hidden
    }
    record = {"class": type(explainer).__qualname__, "options": options}
    head = getattr(explainer, "head", None)
    if head is not None:
        from xattn.backbone import sha256

        record["head"] = [sha256(head), getattr(head, "explain_with", None)]
    network = getattr(getattr(explainer, "backbone", None), "fingerprint", None)
    if network is not None:
        record["backbone"] = network
    return record


def _fact(value: Any) -> Any:
    """An option as JSON: tensors and modules by hash, functions and objects by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return [list(value.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()]
    if isinstance(value, torch.nn.Module):
        from xattn.backbone import sha256

        return [type(value).__qualname__, sha256(value)]
    if isinstance(value, list | tuple):
        return [_fact(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _fact(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _fact(torch.from_numpy(value))
    where = value if hasattr(value, "__qualname__") else type(value)
    return f"{where.__module__}.{where.__qualname__}"


def _wanted_classes(
    backbone: Any, classes: int | str | Sequence[int | str] | None, length: int | None
) -> int | list[int] | None:
    if classes is None:
        return None
    if isinstance(classes, int | str):
        return int(backbone.class_index(classes))
    wanted = [int(backbone.class_index(c)) for c in classes]
    if length is not None and len(wanted) != length:
        raise ValueError(f"classes: got {len(wanted)} for {length} images; give one an image")
    return wanted


def _targets(wanted: int | list[int] | None, chunk: list[Item]) -> Tensor | None:
    if wanted is None:
        return None
    if isinstance(wanted, int):
        return torch.full((len(chunk),), wanted, device="cpu")
    if chunk[-1].position >= len(wanted):
        raise ValueError(
            f"classes: got {len(wanted)}, and there are more images; give one an image"
        )
    return torch.tensor([wanted[item.position] for item in chunk], device="cpu")
