"""Format 1: what the manifest says in columns, maps in one file, thumbnails as files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from xattn.packs.contained_files import AGAIN, PackError, PackFolder, why
from xattn.packs.contents import MAX_THUMBNAIL, Contents, Entry, PhotoFacts, no_such
from xattn.packs.explanation import MAX_CELLS
from xattn.packs.features import read_features
from xattn.packs.format import FEATURES, MAPS
from xattn.packs.manifest import DamagedFile, damaged, read_columns, skipped_of
from xattn.packs.remote_folder import RemoteFolder
from xattn.runtime.stores import StorePath
from xattn.runtime.tensor_file import TensorFile

if TYPE_CHECKING:
    import pandas as pd


class ManifestContents(Contents):
    """The contents of a pack of format 1.

    Raises:
        PackError: damaged, truncated, or with maps of other shapes than the manifest says.
    """

    def __init__(self, files: PackFolder, manifest: dict[str, Any], trusted: bool) -> None:
        self._files = files
        self._manifest = found = read_columns(manifest, trusted)
        self._maps = self._open_maps()
        self.xattn, self.metrics, self.shares = found.xattn, found.metrics, found.shares
        self.video, self.has_features = found.video, found.features is not None
        self.skipped = skipped_of(manifest)
        self.counts = len(found.entries["id"]), len(found.images["image_id"])
        self.methods = tuple(dict.fromkeys(found.entries["method"]))
        self._entry_rows = {id: i for i, id in enumerate(found.entries["id"])}
        self._image_rows = {id: i for i, id in enumerate(found.images["image_id"])}

    @property
    def entry_ids(self) -> Sequence[str]:
        return list(self._manifest.entries["id"])

    @property
    def image_ids(self) -> Collection[str]:
        return self._image_rows.keys()

    def know_rows(self, entries: Mapping[str, int], images: Mapping[str, int]) -> None:
        """Nothing: all of them are known."""

    def entries_of(self, image_id: str) -> list[str]:
        _row(self._image_rows, image_id, "image")
        return self._by_photo[image_id]

    @cached_property
    def _by_photo(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        entries = self._manifest.entries
        for image_id, entry_id in zip(entries["image_id"], entries["id"], strict=True):
            found.setdefault(image_id, []).append(entry_id)
        return found

    def entry(self, entry_id: str) -> Entry:
        i = _row(self._entry_rows, entry_id, "map")
        entry = {key: values[i] for key, values in self._manifest.entries.items()}
        measured = ((key, values[i]) for key, values in self._manifest.measured.items())
        return Entry(
            row=i,
            id=entry["id"],
            image_id=entry["image_id"],
            file_name=entry["file_name"],
            method=entry["method"],
            target=entry["target"],
            target_name=entry["target_name"],
            probability=float(entry["probability"]),
            is_mask=entry["is_mask"],
            sanity=entry["sanity"],
            protocol=self._manifest.protocols[entry["protocol"]],
            view=entry["view"],
            metrics={key: value for key, value in measured if value == value},
            curves=entry["curves"],
            sha256=entry["sha256"],
        )

    def photo(self, image_id: str) -> PhotoFacts:
        i = _row(self._image_rows, image_id, "image")
        images = self._manifest.images
        return PhotoFacts(
            row=i,
            image_id=image_id,
            top=images["top"][i],
            label=images["label"][i],
            label_name=images["label_name"][i],
            thumbnail_sha256=images["thumbnail_sha256"][i],
        )

    def map(self, entry: Entry) -> NDArray[np.float32]:
        return self._maps.read(entry.id, entry.sha256)

    def maps_file(self, entry: Entry) -> str:
        return MAPS

    def thumbnail_hashes(self) -> list[str | None]:
        return self._manifest.images["thumbnail_sha256"]

    def has_thumbnail(self, photo: PhotoFacts) -> bool:
        return self._manifest.images["thumbnail"][photo.row] is not None

    def thumbnail(self, photo: PhotoFacts) -> bytes | None:
        name = self._manifest.images["thumbnail"][photo.row]
        try:
            return None if name is None else self._files.read(name, MAX_THUMBNAIL)
        except OSError as error:
            raise PackError(f"{name} cannot be read ({why(error)}); {AGAIN}") from None

    def stored_photo(self, image_id: str) -> Path | StorePath | None:
        """The file of a thumbnail, None if it is not there."""
        name, folder = (
            self._manifest.images["thumbnail"][self.photo(image_id).row],
            self._files.path,
        )
        if isinstance(self._files, RemoteFolder):
            return self._files.file(name) if name else None
        if not name or folder is None:
            return None
        try:
            return folder / name if self._files.exists(name) else None
        except OSError as error:
            raise damaged(f"the thumbnail {name[:60]!r} cannot be read ({why(error)})") from None

    def features(self) -> NDArray[np.float16] | None:
        about = self._manifest.features
        return None if about is None else read_features(self._files, FEATURES, *about)

    def entry_table(self) -> pd.DataFrame:
        return _tables().entry_table(self._manifest)

    def image_table(self) -> pd.DataFrame:
        return _tables().image_table(self._manifest)

    def _open_maps(self) -> TensorFile:
        try:
            maps = TensorFile(partial(self._files.open, MAPS))
        except PackError:
            raise
        except (ValueError, OSError) as error:
            message = f"{MAPS} is damaged ({why(error)}); copy the pack again, or {AGAIN}"
            raise DamagedFile(MAPS, why(error), message) from None
        entries = self._manifest.entries
        for entry_id, shape in zip(entries["id"], entries["shape"], strict=True):
            if len(shape) != 2 or list(maps.shape(entry_id) or ()) != shape or 0 in shape:
                raise damaged(f"{MAPS} has no map {entry_id[:60]} of shape {str(shape)[:40]}")
            if max(shape) > MAX_CELLS:
                raise damaged(
                    f"the map {entry_id[:60]} has {shape[0]} x {shape[1]} cells, over the limit of "
                    f"{MAX_CELLS:,} a side"
                )
        return maps


def _row(rows: dict[str, int], id: Any, what: str) -> int:
    try:
        return rows[id]
    except (KeyError, TypeError):
        raise no_such(what) from None


def _tables() -> ModuleType:
    try:
        from xattn.packs import tables
    except ModuleNotFoundError:
        raise ValueError(
            'pack: its tables need pandas, which is not installed; run: pip install "xattn[tables]"'
        ) from None
    return tables
