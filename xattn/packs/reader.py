"""Read packs. The manifest is read at once; a map or a photo is read on demand, and its hash is checked
then.

Ids are looked up and never joined to a path, and no file outside the pack's own folder is opened, see
:class:`~xattn.packs.contained_files.PackFolder`. Only :func:`load_pack`, which is for your own packs,
follows links. Problems with a pack raise a :class:`PackError`, whose message is written for the person who
opens the pack.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image

from xattn.packs.contained_files import AGAIN, PackError, PackFolder, folder_of
from xattn.packs.contents import Contents, Entry
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.format import MANIFEST, VIDEO, LaterVersion, parse_manifest, unreadable_manifest
from xattn.packs.manifest import DamagedFile
from xattn.photos.images import decode_image
from xattn.photos.view import View
from xattn.runtime.files import file_sha256
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import short_reason
from xattn.runtime.stores import StorePath, resolve_place

if TYPE_CHECKING:
    import pandas as pd

MAX_MANIFEST = 64 << 20  # bytes; 100,000 shards
MAX_PIXELS = 4_000_000  # in a thumbnail; xattn writes at most 512 x 512
AT_ONCE = 8  # maps that are requested from a store in parallel
RECENT_MAPS = 64 << 20  # bytes of maps that are cached


class NotAPack(PackError):
    """The manifest cannot be read at all, or belongs to another program."""


class Pack(Contents):
    """An opened pack; it takes little memory and is thread-safe.

    Attributes:
        files, manifest: see :class:`~xattn.packs.contents.Contents`.
        version: the first 12 hex digits of the manifest's SHA-256, for cache keys.
        counts: the numbers of entries and photos; they are available without reading the tables.
        methods: the methods of its entries, in order of first appearance; see :meth:`title_of`.
        metrics: descriptions of the metrics' columns.
        shares: by curve name, the shares of pixels that the curve's values belong to; a curve without
            an entry has its values at equal steps over [0, 1].
        skipped: (file name, reason) of images that were left out.

    Args:
        folder: where the pack is: a path, or a URL of an object store.
        id, name: the pack's id and name in the viewer.
        cache: a cache of recently read maps; packs may share one cache.
        trusted: whether the pack is the caller's own. If so, links that lead out of the folder are
            followed, and names are displayed as they were written.

    Raises:
        PackError: the pack is damaged or truncated, has a later version, or has files outside ``folder``.
    """

    def __init__(
        self,
        folder: str | Path | StorePath | PackFolder,
        id: str = "pack",
        name: str = "",
        cache: LRUCache | None = None,
        trusted: bool = False,
    ) -> None:
        files = folder if isinstance(folder, PackFolder) else folder_of(folder, trusted=trusted)
        self.id, self.name = id, name or files.name
        self._cache = LRUCache(RECENT_MAPS) if cache is None else cache
        try:
            data = files.read(MANIFEST, sys.maxsize if trusted else MAX_MANIFEST)
            parsed = parse_manifest(data, self.name)
        except OSError as error:
            raise NotAPack(str(unreadable_manifest(self.name, error))) from None
        except LaterVersion as error:
            if trusted:
                raise
            raise PackError(str(error)) from None
        except PackError:
            raise
        except ValueError as error:
            raise NotAPack(str(error)) from None
        self._sha256 = hashlib.sha256(data).hexdigest()
        self.version = self._sha256[:12]
        super().__init__(files, parsed, trusted)
        found = self.manifest
        self.counts, self.methods = (found.entries, found.images), tuple(found.methods)
        self.metrics, self.shares, self.skipped = found.metrics, found.shares, found.skipped

    @property
    def folder(self) -> Path | None:
        """The pack's folder on this machine's disk; None if it is elsewhere."""
        return self.files.path

    @cached_property
    def entries(self) -> pd.DataFrame:
        """One row per map, indexed by entry_id: image_id, method, target, target_name, probability,
        is_value (whether ``probability`` is a number of any size), is_mask, sanity (a row that every
        method has to beat), min, max, and one column per metric."""
        return _tables().entry_table(self)  # type: ignore[no-any-return]

    @cached_property
    def images(self) -> pd.DataFrame:
        """One row per image, indexed by image_id: file_name, title (the file name; for a frame of a clip
        also its number and time), label, label_name, predicted, predicted_name, confidence, right,
        disagreement, methods (their number).

        ``label`` and ``predicted`` are classes of the classifier, or None; ``right`` is True or False, or
        None if one of the two is unknown.
        """
        return _tables().image_table(self)  # type: ignore[no-any-return]

    @property
    def has_features(self) -> bool:
        """Return whether the pack contains the features of its photos."""
        return all(shard.features is not None for shard in self.manifest.shards)

    def same_photos(self, other: Pack) -> dict[str, str]:
        """Find the photos that are also in another pack, and return a mapping from their ids in this pack
        to their ids in the other.

        If the ids differ (for example, because one pack was made from a folder and the other from single
        files), two photos are the same if their stored pictures are identical byte for byte and no other
        picture in either pack is identical to them.
        """
        known = set(other.image_ids)
        found = {i: i for i in self.image_ids if i in known}
        if len(found) in (len(self.image_ids), len(known)):
            return found
        own, others = (pack.by_picture() for pack in (self, other))
        for sha256, image_id in own.items():
            if image_id not in found and sha256 in others:
                found[image_id] = others[sha256]
        return {i: found[i] for i in self.image_ids if i in found}

    def by_picture(self) -> dict[str, str]:
        """Map the SHA-256 of each stored picture to the id of its photo; pictures that several photos
        share are left out."""
        name = "thumbnail_sha256"
        hashes = [
            sha256 for table in self.rows("images", [name]) for sha256 in table[name].to_pylist()
        ]
        counts = Counter(hashes)
        pairs = zip(hashes, self.image_ids, strict=True)
        return {h.hex(): image_id for h, image_id in pairs if h is not None and counts[h] == 1}

    def title_of(self, method: str) -> str:
        """Return a method's name in running text, as stored in the pack."""
        return self.manifest.methods.get(method, method)

    def key(self, entry_id: str) -> tuple[str, int, str]:
        """Return (image_id, target, method) of an entry."""
        entry = self.entry(entry_id)
        return entry.image_id, entry.target, entry.method

    def explanation(self, entry_id: str) -> Explanation:
        """Return an entry with its map, which is read from the file and checked against its hash.

        Its ``source`` is the stored thumbnail if the pack is trusted, and otherwise None; see
        :meth:`photo`.
        """
        key = (self.files.address, self.version, entry_id)
        return self._cache.kept(
            key,
            lambda: self._read_explanation(self.entry(entry_id)),
            lambda found: found.map.nbytes,
        )

    def _read_explanation(self, entry: Entry) -> Explanation:
        photo = self.facts_of(entry.image_id)
        try:
            return Explanation(
                map=self.map(entry),
                target=entry.target,
                target_name=entry.target_name,
                probability=entry.probability,
                method=entry.method,
                method_title=self.title_of(entry.method),
                view=entry.view,
                image_id=entry.image_id,
                protocol=entry.protocol,
                file_name=entry.file_name,
                is_mask=entry.is_mask,
                facts=ImageFacts(photo.top, photo.label, photo.label_name, answer=photo.answer),
                metrics=entry.metrics,
                curves=entry.curves,
                sanity=entry.sanity,
                source=self.stored_photo(entry.image_id) if self._trusted else None,
            )
        except PackError:
            raise
        except (ValueError, OSError) as error:
            raise DamagedFile(self.maps_file(entry).name, short_reason(error)) from None

    def view(self, entry_id: str) -> View:
        """Return the part of the photo that the network saw."""
        return self.entry(entry_id).view

    def photo(self, image_id: str, side: int | None = None) -> Image.Image:
        """Return the stored thumbnail of a photo, RGB, shrunk to ``side`` pixels if it is larger."""
        data = self.photo_bytes(image_id)
        try:
            image = decode_image(io.BytesIO(data), image_id, MAX_PIXELS)
        except ValueError as error:
            raise PackError(
                f"The picture of {image_id} is damaged ({short_reason(error)}); {AGAIN}"
            ) from None
        if side is not None:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image

    def has_photo(self, image_id: str) -> bool:
        """Return whether the pack has a picture of a photo, according to its tables."""
        return self.facts_of(image_id).thumbnail_sha256 is not None

    def photo_bytes(self, image_id: str) -> bytes:
        """Return the JPEG bytes of :meth:`photo`, checked against their hash."""
        photo = self.facts_of(image_id)
        data = self.thumbnail(photo)
        if data is None:
            raise PackError(f"The pack has no picture of {image_id}; {AGAIN} from photos on disk")
        if hashlib.sha256(data).hexdigest() != photo.thumbnail_sha256:
            raise PackError(
                f"The picture of {image_id} is not the one that was written; reload the page if "
                f"the pack has just been replaced, otherwise {AGAIN}"
            )
        return data

    def curves(self, entry_id: str) -> dict[str, list[float]]:
        """Return the scores as pixels are removed or inserted, by curve name ("deletion", "insertion",
        ...), or {} if they were not measured."""
        return self.entry(entry_id).curves

    def top(self, image_id: str) -> list[tuple[int, str, float]]:
        """Return (class, its name, probability) for the classifier's most probable classes."""
        return list(self.facts_of(image_id).top)

    def provenance(self, entry_id: str) -> dict[str, Any]:
        """Return the provenance of a map: method, head, protocol, versions and hashes.

        ``backbone`` and ``head`` are dictionaries or None; ``protocol`` is as it was recorded.
        """
        entry = self.entry(entry_id)
        return {
            "method": entry.method,
            "backbone": _table(entry.protocol.get("backbone")),
            "head": _table(entry.protocol.get("head")),
            "protocol": entry.protocol,
            "xattn": self.manifest.xattn,
            "metrics": {m.key: m.protocol_id for m in self.metrics if m.key in entry.metrics},
            "sha256": {
                "map": entry.sha256,
                "thumbnail": self.facts_of(entry.image_id).thumbnail_sha256,
                "manifest": self._sha256,
            },
        }

    @property
    def video(self) -> Path | None:
        """Return the path of the pack's film after checking its hash, or None if the pack has no film."""
        sha256 = self.manifest.video
        if sha256 is None:
            return None
        path = self.files.on_disk(VIDEO)
        if file_sha256(path) != sha256:
            raise PackError(f"{VIDEO} is not the film that was written; {AGAIN}")
        return path


def load_pack(folder: str | Path) -> list[Explanation]:
    """Load all explanations of a pack, in order, from its folder or URL; their photos are thumbnails.

    Raises:
        FileNotFoundError: the folder does not exist. ValueError: the place is not a pack, the pack is
            damaged, or the store does not respond; :class:`~xattn.packs.format.LaterVersion` if a later
            xattn wrote the pack.

    Example:
        >>> import numpy as np, tempfile, xattn
        >>> from xattn import load_pack
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> folder = f"{tempfile.mkdtemp()}/pack"
        >>> photo = np.zeros((64, 64, 3), np.uint8)
        >>> _ = xattn.explain(photo, net, explainer="gradcam", output=folder)
        >>> [explanation] = load_pack(folder)
        >>> explanation.method
        'gradcam'
    """
    place = resolve_place(folder, "pack")
    if isinstance(place, Path) and not place.is_dir():
        raise FileNotFoundError(f"pack: there is no folder {place}; give one that save_pack wrote")
    nothing_kept = LRUCache(0)
    try:
        pack = Pack(place, name=str(place), cache=nothing_kept, trusted=True)
        if isinstance(place, Path):
            return [pack.explanation(entry_id) for entry_id in pack.entry_ids]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(pack.explanation, pack.entry_ids))
    except DamagedFile as error:
        what = "damaged" if error.file == MANIFEST else "missing or damaged"
        raise ValueError(
            f"pack: {place / error.file} is {what} ({error.reason}); {AGAIN}"
        ) from None
    except PackError as error:
        text = str(error)
        raise ValueError(text if text.startswith("pack: ") else f"pack: {text}") from None


def _table(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _tables() -> ModuleType:
    try:
        from xattn.packs import tables
    except ModuleNotFoundError:
        raise ValueError(
            'pack: its tables need pandas, which is not installed; run: pip install "xattn[tables]"'
        ) from None
    return tables
