"""The stored content of a pack. The manifest is read immediately; rows, maps and pictures are read on
demand.

Use :class:`~xattn.packs.reader.Pack`, which adds complete explanations and pictures.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from xattn.packs import columns, manifest
from xattn.packs.answers import AnswerFacts
from xattn.packs.columns import MAX_FILE, BoundedParquet
from xattn.packs.contained_files import PackError, PackFolder
from xattn.packs.format import MANIFEST
from xattn.packs.manifest import DamagedFile, ShardFile, damaged_manifest
from xattn.photos.base import Photos, StoredPhoto
from xattn.photos.images import MAX_PIXELS, decode_image
from xattn.photos.view import View
from xattn.runtime import strict_json
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import encodable, short_reason, visible

MAX_THUMBNAIL = 32 << 20  # bytes
MAX_FEATURES = 1 << 30  # bytes of the features in a shard
MAX_IDS = 128 << 20  # bytes of all ids of one kind
MAX_TOP = 1000  # classes
RECENT_ROWS = 48 << 20  # bytes of decoded rows that are cached
KNOWN_ROWS = 1 << 14  # ids whose rows are cached


class Entry(NamedTuple):
    """The data of one map in a pack; ``row`` is its position among all maps."""

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
    curves: dict[str, list[float]]
    shape: tuple[int, int]
    place: int
    sha256: str


class PhotoFacts(NamedTuple):
    """The data of one photo in a pack; ``row`` is its position among all photos."""

    row: int
    image_id: str
    top: tuple[tuple[int, str, float], ...]
    label: int | None
    label_name: str | None
    answer: AnswerFacts | None
    thumbnail: tuple[int, int]
    """The position of its JPEG file, and its size in bytes."""
    thumbnail_sha256: str | None


class Ids(Sequence[str]):
    """The ids of all rows; even for a million ids, only their characters take memory.

    Raises:
        ValueError: an id occurs twice.
    """

    def __init__(self, texts: pa.ChunkedArray) -> None:
        self.texts = texts
        if pc.count_distinct(texts).as_py() != len(texts):
            counts = texts.value_counts()
            twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            raise ValueError(f"the id {twice[0].as_py()[:60]} occurs twice")

    def row(self, id: Any) -> int:
        """Return the row of an id; raise a KeyError if there is none. This searches all ids, which takes 6
        ms for a million."""
        if not isinstance(id, str) or encodable(id) != id:
            raise KeyError(id)
        found = int(pc.index(self.texts, pa.scalar(id, pa.string())).as_py())
        if found < 0:
            raise KeyError(id)
        return found

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.texts.to_pylist()[index]
        return self.texts[range(len(self))[index]].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self.texts.chunks:
            yield from chunk.to_pylist()


class Contents:
    """The entries and photos of a pack; thread-safe.

    Attributes:
        files: the folder from which the pack's files are read.
        manifest: the content of the manifest.

    Raises:
        PackError: the manifest is damaged, or a file is missing or does not have the size in the manifest.
    """

    def __init__(self, files: PackFolder, parsed: dict[str, Any], trusted: bool) -> None:
        self.files, self._trusted = files, trusted
        self.manifest = found = manifest.read(parsed)
        self._schemas = {
            "entries": columns.entry_schema([m.key for m in found.metrics]),
            "images": columns.IMAGES,
        }
        self._ends = {
            kind: np.cumsum([file.rows for file in self._shards(kind)]) for kind in self._schemas
        }
        self._recent = LRUCache(RECENT_ROWS)
        self._known_rows = LRUCache(KNOWN_ROWS)
        if files.path is not None:  # elsewhere, one request per file takes too long
            self._check_sizes()

    # ------------------------------------------------------------------ rows

    @cached_property
    def entry_ids(self) -> Ids:
        """The ids of the entries, in their order."""
        return self._ids("entries", "entry_id")

    @cached_property
    def image_ids(self) -> Ids:
        """The ids of the photos, in their order."""
        return self._ids("images", "image_id")

    @property
    def first_entry(self) -> str:
        """The id of the first entry, found without reading all ids."""
        found: str = self._row("entries", 0)["entry_id"]
        self.remember_rows({found: 0}, {})
        return found

    def remember_rows(self, entries: Mapping[str, int], images: Mapping[str, int]) -> None:
        """Remember the rows in which the given entries and photos are stored, by id.

        The pack then does not have to read and search all ids. A wrong row causes an error when the pack
        reads it.
        """
        for kind, rows in (("entries", entries), ("images", images)):
            for id, row in rows.items():
                self._known_rows.put((kind, id), row, 1)

    def _row_of(self, kind: str, id: str) -> int:
        """The row of an entry or an image; callers compare the id there."""
        if isinstance(id, str) and (known := self._known_rows.get((kind, id))) is not None:
            return int(known)
        try:
            return (self.entry_ids if kind == "entries" else self.image_ids).row(id)
        except KeyError:
            what = "map" if kind == "entries" else "image"
            raise PackError(f"The pack has no such {what}; choose one in its gallery") from None

    def entries_of(self, image_id: str) -> list[str]:
        """Return the ids of a photo's entries, in order; raise a PackError if there is no such photo."""
        shard, _ = self._place("images", self._row_of("images", image_id))
        table = self._recent.kept(
            ("ids", shard),
            lambda: self._read("entries", shard, ["entry_id", "image_id"]),
            lambda table: table.nbytes,
        )
        rows = [_equal(chunk, image_id) for chunk in table["image_id"].chunks]
        return table["entry_id"].filter(pa.chunked_array(rows, pa.bool_())).to_pylist()  # type: ignore[no-any-return]

    def entry(self, entry_id: str) -> Entry:
        """Return the data of a map; raise a PackError if there is none with this id."""
        i = self._row_of("entries", entry_id)
        row = self._row("entries", i)
        if row["entry_id"] != entry_id:
            raise damaged_manifest("it has changed since it was opened")
        return Entry(
            row=i,
            id=entry_id,
            image_id=row["image_id"],
            file_name=self._shown(row["file_name"]),
            method=row["method"],
            target=row["target"],
            target_name=self._shown(row["target_name"]),
            probability=row["probability"],
            is_mask=row["is_mask"],
            sanity=row["sanity"],
            protocol=_json(row["protocol"], dict),
            view=_view(_json(row["view"], dict)),
            metrics={
                m.key: v for m in self.manifest.metrics if (v := row[columns.METRIC + m.key]) == v
            },
            curves=manifest.curves_of(_json(row["curves"], dict)),
            shape=(row["height"], row["width"]),
            place=row["place"],
            sha256=row["sha256"].hex(),
        )

    def facts_of(self, image_id: str) -> PhotoFacts:
        """Return the data of a photo; raise a PackError if there is none with this id."""
        return self._recent.kept(  # type: ignore[no-any-return]
            ("facts", image_id),
            lambda: self._facts_of(image_id),
            lambda found: 2000 if found.answer is None else found.answer.size,
        )

    def _facts_of(self, image_id: str) -> PhotoFacts:
        i = self._row_of("images", image_id)
        row = self._row("images", i)
        if row["image_id"] != image_id:
            raise damaged_manifest("it has changed since it was opened")
        name = row["label_name"]
        return PhotoFacts(
            row=i,
            image_id=image_id,
            top=tuple(map(self._top, _json(row["top"], list))),
            label=row["label"],
            label_name=None if name is None else self._shown(name),
            answer=self._answer(row["answer"]),
            thumbnail=(row["thumbnail_place"], row["thumbnail_bytes"]),
            thumbnail_sha256=_hex(row["thumbnail_sha256"]),
        )

    def _answer(self, text: str | None) -> AnswerFacts | None:
        if text is None:
            return None
        try:
            return AnswerFacts.from_json(_json(text, dict), self._shown)
        except ValueError as error:
            raise damaged_manifest(short_reason(error)) from None

    def _top(self, item: Any) -> tuple[int, str, float]:
        kinds = [type(v) for v in item] if type(item) is list else []
        if kinds not in ([int, str, float], [int, str, int]):
            raise damaged_manifest(
                "an image's top classes are not of the form [class, name, probability]"
            )
        number, name, p = item
        if not (0 <= number < 1 << 31 and 0 <= p <= 1):
            raise damaged_manifest("an image's top class is not a class")
        return number, self._shown(encodable(name)), float(p)

    def rows(self, kind: str, names: Sequence[str]) -> Iterator[pa.Table]:
        """Yield columns of all "entries" or "images" as Arrow tables, which are checked shard by shard;
        texts are dictionaries. The columns are listed in :mod:`xattn.packs.columns`."""
        for shard in range(len(self.manifest.shards)):
            yield self._read(kind, shard, names)

    # ------------------------------------------------------------------ maps, pictures, features

    def map(self, entry: Entry) -> NDArray[np.float32]:
        """Read the map (h, w) of an entry and check its hash; raise a ValueError or OSError if it is
        damaged."""
        file = self.maps_file(entry)
        data = self._bytes(file, entry.place, 4 * entry.shape[0] * entry.shape[1])
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(f"the bytes of {entry.id} are not those that were written")
        return np.frombuffer(data, "<f4").reshape(entry.shape).astype(np.float32)

    def maps_file(self, entry: Entry) -> ShardFile:
        """Return the file that contains the map of an entry."""
        return self._shards("maps")[self._place("entries", entry.row)[0]]

    def thumbnail(self, photo: PhotoFacts) -> bytes | None:
        """Read the JPEG bytes of a photo without checking their hash; return None if the pack has none."""
        if photo.thumbnail_sha256 is None:
            return None
        place, size = photo.thumbnail
        file = self.manifest.shards[self._place("images", photo.row)[0]].thumbnails
        if file is None or not 0 < size <= MAX_THUMBNAIL:
            raise damaged_manifest(f"the picture of {photo.image_id[:60]} is not there")
        with _damage(file.name):
            return self._bytes(file, place, size)

    def stored_photo(self, image_id: str) -> StoredPhoto | None:
        """Return the thumbnail as the source of an explanation, or None if the pack has none."""
        photo = self.facts_of(image_id)
        return None if photo.thumbnail_sha256 is None else StoredPhoto(_Thumbnails(self), photo.row)

    def _bytes(self, file: ShardFile, place: int, size: int) -> bytes:
        """A part of a file, which has its own hash check."""
        if place + size > file.size:
            raise ValueError("it is truncated")
        data = self.files.part(file.name, place, place + size)
        if len(data) != size:
            raise ValueError("it is truncated")
        return data

    def features(self) -> NDArray[np.float16] | None:
        """Read the features that the classifier received for each of the M photos, (M, d) in the order of
        :attr:`image_ids`; return None if the pack has none. Their hash is checked."""
        parts = []
        for shard in self.manifest.shards:
            if (file := shard.features) is None:
                return None
            with _damage(file.name):
                found = load(self._whole(file, MAX_FEATURES)).get("features")
                if found is None or found.ndim != 2 or len(found) != file.rows:
                    raise ValueError("it has no features for its photos")
                if found.dtype != np.float16 or not np.isfinite(found).all():
                    raise ValueError("its features are not finite, or of another type")
            parts.append(found)
        with _damage(MANIFEST):
            return np.concatenate(parts)

    # ------------------------------------------------------------------ files

    def _shards(self, kind: str) -> list[ShardFile]:
        return [getattr(shard, kind) for shard in self.manifest.shards]

    def _ids(self, kind: str, column: str) -> Ids:
        with _damage(self._shards(kind)[0].name):
            return Ids(columns.join(self.rows(kind, [column]), column, MAX_IDS))

    def _place(self, kind: str, i: int) -> tuple[int, int]:
        """The shard of row ``i`` of all, and its row there."""
        ends = self._ends[kind]
        shard = int(np.searchsorted(ends, i, "right"))
        return shard, i - (int(ends[shard - 1]) if shard else 0)

    def _row(self, kind: str, i: int) -> dict[str, Any]:
        """All columns of a row; the rows around it are decoded with it and cached."""
        shard, row = self._place(kind, i)
        ends = np.cumsum(self._open(kind, shard).group_rows)
        group = int(np.searchsorted(ends, row, "right"))
        table = self._recent.kept(
            (kind, shard, group),
            lambda: self._read(kind, shard, self._schemas[kind].names, [group]),
            lambda table: table.nbytes,
        )
        return table.slice(row - int(ends[group]) + len(table), 1).to_pylist()[0]  # type: ignore[no-any-return]

    def _read(
        self, kind: str, shard: int, names: Sequence[str], groups: Sequence[int] | None = None
    ) -> pa.Table:
        with _damage(self._shards(kind)[shard].name):
            return self._open(kind, shard).read(names, groups)

    def _open(self, kind: str, shard: int) -> BoundedParquet:
        """A Parquet file; its hash is compared when it is read for the first time."""
        file = self._shards(kind)[shard]
        found: BoundedParquet | None = self._recent.get(file.name)
        if found is None:
            with _damage(file.name):
                data = self._whole(file, MAX_FILE)
                found = BoundedParquet(data, self._schemas[kind], file.rows)
            self._recent.put(file.name, found, len(data))
        return found

    def _whole(self, file: ShardFile, most: int) -> bytes:
        data = self.files.read(file.name, most)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise ValueError("it is not the file that was written")
        return data

    def _check_sizes(self) -> None:
        for file in (file for shard in self.manifest.shards for file in shard if file is not None):
            with _damage(file.name):
                if (size := self.files.size(file.name)) != file.size:
                    raise ValueError(f"it has {size:,} bytes, not {file.size:,}")

    def _shown(self, text: str) -> str:
        return text if self._trusted else visible(text)


class _Thumbnails(Photos):
    """The thumbnails of a pack as numbered photos, by image row."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents

    def __len__(self) -> int:
        return self._contents.manifest.images

    def name(self, index: int) -> str:
        return f"{self._contents.image_ids[index]}.jpg"

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        image_id = self._contents.image_ids[index]
        data = self._contents.thumbnail(self._contents.facts_of(image_id))
        if data is None:
            raise ValueError(f"image: the pack has no picture of {image_id}")
        return decode_image(io.BytesIO(data), self.name(index), max_pixels)

    def describe(self) -> dict[str, Any]:
        return {"count": len(self)}


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn errors in a file into a PackError that names it."""
    try:
        yield
    except PackError:
        raise
    except (ValueError, OSError, MemoryError, SafetensorError) as error:
        raise DamagedFile(name, short_reason(error)) from None


def _hex(sha256: bytes | None) -> str | None:
    return None if sha256 is None else sha256.hex()


def _json(text: str, kind: type) -> Any:
    """The list or table that a column stores as JSON."""
    try:
        found = strict_json.parse(text)
    except ValueError as error:
        raise damaged_manifest(f"a text of its rows is not JSON ({short_reason(error)})") from None
    if type(found) is not kind or (type(found) is list and len(found) > MAX_TOP):
        raise damaged_manifest("a text of its rows has the wrong type")
    return found


def _view(record: dict[str, Any]) -> View:
    try:
        view = View.from_json(record)
    except (ValueError, OverflowError):
        raise damaged_manifest("an entry's view is not a view") from None
    try:
        return view.check_size()
    except ValueError:
        raise damaged_manifest("an entry's view has more than a million pixels per side") from None


def _equal(texts: pa.DictionaryArray, value: str) -> pa.BooleanArray:
    """Which texts equal ``value``, without expanding the dictionary."""
    return pc.equal(texts.indices, pa.scalar(pc.index(texts.dictionary, value).as_py(), pa.int32()))
