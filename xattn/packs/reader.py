"""Packs read back: the manifest at once, a map or a photo only when it is asked for, checked by its hash.

Ids are looked up and never joined to a path, and every file is opened inside the pack's own folder or
not at all, see :class:`~xattn.packs.contained_files.PackFolder`; only :func:`load_pack`, for packs of
one's own, follows links. What is wrong with a pack is a :class:`PackError`, whose text is for the person
who opens it.
"""

from __future__ import annotations

import gc
import hashlib
import io
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xattn.packs.contained_files import AGAIN, PackError, PackFolder, why
from xattn.packs.explanation import MAX_CELLS, Explanation, ImageFacts
from xattn.packs.features import read_features
from xattn.packs.format import (
    FEATURES,
    MANIFEST,
    MAPS,
    VIDEO,
    LaterVersion,
    parse_manifest,
    unreadable_manifest,
)
from xattn.packs.manifest import DamagedFile, Manifest, damaged, read_columns
from xattn.packs.remote_folder import RemoteFolder, folder_of
from xattn.photos.images import decode_image
from xattn.photos.view import View
from xattn.runtime.files import stream_sha256
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.stores import StorePath, place_of
from xattn.runtime.tensor_file import TensorFile

if TYPE_CHECKING:
    import pandas as pd

MAX_MANIFEST = 256 << 20  # bytes; 200,000 maps, and reading takes up to 30 times as many
MAX_THUMBNAIL = 32 << 20  # bytes
MAX_PIXELS = 4_000_000  # of a thumbnail; xattn writes at most 512 x 512
RECENT_MAPS = 64 << 20  # bytes of maps that are kept


class NotAPack(PackError):
    """The manifest cannot be read at all, or is another program's."""


class Pack:
    """A pack that was opened; cheap to keep, safe to share between threads.

    Attributes:
        files: the folder that the pack's files are read from.
        version: the first 12 hex digits of the manifest's SHA-256, for keys of caches.
        metrics: what the metrics' columns are.
        shares: by name of a curve, the shares of pixels that its values stand for; a curve that is not
            there has its values at equal steps over [0, 1].

    Args:
        folder: where the pack is, a path or the URL of an object store.
        id, name: what the viewer calls the pack.
        cache: keeps the maps that were read last; packs may share one.
        trusted: the pack is the caller's own: links that lead out of the folder are followed, and names
            stay as they were written; see :func:`xattn.packs.manifest.read_columns`.

    Raises:
        PackError: damaged, truncated, of a later version, or with files outside ``folder``.
    """

    def __init__(
        self,
        folder: str | Path | StorePath | PackFolder,
        id: str = "pack",
        name: str = "",
        cache: LRUCache | None = None,
        trusted: bool = False,
    ) -> None:
        self.files = (
            folder if isinstance(folder, PackFolder) else folder_of(folder, trusted=trusted)
        )
        self.id, self.name = id, name or self.files.name
        self._cache = LRUCache(RECENT_MAPS) if cache is None else cache
        self._trusted = trusted
        data = self._manifest_bytes()
        self._sha256 = hashlib.sha256(data).hexdigest()
        self.version = self._sha256[:12]
        with _no_garbage_collection():
            self._manifest = self._columns(data)
            self._maps = self._open_maps()
        self.metrics, self.shares = self._manifest.metrics, self._manifest.shares
        self._entries, self._images = self._manifest.entries, self._manifest.images
        self._entry_rows = {id: i for i, id in enumerate(self._entries["id"])}
        self._image_rows = {id: i for i, id in enumerate(self._images["image_id"])}

    @property
    def folder(self) -> Path | None:
        """The pack's folder on this machine's disk; None where it is elsewhere."""
        return self.files.path

    @cached_property
    def entries(self) -> pd.DataFrame:
        """One row a map, by entry_id: image_id, method, target, target_name, probability, is_value
        (whether that is a number of any size), is_mask, sanity (a row that every method has to beat), min,
        max, and a column a metric."""
        tables = _tables()
        with _no_garbage_collection():
            return tables.entry_table(self._manifest)

    @cached_property
    def images(self) -> pd.DataFrame:
        """One row an image, by image_id: file_name, title (what to call it: the file name, for a clip's
        frame with its number and time), label, label_name, predicted, predicted_name, confidence, right,
        disagreement, methods (how many).

        ``label`` and ``predicted`` are classes of the classifier, or None; ``right`` is True, False, or
        None where one of them is not known.
        """
        tables = _tables()
        with _no_garbage_collection():
            return tables.image_table(self._manifest)

    @property
    def has_features(self) -> bool:
        """Whether the pack holds the features of its photos."""
        return self._manifest.features is not None

    def features(self) -> NDArray[np.float16] | None:
        """What the classifier read of each photo, (M, d) in the order of :attr:`images`; None in a pack
        without. Read now, and checked by its hash."""
        if self._manifest.features is None:
            return None
        return read_features(self.files, FEATURES, *self._manifest.features)

    @property
    def entry_ids(self) -> list[str]:
        """The ids of the entries, in their order."""
        return list(self._entries["id"])

    def key(self, entry_id: str) -> tuple[str, int, str]:
        """(image_id, target, method) of an entry; nothing is read for it."""
        i = self._entry(entry_id)
        return tuple(self._entries[name][i] for name in ("image_id", "target", "method"))  # type: ignore[return-value]

    def explanation(self, entry_id: str) -> Explanation:
        """One entry with its map, which is read now and checked by its hash.

        Its ``source`` is the stored thumbnail if the pack is trusted, else None; see :meth:`photo`.
        """
        i = self._entry(entry_id)
        key = (self.files.address, self.version, entry_id)
        found: Explanation | None = self._cache.get(key)
        if found is None:
            found = self._read_explanation(i)
            self._cache.put(key, found, found.map.nbytes)
        return found

    def _read_explanation(self, i: int) -> Explanation:
        entry = {key: values[i] for key, values in self._entries.items()}
        image = self._image(entry["image_id"])
        try:
            return Explanation(
                map=self._maps.read(entry["id"], entry["sha256"]),
                target=entry["target"],
                target_name=entry["target_name"],
                probability=float(entry["probability"]),
                method=entry["method"],
                view=entry["view"],
                image_id=entry["image_id"],
                protocol=self._manifest.protocols[entry["protocol"]],
                file_name=entry["file_name"],
                is_mask=entry["is_mask"],
                facts=ImageFacts(
                    self._images["top"][image],
                    self._images["label"][image],
                    self._images["label_name"][image],
                ),
                metrics=self._metrics_of(i),
                curves=self.curves(entry["id"]),
                sanity=entry["sanity"],
                source=self._stored_photo(entry["thumbnail"]) if self._trusted else None,
            )
        except PackError:
            raise
        except (ValueError, OSError) as error:
            message = f"The map {entry['id']} is damaged ({why(error)}); {AGAIN}"
            raise DamagedFile(MAPS, why(error), message) from None

    def view(self, entry_id: str) -> View:
        """Which part of the photo the network saw; nothing is read for it."""
        view: View = self._entries["view"][self._entry(entry_id)]
        return view

    def photo(self, image_id: str, side: int | None = None) -> Image.Image:
        """The stored thumbnail of a photo, RGB, shrunk to ``side`` pixels if it is larger."""
        data = self.photo_bytes(image_id)
        try:
            image = decode_image(io.BytesIO(data), image_id, MAX_PIXELS)
        except ValueError as error:
            raise PackError(
                f"The picture of {image_id} is damaged ({why(error)}); {AGAIN}"
            ) from None
        if side is not None:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image

    def photo_bytes(self, image_id: str) -> bytes:
        """The JPEG file of :meth:`photo`, checked by its hash."""
        i = self._image(image_id)
        name, sha256 = self._images["thumbnail"][i], self._images["thumbnail_sha256"][i]
        if name is None:
            raise PackError(f"The pack holds no picture of {image_id}; {AGAIN} from photos on disk")
        try:
            data = self.files.read(name, MAX_THUMBNAIL)
        except OSError as error:
            raise PackError(f"{name} cannot be read ({why(error)}); {AGAIN}") from None
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise PackError(
                f"The picture of {image_id} is not the one that was written; reload the page if the "
                f"pack was just replaced, else {AGAIN}"
            )
        return data

    def curves(self, entry_id: str) -> dict[str, list[float]]:
        """Scores while pixels go or come, by "deletion", "insertion", ...; {} where not measured."""
        curves = self._entries["curves"][self._entry(entry_id)]
        if not all(math.isfinite(v) for values in curves.values() for v in values):
            raise damaged(f"the curves of {entry_id[:60]} are not finite")
        return {name: list(values) for name, values in curves.items()}

    def top(self, image_id: str) -> list[tuple[int, str, float]]:
        """(class, its name, probability) of the classifier's first classes; [] in old packs."""
        return list(self._images["top"][self._image(image_id)])

    def provenance(self, entry_id: str) -> dict[str, Any]:
        """Where a map comes from: method, head, protocol, versions and hashes.

        ``backbone`` and ``head`` are tables or None; ``protocol`` is as it was recorded.
        """
        i = self._entry(entry_id)
        protocol = self._manifest.protocols[self._entries["protocol"][i]]
        measured = self._metrics_of(i)
        image = self._image(self._entries["image_id"][i])
        return {
            "method": self._entries["method"][i],
            "backbone": _table(protocol.get("backbone")),
            "head": _table(protocol.get("head")),
            "protocol": protocol,
            "xattn": self._manifest.xattn,
            "metrics": {m.key: m.protocol_id for m in self.metrics if m.key in measured},
            "sha256": {
                "map": self._entries["sha256"][i],
                "thumbnail": self._images["thumbnail_sha256"][image],
                "manifest": self._sha256,
            },
        }

    @property
    def video(self) -> Path | None:
        """The pack's film, or None; checked by its hash."""
        if self._manifest.video is None:
            return None
        with self.files.open(VIDEO) as stream:
            changed = self._manifest.video and stream_sha256(stream) != self._manifest.video
        if changed:
            raise PackError(f"{VIDEO} is not the film that was written; {AGAIN}")
        return None if self.folder is None else (self.folder / VIDEO).resolve()

    def _metrics_of(self, i: int) -> dict[str, float]:
        """The metrics that were measured of an entry."""
        values = ((key, values[i]) for key, values in self._manifest.measured.items())
        return {key: value for key, value in values if value == value}

    def _stored_photo(self, name: str | None) -> Path | StorePath | None:
        """The file of a thumbnail, None if it is not there."""
        if isinstance(self.files, RemoteFolder):
            return self.files.file(name) if name else None
        if not name or self.folder is None:
            return None
        try:
            return self.folder / name if self.files.exists(name) else None
        except OSError as error:
            raise damaged(f"the thumbnail {name[:60]!r} cannot be read ({why(error)})") from None

    def _manifest_bytes(self) -> bytes:
        try:
            return self.files.read(MANIFEST, sys.maxsize if self._trusted else MAX_MANIFEST)
        except OSError as error:
            raise NotAPack(str(unreadable_manifest(self.name, error))) from None

    def _columns(self, data: bytes) -> Manifest:
        """The columns of a manifest; what was parsed is freed before the next garbage collection."""
        try:
            parsed = parse_manifest(data, self.name)
        except LaterVersion as error:
            if self._trusted:
                raise
            raise PackError(str(error)) from None
        except ValueError as error:
            raise NotAPack(str(error)) from None
        return read_columns(parsed, self._trusted)

    def _open_maps(self) -> TensorFile:
        try:
            maps = TensorFile(partial(self.files.open, MAPS))
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

    def _entry(self, entry_id: str) -> int:
        return _row(self._entry_rows, entry_id, "map")

    def _image(self, image_id: str) -> int:
        return _row(self._image_rows, image_id, "image")


def load_pack(folder: str | Path) -> list[Explanation]:
    """The explanations of a pack, a folder or the URL of one, in their order; photos come as thumbnails.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a pack, or a damaged one, or a store that does
            not answer; :class:`~xattn.packs.format.LaterVersion` for one that a later xattn wrote.
    """
    place = place_of(folder, "pack")
    if isinstance(place, Path) and not place.is_dir():
        raise FileNotFoundError(f"pack: no folder {place}; give one that save_pack wrote")
    nothing_kept = LRUCache(0)
    try:
        pack = Pack(place, name=str(place), cache=nothing_kept, trusted=True)
        return [pack.explanation(entry_id) for entry_id in pack.entry_ids]
    except DamagedFile as error:
        what = "missing or damaged" if error.file == MAPS else "damaged"
        raise ValueError(
            f"pack: {place / error.file} is {what} ({error.reason}); {AGAIN}"
        ) from None
    except PackError as error:
        text = str(error)
        raise ValueError(text if text.startswith("pack: ") else f"pack: {text}") from None


def _table(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _row(rows: dict[str, int], id: Any, what: str) -> int:
    try:
        return rows[id]
    except (KeyError, TypeError):
        raise PackError(f"The pack has no such {what}; choose one of its gallery") from None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Reading a large manifest makes a million objects and no garbage; looking for some takes longer
    than reading."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _tables() -> ModuleType:
    try:
        from xattn.packs import tables
    except ModuleNotFoundError:
        raise ValueError(
            'pack: its tables need pandas, which is not installed; run: pip install "xattn[tables]"'
        ) from None
    return tables
