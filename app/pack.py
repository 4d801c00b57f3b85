"""One pack: its index read at once, a map or a photo only when it is asked for, checked by its hash.

Ids are looked up and never joined to a path, and every file is opened inside the pack's own folder or
not at all. What is wrong is a :class:`PackError`, whose text is for the person at the page.
"""

from __future__ import annotations

import gc
import hashlib
import io
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.app.inside import AGAIN, PackError, open_inside, read_inside, why
from xattn.app.pack_index import MetricInfo, damaged, read_index
from xattn.packs.explanation import MAX_CELLS, Explanation, ImageFacts
from xattn.packs.format import MANIFEST, MAPS, VIDEO, LaterVersion, parse_manifest
from xattn.photos.images import decode_image
from xattn.photos.view import View
from xattn.runtime.files import file_sha256
from xattn.runtime.tensor_file import TensorFile

__all__ = ["MetricInfo", "NoPack", "Pack", "PackError", "Recent"]

MAX_MANIFEST = 256 << 20  # bytes; 200,000 maps, and reading takes up to 30 times as many
MAX_THUMBNAIL = 32 << 20  # bytes
MAX_PIXELS = 4_000_000  # of a thumbnail; xattn writes at most 512 x 512
RECENT_MAPS = 64 << 20  # bytes of maps that are kept


class NoPack(PackError):
    """The manifest cannot be read at all, or is another program's."""


class Recent:
    """What was read last, up to a sum of sizes (bytes by default); threads may share it."""

    def __init__(self, limit: int = RECENT_MAPS) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        with self._lock:
            self._bytes += size - self._kept.pop(key, (None, 0))[1]
            self._kept[key] = (value, size)
            while self._bytes > self._limit:
                self._bytes -= self._kept.popitem(last=False)[1][1]


class Pack:
    """A pack that was opened; cheap to keep, safe to share between threads.

    Attributes:
        version: the first 12 hex digits of the manifest's SHA-256, for keys of caches.
        images: one row an image, by image_id: file_name, title (what to call it: the file name, of a
            clip's frame with its number and time), label, label_name, predicted, predicted_name,
            confidence, right, disagreement, methods (how many). ``label`` and ``predicted`` are classes
            of the classifier, or None; ``right`` is True, False, or None where one of them is not known.
        entries: one row a map, by entry_id: image_id, method, target, target_name, probability,
            is_mask, sanity (a row that every method has to beat), min, max, and a column a metric.
        metrics: what the metrics' columns are.
        shares: by name of a curve, the shares of pixels that its values stand for; a curve that is not
            there has its values at equal steps over [0, 1].

    Raises:
        PackError: damaged, truncated, of a later version, or with files outside ``folder``.
    """

    def __init__(
        self, folder: Path, id: str = "pack", name: str = "", recent: Recent | None = None
    ) -> None:
        self.folder = folder.resolve()
        self.id, self.name = id, name or folder.name
        self._recent = Recent() if recent is None else recent
        data = read_inside(self.folder, MANIFEST, MAX_MANIFEST)
        self._sha256 = hashlib.sha256(data).hexdigest()
        self.version = self._sha256[:12]
        with _no_collection():
            try:
                manifest = parse_manifest(data, self.name)
            except LaterVersion as error:
                raise PackError(str(error)) from None
            except ValueError as error:
                raise NoPack(str(error)) from None
            self._index = read_index(manifest)
            self._maps = self._open_maps()
        self.images, self.entries = self._index.images, self._index.entries
        self.metrics, self.shares = self._index.metrics, self._index.shares
        self._entry_rows = {id: i for i, id in enumerate(self.entries.index)}
        self._image_rows = {id: i for i, id in enumerate(self.images.index)}

    def explanation(self, entry_id: str) -> Explanation:
        """One entry with its map, which is read now and checked by its hash."""
        i = self._entry(entry_id)
        key = (self.folder, self.version, entry_id)
        found: Explanation | None = self._recent.get(key)
        if found is not None:
            return found
        row = self.entries.iloc[i]
        image = self.images.iloc[self._image(row["image_id"])]
        try:
            found = Explanation(
                map=self._maps.read(entry_id, self._index.sha256[i]),
                target=int(row["target"]),
                target_name=row["target_name"],
                probability=float(row["probability"]),
                method=row["method"],
                view=self._index.views[i],
                image_id=row["image_id"],
                protocol=self._index.protocols[self._index.protocol[i]],
                file_name=image["file_name"],
                is_mask=bool(row["is_mask"]),
                facts=ImageFacts(
                    tuple(self.top(row["image_id"])), image["label"], image["label_name"]
                ),
                metrics={
                    m.key: float(row[m.key]) for m in self.metrics if row[m.key] == row[m.key]
                },
                curves=self.curves(entry_id),
                sanity=bool(row["sanity"]),
            )
        except PackError:
            raise
        except (ValueError, OSError) as error:
            raise PackError(f"The map {entry_id} is damaged ({why(error)}); {AGAIN}") from None
        self._recent.put(key, found, found.map.nbytes)
        return found

    def view(self, entry_id: str) -> View:
        """Which part of the photo the network saw; nothing is read for it."""
        return self._index.views[self._entry(entry_id)]

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
        name, sha256 = self._index.thumbnails[i], self._index.thumbnail_sha256[i]
        if name is None:
            raise PackError(f"The pack holds no picture of {image_id}; {AGAIN} from photos on disk")
        data = read_inside(self.folder, name, MAX_THUMBNAIL)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise PackError(
                f"The picture of {image_id} is not the one that was written; reload the page if the "
                f"pack was just replaced, else {AGAIN}"
            )
        return data

    def curves(self, entry_id: str) -> dict[str, list[float]]:
        """Scores while pixels go or come, by "deletion", "insertion", ...; {} where not measured."""
        curves = self._index.curves[self._entry(entry_id)]
        if not all(math.isfinite(v) for values in curves.values() for v in values):
            raise damaged(f"the curves of {entry_id} are not finite")
        return {name: list(values) for name, values in curves.items()}

    def top(self, image_id: str) -> list[tuple[int, str, float]]:
        """(class, its name, probability) of the classifier's first classes; [] in old packs."""
        return list(self._index.tops[self._image(image_id)])

    def provenance(self, entry_id: str) -> dict[str, Any]:
        """Where a map comes from: method, head, protocol, versions and hashes.

        ``backbone`` and ``head`` are tables or None; ``protocol`` is as it was recorded.
        """
        i = self._entry(entry_id)
        row = self.entries.iloc[i]
        protocol = self._index.protocols[self._index.protocol[i]]
        return {
            "method": row["method"],
            "backbone": _table(protocol.get("backbone")),
            "head": _table(protocol.get("head")),
            "protocol": protocol,
            "xattn": self._index.xattn,
            "metrics": {m.key: m.protocol_id for m in self.metrics if row[m.key] == row[m.key]},
            "sha256": {
                "map": self._index.sha256[i],
                "thumbnail": self._index.thumbnail_sha256[self._image(row["image_id"])],
                "manifest": self._sha256,
            },
        }

    @property
    def video(self) -> Path | None:
        """The pack's film, or None; checked by its hash."""
        if self._index.video is None:
            return None
        open_inside(self.folder, VIDEO).close()
        path = (self.folder / VIDEO).resolve()
        if self._index.video and file_sha256(path) != self._index.video:
            raise PackError(f"{VIDEO} is not the film that was written; {AGAIN}")
        return path

    def _open_maps(self) -> TensorFile:
        try:
            maps = TensorFile(lambda: open_inside(self.folder, MAPS))
        except PackError:
            raise
        except (ValueError, OSError) as error:
            raise PackError(
                f"{MAPS} is damaged ({why(error)}); copy the pack again, or {AGAIN}"
            ) from None
        for entry_id, shape in zip(self._index.entries.index, self._index.shapes, strict=True):
            if len(shape) != 2 or list(maps.shape(entry_id) or ()) != shape or 0 in shape:
                raise PackError(f"{MAPS} has no map {entry_id} of shape {str(shape)[:40]}; {AGAIN}")
            if max(shape) > MAX_CELLS:
                raise PackError(
                    f"The map {entry_id} has {shape[0]} x {shape[1]} cells, over the limit of "
                    f"{MAX_CELLS:,} a side; {AGAIN}"
                )
        return maps

    def _entry(self, entry_id: str) -> int:
        return _row(self._entry_rows, entry_id, "map")

    def _image(self, image_id: str) -> int:
        return _row(self._image_rows, image_id, "image")


def _table(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


def _row(rows: dict[str, int], id: Any, what: str) -> int:
    try:
        return rows[id]
    except (KeyError, TypeError):
        raise PackError(f"The pack has no such {what}; choose one of its gallery") from None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Reading a large manifest makes a million objects and no garbage; looking for it takes longer
    than reading."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
