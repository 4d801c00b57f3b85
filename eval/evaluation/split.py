"""Records on which items a network was fitted, chosen and scored, and raises an error if a scored item was
also used for fitting or choosing.

    split = Split("positions")
    train(student, split.fit(photos[::2]))
    accuracy(student, split.score(photos[1::2]))  # raises if one of them was fitted on

Items are compared by their content: photos by the bytes of their files, and tensors by their values. A seed
represents the data that are generated from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from xattn.photos.base import StoredPhoto
from xattn.runtime.files import file_sha256, write_json

Part = TypeVar("Part")
Role = Literal["fitted", "chosen", "scored"]


class LeakError(ValueError):
    """Raised if a network is scored on an item on which it was also fitted or chosen."""


class Split:
    """Records which items were used for fitting, choosing and scoring one network, or several networks that
    share their items.

    :meth:`fit`, :meth:`choose` and :meth:`score` take some of the items and return them unchanged, so a
    call can be written around an argument of another function. The items are given as a sequence, or as a
    named tuple whose first column holds them. If ``items`` is given, a slice or indices can be passed
    instead.

    Args:
        study: the name of the study in error messages.
        items: the sequence to which indices refer. Without ``items``, a number is itself an item, for
            example a seed.

    >>> split = Split("demo", items=["a.jpg", "b.jpg", "c.jpg"])
    >>> split.fit([0, 1])
    [0, 1]
    >>> split.score(slice(1, None))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    LeakError: split: demo scores 1 of the items that it was fitted on, such as b.jpg
    """

    def __init__(self, study: str, items: Sequence[Any] | Tensor | None = None) -> None:
        self.study, self.items = study, items
        self.folds: list[Split] = []
        self._names: dict[Role, dict[str, str]] = {"fitted": {}, "chosen": {}, "scored": {}}

    def fit(self, part: Part) -> Part:
        """Record items from which weights or statistics are computed, and return them."""
        return self._take("fitted", part)

    def choose(self, part: Part) -> Part:
        """Record items on which a setting, a threshold or an epoch is chosen, and return them."""
        return self._take("chosen", part)

    def score(self, part: Part) -> Part:
        """Record items on which results are reported, and return them."""
        return self._take("scored", part)

    def fold(self, items: Sequence[Any] | Tensor | None = None) -> Split:
        """A split for another network of the same study. That network may be scored on items on which the
        first network was fitted. The new split is included in the :meth:`record` of the first one."""
        self.folds.append(Split(self.study, items))
        return self.folds[-1]

    @property
    def has_scored(self) -> bool:
        """Whether anything was scored, here or in a fold."""
        return bool(self._names["scored"]) or any(fold.has_scored for fold in self.folds)

    def record(self) -> dict[str, Any]:
        """For each use, the number of items and a hash of them, as plain values for JSON."""
        found: dict[str, Any] = {
            role: {
                "count": len(keys),
                "sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
            }
            for role, keys in self._names.items()
            if keys
        }
        if self.folds:
            found["folds"] = [fold.record() for fold in self.folds]
        return found

    def write(self, path: Path) -> None:
        """Write :meth:`record` as JSON."""
        write_json(path, {"study": self.study, **self.record()})

    def _take(self, role: Role, part: Part) -> Part:
        new = {key_of(item): name_of(item) for item in self._items_of(part)}
        against: tuple[Role, ...] = ("fitted", "chosen") if role == "scored" else ("scored",)
        for other in against:
            twice = [name for key, name in new.items() if key in self._names[other]]
            if twice:
                used = "chosen by" if "chosen" in (role, other) else "fitted on"
                raise LeakError(
                    f"split: {self.study} scores {len(twice)} of the items that it was {used}, such as "
                    f"{twice[0]}; use different items, and remove copies of a photo"
                )
        self._names[role] |= new
        return part

    def _items_of(self, part: Any) -> Iterable[Any]:
        rows = part[0] if hasattr(part, "_fields") else part
        if self.items is None:
            return rows  # type: ignore[no-any-return]
        if isinstance(rows, slice):
            return self.items[rows]
        return (self.items[int(i)] if isinstance(i, Integral) else i for i in rows)


def key_of(item: Any) -> str:
    """A key that depends on an item's content and not on its name."""
    if isinstance(item, Tensor):
        values = item.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        kind = f"{item.dtype} {tuple(item.shape)} ".encode()
        return hashlib.sha256(kind + values).hexdigest()
    if isinstance(item, StoredPhoto):
        item = Path(item.name)
    if isinstance(item, Path):
        try:
            found = item.stat()
        except OSError:  # the photo is in a store, or cannot be read and is skipped later
            return str(item)
        return _content(item.resolve(), found.st_size, found.st_mtime_ns)
    if isinstance(item, Integral):
        return str(int(item))
    return str(getattr(item, "sha256", None) or repr(item))


def name_of(item: Any) -> str:
    """An item's name in error messages."""
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    return item.name if isinstance(item, StoredPhoto) else str(getattr(item, "path", item))


@cache
def _content(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)
