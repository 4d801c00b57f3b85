"""One evaluation on its way: clean passes, maps, the requests of all probes, and what they give."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from xattn.eval import functional
from xattn.eval.annotations import Annotation, Annotations
from xattn.eval.evaluation.database import ImageRow, ResultRow
from xattn.eval.evaluation.scorer import MaskedScorer, Ticket, pad_batch
from xattn.eval.evaluation.store import Store
from xattn.eval.evaluation.stream import ImageStream, Item
from xattn.eval.metrics.base import Finish, Probe, Sample
from xattn.eval.metrics.measure import sample_seed, scores_of, submit_all
from xattn.eval.protocol import Protocol
from xattn.explaining.photos import top_classes

Randomized = Mapping[str, Callable[[int, Tensor, Tensor], Tensor]]
_T = TypeVar("_T")


@dataclass(eq=False)
class _Pending:
    """One explanation whose scores are not all there yet."""

    row: ResultRow
    finishes: list[tuple[Finish, dict[str, list[Ticket]]]]

    @property
    def done(self) -> bool:
        return all(t.done for _, keys in self.finishes for row in keys.values() for t in row)


class EvaluationRun:
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
        if probe.explains_randomized and name not in self.randomized:
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
