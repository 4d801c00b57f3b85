"""A table of outcomes on disk, and reading it: masks, logits, and what they say about chosen classes.

A folder of :mod:`~xattn.training.row_files` with ``cells`` (crops x n, P, 28, 28) uint8 and ``logits``
(crops x n, 1 + 2 P, K) float16, the clean photo first; of networks with more than 2,000 classes the logits
of some, ``classes`` (crops x n, T) int32, and ``rest`` (crops x n, 1 + 2 P) float32, see
:mod:`~xattn.training.outcome_rows`. The index is ``outcomes.json``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.training.outcome_masks import masks_of
from xattn.training.outcome_rows import row_layout
from xattn.training.outcomes_objective import log_odds
from xattn.training.row_files import (
    ROWS,
    STORED,
    RowFile,
    RowFormat,
    check_size,
    damage_named,
    key_digest,
    listing,
    mapped,
    read_checksums,
    read_index,
    require_whole,
    rows_as_written,
)

TABLE = RowFormat(
    argument="table",
    holds="table of outcomes",
    index="outcomes.json",
    version=1,
    files=("cells", "logits", "classes", "rest"),
    writer="cache_outcomes",
    verb="compute",
    repairs=True,
)


@dataclass(frozen=True, eq=False)
class OutcomeBatch:
    """Outcomes of B photos under N = 2 P masks each: the masks, then their complements.

    ``masks`` (B, N, 28, 28), the share kept of each cell; ``logits`` (B, 1 + N, T), those of the clean
    image first; ``classes`` (B, T) says whose they are, from the most probable on, and ``rest`` (B, 1 + N)
    is the log-sum-exp of all others, both None where all ``num_classes`` have logits.
    """

    masks: Tensor
    logits: Tensor
    classes: Tensor | None
    rest: Tensor | None
    task: str
    num_classes: int
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.masks)

    def to(self, device: torch.device | str) -> OutcomeBatch:
        """The batch with its tensors on ``device``."""
        classes = None if self.classes is None else self.classes.to(device)
        rest = None if self.rest is None else self.rest.to(device)
        masks, logits = self.masks.to(device), self.logits.to(device)
        return replace(self, masks=masks, logits=logits, classes=classes, rest=rest)

    def top(self, count: int) -> Tensor:
        """The ``count`` most probable classes of each clean image, the first one first, (B, count)."""
        places = self.logits[:, 0].argsort(dim=1, descending=True, stable=True)[:, :count]
        return places if self.classes is None else self.classes.gather(1, places)

    def probabilities(self, classes: Tensor) -> Tensor:
        """Of ``classes`` (B, M) for each masked image, (B, M, N) float32: softmax, or sigmoids.

        Raises:
            ValueError: a class whose logits the table does not have.
        """
        if self.task == "multilabel":
            return self._chosen(classes).sigmoid().float()
        return (self._chosen(classes) - self._all().logsumexp(2)[:, None]).exp().float()

    def log_odds(self, classes: Tensor) -> Tensor:
        """log p / (1 - p) of ``classes`` (B, M) for each masked image, (B, M, N) float32.

        Raises:
            ValueError: a class whose logits the table does not have.
        """
        logits = self._all()
        index = self._places(classes)[:, None].expand(-1, logits.shape[1], -1)
        return log_odds(logits, index, self.task).transpose(1, 2).float()

    def _all(self) -> Tensor:
        """Logits of all masked images in float64, (B, N, T); ``rest`` counts as one more class."""
        parts = [self.logits] if self.rest is None else [self.logits, self.rest[..., None]]
        return torch.cat(parts, 2)[:, 1:].double()

    def _chosen(self, classes: Tensor) -> Tensor:
        """Logits of ``classes`` for all masked images in float64, (B, M, N)."""
        logits = self.logits[:, 1:].double().transpose(1, 2)
        return logits.gather(1, self._places(classes)[..., None].expand(-1, -1, logits.shape[2]))

    def _places(self, classes: Tensor) -> Tensor:
        """Where the logits of ``classes`` (B, M) are, (B, M)."""
        if classes.is_floating_point() or classes.ndim != 2 or len(classes) != len(self):
            raise ValueError(
                f"classes: got {classes.dtype} of shape {tuple(classes.shape)}; give integers of shape "
                f"({len(self)}, M)"
            )
        classes = classes.to(self.logits.device, torch.long)
        outside = (classes < 0) | (classes >= self.num_classes)
        if outside.any():
            raise ValueError(
                f"classes: got {int(classes[outside][0])}; the backbone's are 0..{self.num_classes - 1}"
            )
        if self.classes is None:
            return classes
        hits = self.classes[:, None] == classes[..., None]
        lost = ~hits.any(2)
        if lost.any():
            photo, place = (int(n) for n in lost.nonzero()[0])
            raise ValueError(
                f"classes: {int(classes[photo, place])} is not among the {self.classes.shape[1]} classes "
                f"that the table keeps of {self.names[photo]}; choose among these (top)"
            )
        return hits.int().argmax(2)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """A table of outcomes; photo i is the i-th that could be read.

    ``names`` are those of the photos, ``skipped`` holds (name, reason) of the photos that could not be
    read, ``task`` and ``num_classes`` are the backbone's, and ``key`` is what the numbers depend on.
    """

    folder: Path
    key: dict[str, Any]
    names: list[str]
    skipped: list[tuple[str, str]]
    task: str
    num_classes: int
    _rows: NDArray[np.int64] = field(repr=False)
    _photos: int = field(repr=False)
    _numbers: Mapping[str, NDArray[Any]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def numbers(self) -> list[int]:
        """The place of each photo in the data that the table was made of."""
        return self._rows.tolist()

    @property
    def digest(self) -> str:
        """SHA-256 of the key; a subset has one of its own."""
        return key_digest(self.key)

    @property
    def crops(self) -> int:
        """The number of crops of every photo: the evaluation crop, then random ones."""
        return int(self.key["crops"])

    @property
    def masks(self) -> int:
        """The number of masks of every crop, complements included."""
        return int(self.key["masks"])

    def row(self, index: int, crop: int = 0) -> OutcomeBatch:
        """The outcomes of one photo, as a batch of 1."""
        return self.batch([index], crop)

    def batch(self, index: Sequence[int] | Tensor, crop: int | Tensor = 0) -> OutcomeBatch:
        """The outcomes of photos.

        Args:
            index: numbers of photos, 0 .. len - 1.
            crop: 0 .. crops - 1: one for all photos, or one for each.
        """
        photos = np.asarray(index, dtype=np.int64)
        crops = np.broadcast_to(np.asarray(crop, dtype=np.int64), photos.shape)
        if crops.size and not 0 <= crops.min() <= crops.max() < self.crops:
            raise ValueError(f"crop: got {crop}; the table has the crops 0..{self.crops - 1}")
        rows = crops * self._photos + self._rows[photos]
        read = {name: torch.from_numpy(values[rows]) for name, values in self._numbers.items()}
        classes = read.get("classes")
        return OutcomeBatch(
            masks=masks_of(read["cells"]),
            logits=read["logits"].float(),
            classes=None if classes is None else classes.long(),
            rest=read.get("rest"),
            task=self.task,
            num_classes=self.num_classes,
            names=tuple(self.names[i] for i in photos.tolist()),
        )

    def subset(self, photos: Sequence[int] | Sequence[str | Path] | Tensor) -> Outcomes:
        """The table of some of its photos, by their numbers or by the paths or names that it was made of.

        Raises:
            ValueError: no photo, or one that the table does not have. Photos that were skipped when the
                table was made are skipped.
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
                f"photos: got {len(given)} readable photos {str(given)[:40]}; give some of the numbers "
                f"0..{len(self) - 1}, or paths"
            )
        rows = self._rows[np.asarray(given, dtype=np.int64)]
        digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        return replace(
            self,
            key={**self.key, "subset": {"count": len(given), "sha256": digest}},
            names=[self.names[i] for i in given],
            skipped=skipped,
            _rows=rows,
        )

    def find(self, photos: Sequence[str | Path]) -> list[int | None]:
        """The number of each photo, by the paths or names that the table was made of; None for those that
        were skipped.

        Raises:
            ValueError: a photo that the table was not made of.
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
                f"photos: {photos[found.index(None)]} is not in the table {self.folder}; name photos "
                f"that it was made of"
            )
        return [name for name in found if name is not None]


# ---------------------------------------------------------------------- reading


def open_outcomes(folder: str | Path) -> Outcomes:
    """The finished table in ``folder``; every row is compared with its checksum.

    Raises:
        ValueError: it is damaged, or not finished. FileNotFoundError: there is none.
    """
    folder = Path(folder)
    require_whole(folder, TABLE)
    return read_outcomes(folder)


def file_records(layout: Mapping[str, RowFile], total: int) -> dict[str, Any]:
    """Shape and type of every file of ``total`` rows, as the index says them."""
    return {
        name: {"shape": [total, *file.shape], "dtype": file.dtype.name}
        for name, file in layout.items()
    }


def read_outcomes(
    folder: Path, key: dict[str, Any] | None = None, names: list[str] | None = None
) -> Outcomes:
    """The table in ``folder``; ``key`` and the ``names`` of the photos are read there, too, if None."""
    with damage_named(folder, TABLE):
        index = read_index(folder, TABLE, key)
        found, key, classes = listing(index, TABLE, names), index.key, int(index.values["classes"])
        total = found.photos * int(key["crops"])
        layout = row_layout(int(key["masks"]), classes)
        if index.values["files"] != file_records(layout, total):
            raise ValueError(f"{TABLE.index} has the files {str(index.values['files'])[:200]}")
        numbers = {
            name: mapped(folder / name, (total, *file.shape), file.dtype)
            for name, file in layout.items()
        }
        check_size(folder / ROWS, total)
        states = np.fromfile(folder / ROWS, np.uint8)
        checksums = read_checksums(folder, total)
        good = rows_as_written([*numbers.values()], states, checksums, TABLE)
        if not good.all():
            raise ValueError(f"{int((~good).sum())} of {total} rows are not as they were written")
        kept = (states.reshape(-1, found.photos) == STORED).all(0)
        if np.flatnonzero(kept).tolist() != found.kept:
            raise ValueError(f"{TABLE.index} skips other photos than {ROWS}")
        return Outcomes(
            folder=folder,
            key=key,
            names=found.names,
            skipped=found.skipped,
            task=str(key["task"]),
            num_classes=classes,
            _rows=np.asarray(found.kept, dtype=np.int64),
            _photos=found.photos,
            _numbers=numbers,
        )
