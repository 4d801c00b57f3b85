"""The contents of a pack of format 2: the manifest at once, rows, maps and photos when asked for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from xattn.packs.contained_files import AGAIN, PackError, PackFolder, why
from xattn.packs.contents import MAX_THUMBNAIL, Contents, Entry, PhotoFacts, no_such
from xattn.packs.format import MANIFEST
from xattn.packs.manifest import MAX_CURVE, MAX_TOP, DamagedFile, skipped_of
from xattn.packs.sharded.checked_parquet import MAX_FILE, CheckedParquet
from xattn.packs.sharded.columns import CURVE_OF, IMAGES, METRIC, entry_schema
from xattn.packs.sharded.ids import Ids
from xattn.packs.sharded.manifest_shards import ShardFile, read_shards
from xattn.packs.sharded.shard_rows import check_rows, numbers
from xattn.packs.sharded.stored_thumbnails import StoredThumbnails
from xattn.photos.base import StoredPhoto
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import visible
from xattn.runtime.tensor_file import TensorFile

if TYPE_CHECKING:
    import pandas as pd

MAX_FEATURES = 1 << 30  # bytes of a shard's features
RECENT_ROWS = 48 << 20  # bytes of decoded rows that are kept
KNOWN_ROWS = 1 << 14  # ids whose rows are kept
_MAX_HEADER = 100_000_000  # bytes of a safetensors file's header


class ShardContents(Contents):
    """The contents of a pack of format 2.

    Raises:
        PackError: the manifest is damaged, or a file is missing or of another size.
    """

    def __init__(self, files: PackFolder, manifest: dict[str, Any], trusted: bool) -> None:
        self._files, self._trusted = files, trusted
        self._manifest = found = read_shards(manifest)
        self.skipped = skipped_of(manifest)
        self.xattn, self.metrics, self.shares = found.xattn, found.metrics, found.shares
        self.counts, self.video = (found.entries, found.images), None
        self.methods = tuple(found.methods)
        self.has_features = all(shard.features is not None for shard in found.shards)
        self._entry_schema = entry_schema([m.key for m in found.metrics], found.curves)
        self._entry_ends = np.cumsum([file.rows for file in self._shards("entries")])
        self._image_ends = np.cumsum([file.rows for file in self._shards("images")])
        self._recent = LRUCache(RECENT_ROWS)
        self._known_rows = LRUCache(KNOWN_ROWS)
        if files.path is not None:  # elsewhere a question a file takes too long
            self._check_sizes()

    # ------------------------------------------------------------------ rows

    @property
    def entry_ids(self) -> Sequence[str]:
        return self._entry_rows

    @property
    def image_ids(self) -> Collection[str]:
        return self._image_rows

    @property
    def first_entry(self) -> str:
        found: str = self._row("entries", 0, self._entry_ends)["entry_id"]
        self.know_rows({found: 0}, {})
        return found

    def know_rows(self, entries: Mapping[str, int], images: Mapping[str, int]) -> None:
        for kind, rows in (("map", entries), ("image", images)):
            for id, row in rows.items():
                self._known_rows.put((kind, id), row, 1)

    def _row_of(self, kind: str, id: str) -> int:
        """The row of a "map" or an "image"; callers compare the id there."""
        if isinstance(id, str) and (known := self._known_rows.get((kind, id))) is not None:
            return int(known)
        try:
            return (self._entry_rows if kind == "map" else self._image_rows).row(id)
        except KeyError:
            raise no_such(kind) from None

    def entries_of(self, image_id: str) -> list[str]:
        shard, _ = _place(self._row_of("image", image_id), self._image_ends)
        key = ("ids", shard)
        if (table := self._recent.get(key)) is None:
            table = self._read("entries", shard, ["entry_id", "image_id"])
            self._recent.put(key, table, table.nbytes)
        rows = [_equal(chunk, image_id) for chunk in table["image_id"].chunks]
        return table["entry_id"].filter(pa.chunked_array(rows, pa.bool_())).to_pylist()  # type: ignore[no-any-return]

    def entry(self, entry_id: str) -> Entry:
        i = self._row_of("map", entry_id)
        row = self._row("entries", i, self._entry_ends)
        if row["entry_id"] != entry_id:
            raise _damaged(MANIFEST, "it has changed since it was opened")
        curves = {
            name.removeprefix(CURVE_OF): values
            for name, values in row.items()
            if name.startswith(CURVE_OF) and values
        }
        if any(len(values) > MAX_CURVE for values in curves.values()):
            raise _damaged(MANIFEST, f"a curve has more than {MAX_CURVE:,} values")
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
            protocol=self._manifest.protocols[row["protocol"]],
            view=self._manifest.view(row["view"]),
            metrics={m.key: v for m in self.metrics if (v := row[METRIC + m.key]) == v},
            curves=curves,
            sha256=row["sha256"],
        )

    def photo(self, image_id: str) -> PhotoFacts:
        i = self._row_of("image", image_id)
        row = self._row("images", i, self._image_ends)
        if row["image_id"] != image_id or len(row["top"]) > MAX_TOP:
            raise _damaged(MANIFEST, "a photo is not what it was")
        top = [(c["class"], self._shown(c["name"]), c["probability"]) for c in row["top"]]
        if not all(c >= 0 and 0 <= p <= 1 for c, _, p in top):
            raise _damaged(MANIFEST, "an image's top class is no class")
        name = row["label_name"]
        return PhotoFacts(
            row=i,
            image_id=image_id,
            top=tuple(top),
            label=row["label"],
            label_name=None if name is None else self._shown(name),
            thumbnail_sha256=row["thumbnail_sha256"],
        )

    # ------------------------------------------------------------------ maps and thumbnails

    def map(self, entry: Entry) -> NDArray[np.float32]:
        shard, row = _place(entry.row, self._entry_ends)
        file = self._shards("maps")[shard]
        shapes, ends = self._map_places(shard)
        data = self._tensor(file, int(ends[-1]), int(ends[row]), int(ends[row + 1]))
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(f"the bytes of {entry.id} are not those that were written")
        return np.frombuffer(data, "<f4").reshape(shapes[row]).astype(np.float32)

    def maps_file(self, entry: Entry) -> str:
        return self._shards("maps")[_place(entry.row, self._entry_ends)[0]].name

    def thumbnail_hashes(self) -> list[str | None]:
        read, name = self._tables_of("images"), "thumbnail_sha256"
        return [sha256 for table in read([name]) for sha256 in table[name].to_pylist()]

    def has_thumbnail(self, photo: PhotoFacts) -> bool:
        return photo.thumbnail_sha256 is not None

    def thumbnail(self, photo: PhotoFacts) -> bytes | None:
        if photo.thumbnail_sha256 is None:
            return None
        shard, row = _place(photo.row, self._image_ends)
        file = self._manifest.shards[shard].thumbnails
        ends = self._thumbnail_places(shard)
        begin, end = int(ends[row]), int(ends[row + 1])
        if file is None or not 0 < end - begin <= MAX_THUMBNAIL:
            raise _damaged(MANIFEST, f"the picture of {photo.image_id[:60]} is not there")
        try:
            return self._tensor(file, int(ends[-1]), begin, end)
        except (ValueError, OSError) as error:
            if isinstance(error, PackError):
                raise
            raise _damaged(file.name, why(error)) from None

    def stored_photo(self, image_id: str) -> StoredPhoto | None:
        photo = self.photo(image_id)
        if photo.thumbnail_sha256 is None:
            return None
        return StoredPhoto(self._thumbnails, photo.row)

    @cached_property
    def _thumbnails(self) -> StoredThumbnails:
        return StoredThumbnails(self, self._image_rows)

    def _map_places(self, shard: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Shapes (N, 2) of a shard's maps, and the bytes (N + 1,) between which they lie."""
        key = ("maps", shard)
        if (found := self._recent.get(key)) is None:
            table = self._read("entries", shard, ["height", "width"])
            shapes = np.stack([numbers(table["height"]), numbers(table["width"])], 1)
            sizes = 4 * shapes[:, 0].astype(np.int64) * shapes[:, 1]
            found = shapes, np.concatenate([[0], np.cumsum(sizes)])
            self._recent.put(key, found, 16 * len(shapes))
        return found  # type: ignore[no-any-return]

    def _thumbnail_places(self, shard: int) -> NDArray[np.int64]:
        key = ("thumbnails", shard)
        if (found := self._recent.get(key)) is None:
            sizes = numbers(self._read("images", shard, ["thumbnail_bytes"])["thumbnail_bytes"])
            found = np.concatenate([[0], np.cumsum(np.minimum(sizes, MAX_THUMBNAIL + 1))])
            self._recent.put(key, found, found.nbytes)
        return found  # type: ignore[no-any-return]

    def _tensor(self, file: ShardFile, whole: int, begin: int, end: int) -> bytes:
        """Bytes of a tensor of a safetensors file; they are checked by their own hash."""
        with self._files.open(file.name) as stream:
            header = int.from_bytes(stream.read(8), "little")
            if header > _MAX_HEADER or 8 + header + whole != file.size:
                raise ValueError("its header does not add up")
            stream.seek(8 + header + begin)
            data = stream.read(end - begin)
        if len(data) != end - begin:
            raise ValueError("it is truncated")
        return data

    # ------------------------------------------------------------------ tables

    def features(self) -> NDArray[np.float16] | None:
        """The features of all photos; those of a shard are checked by the hash of their file."""
        parts = []
        for shard in self._manifest.shards:
            if (file := shard.features) is None:
                return None
            with self._damage(file.name):
                data = self._files.read(file.name, MAX_FEATURES)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise ValueError("it is not the file that was written")
                found = TensorFile(partial(io.BytesIO, data)).read("features").astype(np.float16)
                if found.ndim != 2 or len(found) != file.rows or not np.isfinite(found).all():
                    raise ValueError(f"its features have the shape {found.shape}")
            parts.append(found)
        with self._damage(MANIFEST):
            return np.concatenate(parts)

    def entry_table(self) -> pd.DataFrame:
        return _tables().entry_table(self._tables_of("entries"), self._entry_rows, self._manifest)

    def image_table(self) -> pd.DataFrame:
        return _tables().image_table(self._tables_of("images"), self._image_rows)

    def _tables_of(self, kind: str) -> Any:
        """A function from columns to an iterator of these, shard by shard."""

        def read(columns: Sequence[str]) -> Iterator[pa.Table]:
            for shard in range(len(self._manifest.shards)):
                yield self._read(kind, shard, columns)

        return read

    def parquet(self) -> tuple[list[Path], list[Path]] | None:
        if self._files.path is None:
            return None
        paths = []
        for kind in ("entries", "images"):
            for shard, file in enumerate(self._shards(kind)):
                with self._damage(file.name):
                    self._open(kind, shard).check()
            paths.append([(self._files.path / file.name).resolve() for file in self._shards(kind)])
        return paths[0], paths[1]

    # ------------------------------------------------------------------ reading

    def _shards(self, kind: str) -> list[ShardFile]:
        return [getattr(shard, kind) for shard in self._manifest.shards]

    @cached_property
    def _entry_rows(self) -> Ids:
        return self._ids("entries", "entry_id")

    @cached_property
    def _image_rows(self) -> Ids:
        return self._ids("images", "image_id")

    def _ids(self, kind: str, column: str) -> Ids:
        found = [table[column] for table in self._tables_of(kind)([column])]
        with self._damage(self._shards(kind)[0].name):
            return Ids(found)

    def _row(self, kind: str, i: int, ends: NDArray[np.int64]) -> dict[str, Any]:
        """All columns of a row; the rows around it are decoded with it and kept."""
        shard, row = _place(i, ends)
        file = self._open(kind, shard)
        group = int(np.searchsorted(np.cumsum(file.group_rows), row, "right"))
        key = (kind, shard, group)
        table = self._recent.get(key)
        if table is None:
            table = self._read(kind, shard, self._schema(kind).names, [group])
            self._recent.put(key, table, table.nbytes)
        return table.slice(row - sum(file.group_rows[:group]), 1).to_pylist()[0]  # type: ignore[no-any-return]

    def _read(
        self, kind: str, shard: int, columns: Sequence[str], groups: Sequence[int] | None = None
    ) -> pa.Table:
        with self._damage(self._shards(kind)[shard].name):
            table = self._open(kind, shard).read(columns, groups)
            check_rows(table, self._manifest)
        return table

    def _open(self, kind: str, shard: int) -> CheckedParquet:
        """A Parquet file; its hash is compared when it is read for the first time."""
        file = self._shards(kind)[shard]
        key = ("file", file.name)
        found: CheckedParquet | None = self._recent.get(key)
        if found is None:
            with self._damage(file.name):
                data = self._files.read(file.name, MAX_FILE)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise ValueError("it is not the file that was written")
                unique = "entry_id" if kind == "entries" else "image_id"
                found = CheckedParquet(data, self._schema(kind), file.rows, unique)
            self._recent.put(key, found, len(data))
        return found

    def _schema(self, kind: str) -> pa.Schema:
        return self._entry_schema if kind == "entries" else IMAGES

    def _check_sizes(self) -> None:
        for shard in self._manifest.shards:
            for file in shard:
                if file is None:
                    continue
                with self._damage(file.name):
                    size = self._files.size(file.name)
                if size != file.size:
                    raise _damaged(file.name, f"it has {size:,} bytes, not {file.size:,}")

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Turn what is wrong with a file into a PackError that names it."""
        try:
            yield
        except PackError:
            raise
        except (ValueError, OSError, MemoryError) as error:
            raise _damaged(name, why(error)) from None

    def _shown(self, text: str) -> str:
        return text if self._trusted else visible(text)


def _damaged(file: str, reason: str) -> DamagedFile:
    message = f"The file {file} of this pack is damaged: {reason}; copy the pack again, or {AGAIN}"
    return DamagedFile(file, reason, message)


def _place(i: int, ends: NDArray[np.int64]) -> tuple[int, int]:
    """The shard of row ``i`` of all, and its row there."""
    shard = int(np.searchsorted(ends, i, "right"))
    return shard, i - (int(ends[shard - 1]) if shard else 0)


def _equal(texts: pa.DictionaryArray, value: str) -> pa.BooleanArray:
    """Which texts equal ``value``; they are not written out."""
    return pc.equal(texts.indices, pa.scalar(pc.index(texts.dictionary, value).as_py(), pa.int32()))


def _tables() -> ModuleType:
    try:
        from xattn.packs.sharded import shard_tables
    except ModuleNotFoundError:
        raise ValueError(
            'pack: its tables need pandas, which is not installed; run: pip install "xattn[tables]"'
        ) from None
    return shard_tables
