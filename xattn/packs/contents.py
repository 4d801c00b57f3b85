"""What a pack holds, behind one interface for both formats.

:class:`~xattn.packs.reader.Pack` is what everybody uses; it asks one of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.packs.contained_files import PackError
from xattn.packs.manifest import MetricInfo, Top
from xattn.photos.base import StoredPhoto
from xattn.photos.view import View
from xattn.runtime.stores import StorePath

if TYPE_CHECKING:
    import pandas as pd

MAX_THUMBNAIL = 32 << 20  # bytes


class Entry(NamedTuple):
    """What a pack says of one map; ``row`` is its place among all."""

    row: int
    id: str
    image_id: str
    file_name: str
    method: str
    target: int
    target_name: str
    probability: float
    is_mask: bool
    sanity: bool
    protocol: dict[str, Any]
    view: View
    metrics: dict[str, float]
    curves: Mapping[str, Sequence[float]]
    sha256: str | None


class PhotoFacts(NamedTuple):
    """What a pack says of one photo; ``row`` is its place among all."""

    row: int
    image_id: str
    top: Top
    label: int | None
    label_name: str | None
    thumbnail_sha256: str | None


class Contents(ABC):
    """The entries and photos of a pack; safe to share between threads.

    Attributes:
        xattn: the version of xattn that wrote the pack.
        counts: how many entries and photos there are.
        methods: the methods of the entries, in the order in which they come first.
        skipped: (file name, reason) of images that were left out.
        metrics, shares: see :class:`~xattn.packs.reader.Pack`.
        has_features: whether the features of all photos are there.
        video: the hash of the film, "" if the film has none, None without a film.
    """

    xattn: str
    counts: tuple[int, int]
    methods: tuple[str, ...]
    metrics: list[MetricInfo]
    shares: dict[str, list[float]]
    skipped: list[tuple[str, str]]
    has_features = False
    video: str | None

    @property
    @abstractmethod
    def entry_ids(self) -> Sequence[str]:
        """The ids of the entries, in their order."""

    @property
    @abstractmethod
    def image_ids(self) -> Collection[str]:
        """The ids of the photos, in their order; ``in`` is fast."""

    @property
    def first_entry(self) -> str:
        """The id of the first entry."""
        return self.entry_ids[0]

    @abstractmethod
    def know_rows(self, entries: Mapping[str, int], images: Mapping[str, int]) -> None:
        """See :meth:`xattn.packs.reader.Pack.know_rows`."""

    @abstractmethod
    def entries_of(self, image_id: str) -> list[str]:
        """The ids of a photo's entries, in their order; PackError where there is no such photo."""

    @abstractmethod
    def entry(self, entry_id: str) -> Entry:
        """What is known of a map; PackError where there is none of this id."""

    @abstractmethod
    def photo(self, image_id: str) -> PhotoFacts:
        """What is known of a photo; PackError where there is none of this id."""

    @abstractmethod
    def map(self, entry: Entry) -> NDArray[np.float32]:
        """The map (h, w) of an entry, checked by its hash; ValueError or OSError if it is damaged."""

    @abstractmethod
    def maps_file(self, entry: Entry) -> str:
        """The name of the file that has the map of an entry."""

    @abstractmethod
    def thumbnail_hashes(self) -> list[str | None]:
        """The SHA-256 of each photo's JPEG file, in their order; None where it is not known."""

    @abstractmethod
    def has_thumbnail(self, photo: PhotoFacts) -> bool:
        """Whether the pack names a JPEG file of a photo."""

    @abstractmethod
    def thumbnail(self, photo: PhotoFacts) -> bytes | None:
        """The JPEG file of a photo, not checked by its hash; None where the pack has none."""

    @abstractmethod
    def stored_photo(self, image_id: str) -> Path | StorePath | StoredPhoto | None:
        """The thumbnail as the source of an explanation, None where the pack has none."""

    @abstractmethod
    def entry_table(self) -> pd.DataFrame:
        """See :attr:`xattn.packs.reader.Pack.entries`."""

    @abstractmethod
    def image_table(self) -> pd.DataFrame:
        """See :attr:`xattn.packs.reader.Pack.images`."""

    def features(self) -> NDArray[np.float16] | None:
        """See :meth:`xattn.packs.reader.Pack.features`."""
        return None

    def parquet(self) -> tuple[list[Path], list[Path]] | None:
        """See :meth:`xattn.packs.reader.Pack.parquet`."""
        return None


def no_such(what: str) -> PackError:
    """The error of an id that the pack does not have."""
    return PackError(f"The pack has no such {what}; choose one of its gallery")
