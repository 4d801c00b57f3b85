"""A table of outcomes: a network's outputs for masked photos, which are computed once and then read from
disk.

The table is stored in a :mod:`~xattn.training.cache`, whose key contains everything that the numbers depend
on: the network, the photos and the masks. Different heads and runs can therefore share a table. A row has
``cells`` (P, 28, 28) uint8, or (P, t, 28, 28) of a clip, and ``logits`` (1 + 2 P, K) float16, clean photo
first; for networks with more than 2,000 classes it has only some logits, together with ``classes`` (T,)
int32 and ``rest`` (1 + 2 P,) float32, see :mod:`~xattn.training.outcome_rows`. The table of a game has
coarser cells (the players), and the logits of the empty photo come last.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.backbone import Backbone
from xattn.backbone.scored import target_record
from xattn.photos.base import Data, Photos
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.runtime.distributed import processes
from xattn.training.cache import OUTCOMES, Cache, filled_cache, key_digest
from xattn.training.outcome_rows import (
    Guide,
    HeadGuide,
    MaskSettings,
    RowMaker,
    cost_line,
    guess_name,
    log_odds,
    masks_of,
)

__all__ = [
    "Guide",
    "HeadGuide",
    "OutcomeBatch",
    "Outcomes",
    "cache_outcomes",
    "outcome_key",
]

FEW = 20  # with fewer photos a head learns little
BLOCK = 16  # rows that are written at once


@dataclass(frozen=True, eq=False)
class OutcomeBatch:
    """The outcomes of B photos under N = 2 P masks each: first the masks, then their complements.

    ``masks`` (B, N, g, g) is the share of each cell that is kept; ``logits`` (B, 1 + N, T) start with the
    clean image; ``classes`` (B, T) are the classes of these logits, most probable first, and ``rest`` (B, 1
    + N) is the log-sum-exp of all other logits; ``classes`` and ``rest`` are None if all ``num_classes``
    have logits. If the table includes the empty photo (``known``), the logits (and rest) of that photo come
    last, (B, 2 + N).
    """

    masks: Tensor
    logits: Tensor
    classes: Tensor | None
    rest: Tensor | None
    task: str
    num_classes: int
    names: tuple[str, ...]
    known: bool = False

    def __len__(self) -> int:
        return len(self.masks)

    def to(self, device: torch.device | str) -> OutcomeBatch:
        """Return the batch with its tensors on ``device``."""
        classes = None if self.classes is None else self.classes.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        masks, logits = self.masks.to(device), self.logits.to(device)
        return replace(self, masks=masks, logits=logits, classes=classes, rest=rest)

    def top(self, count: int) -> Tensor:
        """Return the ``count`` most probable classes of each clean image, in order, (B, count)."""
        places = self.logits[:, 0].argsort(dim=1, descending=True, stable=True)[:, :count]
        return places if self.classes is None else self.classes.gather(1, places)

    def probabilities(self, classes: Tensor) -> Tensor:
        """Compute the probabilities of ``classes`` (B, M) for each masked image, (B, M, N) float32:
        softmax, or sigmoids.

        Raises:
            ValueError: the table does not have the logits of a class.
        """
        if self.task == "multilabel":
            return self._chosen(classes).sigmoid().float()
        return (self._chosen(classes) - self._all().logsumexp(2)[:, None]).exp().float()

    def log_odds(self, classes: Tensor) -> Tensor:
        """Compute log p / (1 - p) of ``classes`` (B, M) for each masked image, (B, M, N) float32.

        Raises:
            ValueError: the table does not have the logits of a class.
        """
        logits = self._all()
        index = self._places(classes)[:, None].expand(-1, logits.shape[1], -1)
        return log_odds(logits, index, self.task).transpose(1, 2).float()

    def values(self, classes: Tensor, link: str) -> Tensor:
        """Compute the ``"probability"``, ``"log_odds"`` or ``"logit"`` of ``classes`` (B, M) for each
        masked image, (B, M, N) float32."""
        if link == "logit":
            return self._chosen(classes).float()
        return self.probabilities(classes) if link == "probability" else self.log_odds(classes)

    @property
    def ends(self) -> OutcomeBatch:
        """Return the outcomes of the empty and of the whole photo, as two masks.

        Raises:
            ValueError: the table has no empty photos.
        """
        if not self.known:
            raise ValueError(
                "table: it has no outcomes of empty photos; compute one with empty=True, or let the "
                "objective compute it"
            )
        nothing = torch.zeros_like(self.masks[:, :1])
        order = [0, -1, 0]  # the clean image, then the two masks
        return replace(
            self,
            masks=torch.cat([nothing, nothing + 1], 1),
            logits=self.logits[:, order],
            rest=None if self.rest is None else self.rest[:, order],
            known=False,
        )

    @property
    def _masked(self) -> slice:
        """The positions of the masked images among all."""
        return slice(1, 1 + self.masks.shape[1])

    def _all(self) -> Tensor:
        """Logits of all masked images in float64, (B, N, T); ``rest`` counts as one more class."""
        parts = [self.logits] if self.rest is None else [self.logits, self.rest[..., None]]
        return torch.cat(parts, 2)[:, self._masked].double()

    def _chosen(self, classes: Tensor) -> Tensor:
        """Logits of ``classes`` for all masked images in float64, (B, M, N)."""
        logits = self.logits[:, self._masked].double().transpose(1, 2)
        return logits.gather(1, self._places(classes)[..., None].expand(-1, -1, logits.shape[2]))

    def _places(self, classes: Tensor) -> Tensor:
        """The positions of the logits of ``classes`` (B, M), (B, M)."""
        classes = classes.to(self.logits.device, torch.long)
        if self.classes is None:
            return classes
        hits = self.classes[:, None] == classes[..., None]
        lost = ~hits.any(2)
        if lost.any():
            photo, place = (int(n) for n in lost.nonzero()[0])
            raise ValueError(
                f"classes: {int(classes[photo, place])} is not among the {self.classes.shape[1]} "
                f"classes that the table keeps of {self.names[photo]}; choose some of these (top)"
            )
        return hits.int().argmax(2)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """A table of outcomes; photo i is the i-th photo that could be read.

    ``names`` are the names of the photos, ``skipped`` lists (name, reason) for the photos that could not
    be read, and ``key`` is everything that the outcomes depend on.
    """

    key: dict[str, Any]
    names: list[str]
    skipped: list[tuple[str, str]]
    _photos: Tensor = field(repr=False)
    _cache: Cache = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def folder(self) -> Path:
        """The folder where the table is stored."""
        return self._cache.folder

    @property
    def task(self) -> str:
        """The backbone's task."""
        return str(self.key["task"])

    @property
    def num_classes(self) -> int:
        """The backbone's number of classes."""
        return int(self.key["classes"])

    @property
    def numbers(self) -> list[int]:
        """The position of each photo in the data that the table was computed from."""
        return self._photos.tolist()

    @property
    def digest(self) -> str:
        """SHA-256 of the key; a subset of the table has a different one."""
        return key_digest(self.key)

    @property
    def crops(self) -> int:
        """The number of crops of every photo: the evaluation crop, then random ones."""
        return int(self.key["crops"])

    @property
    def masks(self) -> int:
        """The number of masks of every crop, including complements."""
        return int(self.key["masks"])

    def row(self, index: int, crop: int = 0) -> OutcomeBatch:
        """Return the outcomes of one photo, as a batch of 1."""
        return self.batch([index], crop)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """Return the outcomes of photos.

        Args:
            index: numbers of photos, 0 .. len - 1.
            crop: 0 .. crops - 1, either one for all photos or one for each photo.
        """
        photos = torch.as_tensor(index, dtype=torch.long, device="cpu")
        crops = torch.as_tensor(crop, dtype=torch.long, device="cpu").expand(photos.shape)
        if crops.numel() and not 0 <= int(crops.min()) <= int(crops.max()) < self.crops:
            raise ValueError(f"crop: got {crop}; the table has the crops 0..{self.crops - 1}")
        read = self._cache.rows(crops * self._cache.count + self._photos[photos])
        classes = read.get("classes")
        return OutcomeBatch(
            masks=masks_of(read["cells"]),
            logits=read["logits"].float(),
            classes=None if classes is None else classes.long(),
            rest=read.get("rest"),
            task=self.task,
            num_classes=self.num_classes,
            names=tuple(self.names[i] for i in photos.tolist()),
            known=bool(self.key["empty"]),
        )

    def subset(self, photos: Sequence[int] | Sequence[str | Path] | Tensor) -> Outcomes:
        """Return a table of some of this table's photos, given by number, or by the path or name used when
        the table was made.

        Raises:
            ValueError: no photo is given, or one is not in the table. Photos that were skipped when the
                table was made are skipped again.
        """
        given: list[Any] = photos.tolist() if isinstance(photos, Tensor) else list(photos)
        skipped: list[tuple[str, str]] = []
        if all(isinstance(photo, str | Path) for photo in given):
            reasons = dict(self.skipped)
            named = self._named(given)
            skipped = [(name, reasons[name]) for name in named if name in reasons]
            given = [number for number in self.find(given) if number is not None]
        if not given or not set(given) <= set(range(len(self))):
            raise ValueError(
                f"photos: got {len(given)} readable photos {str(given)[:40]}; give some of the "
                f"numbers 0..{len(self) - 1}, or paths"
            )
        kept = self._photos[torch.tensor(given)]
        digest = hashlib.sha256(kept.numpy().astype("<i8").tobytes()).hexdigest()
        return replace(
            self,
            key={**self.key, "subset": {"count": len(given), "sha256": digest}},
            names=[self.names[i] for i in given],
            skipped=skipped,
            _photos=kept,
        )

    def find(self, photos: Sequence[str | Path]) -> list[int | None]:
        """Return the number of each photo, given by the path or name used when the table was made; None
        for skipped photos.

        Raises:
            ValueError: a photo is not in the table.
        """
        numbers = {name: i for i, name in enumerate(self.names)}
        return [numbers.get(name) for name in self._named(photos)]

    def _named(self, photos: Sequence[str | Path]) -> list[str]:
        """The table's names of ``photos``, which may be given by other paths to the same files."""
        names = (*self.names, *(name for name, _ in self.skipped))
        known = {name: name for name in names}
        if any(str(photo) not in known for photo in photos):
            known.update({str(Path(name).resolve()): name for name in names})
        found = [known.get(str(p)) or known.get(str(Path(p).resolve())) for p in photos]
        if None in found:
            raise ValueError(
                f"photos: {photos[found.index(None)]} is not in the table {self.folder}; give photos "
                f"that it was made from"
            )
        return [name for name in found if name is not None]


# ---------------------------------------------------------------------- computing


def outcome_key(
    backbone: Backbone,
    photos: Photos,
    settings: MaskSettings,
    max_pixels: int = MAX_PIXELS,
    guide: Guide | None = None,
) -> dict[str, Any]:
    """Return everything that the outcomes in a table depend on."""
    return {
        "format": OUTCOMES.version,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        **target_record(backbone),
        "task": backbone.task,
        "classes": backbone.num_classes,
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "photos": photos.describe(),
        "max_pixels": max_pixels,
        "crops": settings.crops,
        "masks": settings.masks,
        "kinds": list(settings.kinds_of_masks),
        "fills": list(settings.fills),
        "seed": settings.seed,
        "precision": settings.precision,
        "sizes": settings.sizes,
        "players": settings.players,
        "empty": settings.empty,
        "guide": guess_name(backbone, guide, settings.kinds_of_masks),
    }


def cache_outcomes(
    backbone: Backbone,
    data: Data,
    folder: str | Path,
    *,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
    say: Callable[[str], object] | None = None,
    guide: Guide | None = None,
    **settings: Any,
) -> Outcomes:
    """Return the outcomes of masks on ``data``; rows that are not yet in ``folder`` are computed and
    stored there.

    Args:
        data: see :func:`xattn.photos.sources.open_photos`, or :func:`xattn.photos.sources.open_clips` if
            the network reads clips.
        say: called before missing rows are computed, with one line that states the cost.
        guide: the first guess for ``"evidence"`` masks, see :class:`~xattn.training.outcome_rows.Guide`.
            The default guess is the last tap, weighted with the classifier's row for the most probable
            class or, if that row does not fit the tap, the tap's norm.
        settings: mask settings, see :class:`~xattn.training.outcome_rows.MaskSettings`.

    Photos that cannot be read are left out and listed. If there are several processes, each computes a
    share of the rows. All rows are compared with their checksums; rows that have changed since they were
    written are listed in a warning and computed again.

    Raises:
        ValueError: ``folder`` contains a table with another key (the message gives both keys) or is in
            use; no photo can be read; float16 cannot represent the logits; or patches cannot be dropped.
        OSError: ``folder`` cannot be written, or the disk does not have enough space.
        MemoryError: the masked images of one photo do not fit into memory.
    """
    asked = MaskSettings(**settings)
    backbone.require_classes()
    if backbone.task == "regression":
        raise ValueError(
            f"backbone: {backbone.name} predicts numbers, but a table of outcomes needs "
            f"probabilities; load a classifier"
        )
    photos = open_photos(data, backbone.reads_clips)
    ranks, rank = processes(backbone.device)
    key = outcome_key(backbone, photos, asked, max_pixels, guide)

    def fill(cache: Cache) -> None:
        maker = RowMaker(backbone, asked, guide)
        cache.require_room(maker.row_bytes)
        if cache.missing_rows and say is not None and rank == 0:
            say(cost_line(maker, cache.count, cache.missing_rows, ranks))
        cache.fill(
            photos,
            backbone.preprocessing,
            BLOCK,
            lambda *block: _rows(maker, photos, *block),
            workers=workers,
            process=(rank, ranks),
            progress=progress,
            desc="outcomes",
        )

    cache = filled_cache(Path(folder), key, OUTCOMES, photos, rank, fill)
    kept, names, skipped = cache.photos
    found = Outcomes(cache.key, names, skipped, torch.tensor(kept, device="cpu"), cache)
    if len(found) < FEW and rank == 0:
        warnings.warn(
            f"table: only {len(found)} photos could be read, but a head needs {FEW} or more to "
            "learn from",
            stacklevel=2,
        )
    return found


def _rows(
    maker: RowMaker,
    photos: Photos,
    crop: int,
    block: range,
    images: Tensor | None,
    readable: list[int],
) -> dict[str, Tensor]:
    """The rows of a block of photos."""
    rows = [maker.empty() for _ in block]
    for place, image in zip(readable, [] if images is None else images, strict=True):
        seed = f"{maker.settings.seed}/{crop}/{block[place]}"
        rows[place] = maker(image, seed, photos.name(block[place]))
    return {name: torch.stack([row[name] for row in rows]) for name in maker.layout}
