"""Writing a pack of format 2, photo by photo, by one process or by many.

A shard has the photos of one block. Whatever process writes a block, its files are the same: numbers of
protocols and views, and the columns of metrics, are settled once all blocks are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from xattn.packs.explanation import Explanation
from xattn.packs.format import (
    MANIFEST,
    OVERLAY_SIDE,
    SHARD_PHOTOS,
    check_output,
    interrupted_output,
    is_pack,
    owned_files,
)
from xattn.packs.photo_summary import disagreement_of, features_of, thumbnail_jpeg
from xattn.packs.sharded.checked_parquet import CheckedParquet
from xattn.packs.sharded.columns import (
    CURVE_OF,
    IMAGES,
    METRIC,
    entry_schema,
    shard_file,
)
from xattn.packs.sharded.ids import Ids
from xattn.packs.sharded.manifest_shards import ShardFile, manifest_bytes
from xattn.packs.sharded.tensor_draft import TensorDraft
from xattn.packs.sharded.written_rows import completed, entry_row, image_row, write_parquet
from xattn.runtime.files import atomic_folder

_BATCH = 512  # rows that are in memory
Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    """What :func:`xattn.runtime.distributed.gather` gives to a single process."""
    return [value]


@contextmanager
def shard_writer(
    folder: str | Path,
    photos: int = SHARD_PHOTOS,
    gather: Gather = alone,
    rank: int = 0,
    keep: bool = False,
) -> Iterator[ShardWriter]:
    """A writer of the pack ``folder``, which appears, or replaces an earlier pack, when the block ends.

    Args:
        photos: how many photos a shard holds.
        gather, rank: of several processes that write one pack, see
            :func:`xattn.runtime.distributed.gather`; each writes blocks of its own
            (:meth:`ShardWriter.block`), and all of them leave the ``with`` block together.
        keep: after Ctrl-C or an error, make what was added a pack: in ``folder``, or in
            ``<folder>-interrupted`` beside an earlier one. For a single process.

    Raises:
        ValueError: a folder that is not a pack, or nothing was added.
        OSError: it cannot be written, or the disk is full; earlier results are intact.
    """
    folder = check_output(folder)
    with ExitStack() as stack:
        temporary: Path | None = None
        if rank == 0:
            owned = owned_files(folder)
            temporary = stack.enter_context(atomic_folder(folder, owned, is_pack))
        writer = ShardWriter(gather(temporary)[0], photos, gather, rank)
        stack.callback(writer.abandon)
        try:
            yield writer
            writer.close()
        except BaseException as error:
            if keep:
                _rescue(writer, folder, error)
            raise
    gather(None)  # until the pack is in its place


def _rescue(writer: ShardWriter, folder: Path, error: BaseException) -> None:
    """Make a pack of what was added before an error, and say where it is."""
    reason = f"stopped by {type(error).__name__}"
    first = interrupted_output(folder)
    names = chain([first], (first.with_name(f"{first.name}-{number}") for number in count(2)))
    place = next(name for name in names if not (name / MANIFEST).exists())
    try:
        if not writer.finish_early(reason):
            return
        os.replace(writer.folder, place)
        saved = f"{place} holds what was explained"
    except (OSError, ValueError) as second:  # the first error is the one to raise
        saved = f"what was explained could not be saved ({second})"
    warnings.warn(f"explain: {reason}; {saved}", RuntimeWarning, stacklevel=4)


@dataclass
class _Block:
    """A shard in the making; ``protocols`` and ``views`` number what its rows have, as JSON."""

    number: int
    maps: TensorDraft
    thumbnails: TensorDraft
    rows: Path
    sink: Any
    protocols: dict[str, int] = field(default_factory=dict)
    views: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, None] = field(default_factory=dict)
    curves: dict[str, None] = field(default_factory=dict)
    methods: dict[str, None] = field(default_factory=dict)
    longest: int = 0
    count: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: list[NDArray[np.float16]] = field(default_factory=list)


@dataclass(frozen=True)
class _Written:
    """A block whose photos are all there; the rows of its maps wait for their last columns."""

    number: int
    rows: Path
    files: dict[str, ShardFile]
    names: dict[str, list[str]]
    longest: int


class ShardWriter:
    """See :func:`shard_writer`.

    Attributes:
        skipped: (file name, reason) of images that could not be read, of this process.
        metrics: by column key, {"higher_is_better", "formula", "protocol_id"} of the metrics that
            explanations carry.
        shares: by name of a curve, the shares of pixels that its values stand for, where they are not
            at equal steps over [0, 1].
    """

    def __init__(self, folder: Path, photos: int, gather: Gather, rank: int) -> None:
        self.folder, self.photos = folder, photos
        self.skipped: list[tuple[str, str]] = []
        self.metrics: Mapping[str, Mapping[str, Any]] = {}
        self.shares: Mapping[str, Sequence[float]] = {}
        self._gather, self._rank = gather, rank
        self._skipped: list[tuple[int, tuple[str, str]]] = []  # with the number of their block
        self._features_length: int | None = None
        self._closed = False
        self._block: _Block | None = None
        self._written: list[_Written] = []

    def block(self, number: int) -> None:
        """Let the photos that are added from now on be those of shard ``number``; without a call, shards
        are filled one after the other."""
        self._end_block()
        name = shard_file("entries", number)
        rows = self.folder / f"{name}.draft"
        maps, thumbnails = (
            TensorDraft(self.folder / shard_file(kind, number)) for kind in ("maps", "thumbnails")
        )
        self._block = _Block(number, maps, thumbnails, rows, rows.open("wb"))

    def add(self, group: Sequence[Explanation], thumbnail: bytes | None = None) -> None:
        """All explanations of one photo; ``thumbnail`` is its JPEG file where that is known already.

        Raises:
            ValueError: a photo or an explanation that was added before, a view that is too large, a
                text that is too long, or features of another length than before.
        """
        block = self._current()
        photo = group[0]
        if photo.image_id in block.images:
            raise ValueError(
                f"explanations: {photo.image_id!r} was added before; add all of a photo at once"
            )
        if thumbnail is None and photo.source is not None:
            thumbnail = thumbnail_jpeg(photo.photo(OVERLAY_SIDE))
        block.images[photo.image_id] = row = image_row(group, disagreement_of(group), thumbnail)
        if thumbnail is not None:
            block.thumbnails.add(row["image_id"], thumbnail, "U8", [len(thumbnail)])
        features = features_of(group, self._features_length)
        if features is not None:
            self._features_length = len(features)
            block.features.append(features)
        if len({e.id for e in group}) != len(group):
            raise ValueError(f"explanations: an explanation of {photo.image_id!r} comes twice")
        for e in group:
            self._add_entry(block, e)
        if len(block.entries) >= _BATCH:
            _flush(block)

    def close(self) -> None:
        """Finish the shards of this process; the first process writes the manifest."""
        self._closed = True
        self._end_block()
        every = [block for blocks in self._gather(self._written) for block in blocks]
        every.sort(key=lambda block: block.number)
        noted = [item for found in self._gather(self._skipped) for item in found]
        skipped = [item for _, item in sorted(noted, key=lambda item: item[0])]
        if not every:
            raise ValueError("explanations: got none; a pack needs at least one")
        names = {
            key: list(dict.fromkeys(name for block in every for name in block.names[key]))
            for key in every[0].names
        }
        names["metrics"] = list(dict.fromkeys([*self.metrics, *names["metrics"]]))
        keep_features = all("features" in block.files for block in every)
        own = {block.number: self._finish(block, names) for block in self._written}
        if not keep_features:
            for files in own.values():
                if (file := files.pop("features", None)) is not None:
                    (self.folder / file.name).unlink()
        shards = {k: v for found in self._gather(own) for k, v in found.items()}
        if self._rank == 0:
            self._write_manifest(names, [shards[number] for number in sorted(shards)], skipped)

    def finish_early(self, reason: str) -> bool:
        """:meth:`close` after an error, with the ``reason`` among what was skipped; whether there was
        anything to write. A photo that was not written whole is left out with its block."""
        block = self._block
        if block is not None and block.count != block.maps.count:
            self.abandon()
            self._block = None
        if self._closed or not (self._written or (self._block and self._block.images)):
            return False
        self.skipped.append(("", reason))
        self.close()
        return True

    def abandon(self) -> None:
        """Close what is open."""
        if self._block is not None:
            self._block.maps.abandon()
            self._block.thumbnails.abandon()
            self._block.sink.close()

    # ------------------------------------------------------------------ blocks

    def _current(self) -> _Block:
        if self._block is None:
            self.block(0)
        elif len(self._block.images) >= self.photos:
            self.block(self._block.number + 1)
        assert self._block is not None
        return self._block

    def _add_entry(self, block: _Block, e: Explanation) -> None:
        e.view.check_size()
        data = np.ascontiguousarray(e.map, dtype="<f4").tobytes()
        protocol = json.dumps(e.protocol, ensure_ascii=True, allow_nan=False)
        view = json.dumps(e.view.to_json())
        row = entry_row(
            e,
            hashlib.sha256(data).hexdigest(),
            block.protocols.setdefault(protocol, len(block.protocols)),
            block.views.setdefault(view, len(block.views)),
        )
        block.maps.add(row["entry_id"], data, "F32", list(e.map.shape))
        block.metrics |= dict.fromkeys(e.metrics)
        block.curves |= dict.fromkeys(e.curves)
        block.methods[row["method"]] = None
        block.longest = max(block.longest, *map(len, e.curves.values()), 0)
        block.entries.append(row)
        block.count += 1

    def _end_block(self) -> None:
        """Write all of a block that depends on no other one; a block without photos leaves nothing."""
        block, self._block = self._block, None
        number = -1 if block is None else block.number
        self._skipped += [(number, item) for item in self.skipped[len(self._skipped) :]]
        if block is None:
            return
        _flush(block)
        block.sink.close()
        files = {"maps": block.maps.close(), "thumbnails": block.thumbnails.close()}
        for kind, file in list(files.items()):
            if not file.rows:
                (self.folder / file.name).unlink()
                del files[kind]
        if not block.images:
            block.rows.unlink()
            return
        if len(block.features) == len(block.images):
            files["features"] = self._write_features(block)
        images = pa.Table.from_pylist(list(block.images.values()), IMAGES)
        path = self.folder / shard_file("images", block.number)
        files["images"] = write_parquet(path, IMAGES, [images], "image_id")
        kinds = ("protocols", "views", "metrics", "curves", "methods")
        names = {key: list(getattr(block, key)) for key in kinds}
        self._written.append(_Written(block.number, block.rows, files, names, block.longest))

    def _write_features(self, block: _Block) -> ShardFile:
        """The features of a block whose photos all have some."""
        values = np.stack(block.features)
        draft = TensorDraft(self.folder / shard_file("features", block.number))
        draft.add("features", values.astype("<f2").tobytes(), "F16", list(values.shape))
        return draft.close()._replace(rows=len(values))

    # ------------------------------------------------------------------ all blocks

    def _finish(self, block: _Written, names: Mapping[str, list[str]]) -> dict[str, ShardFile]:
        """The files of a block, its rows with the numbers and columns of the whole pack."""
        schema = entry_schema(names["metrics"], names["curves"])
        numbers = {}
        for column, key in (("protocol", "protocols"), ("view", "views")):
            places = {name: i for i, name in enumerate(names[key])}
            numbers[column] = np.array([places[name] for name in block.names[key]], np.int32)

        def tables() -> Iterator[pa.Table]:
            for table in _drafted(block.rows):
                for column, of in numbers.items():
                    values = pa.array(of[table[column].to_numpy()], pa.int32())
                    table = table.set_column(table.column_names.index(column), column, values)
                yield completed(table, schema)

        path = self.folder / shard_file("entries", block.number)
        entries = write_parquet(path, schema, tables(), "entry_id", block.longest)
        block.rows.unlink()
        return {"entries": entries, **block.files}

    def _write_manifest(
        self,
        names: Mapping[str, list[str]],
        shards: Sequence[Mapping[str, ShardFile]],
        skipped: Sequence[tuple[str, str]],
    ) -> None:
        _check_photos(self.folder, [files["images"] for files in shards])
        data = manifest_bytes(names, shards, self.metrics, self.shares, skipped)
        (self.folder / MANIFEST).write_bytes(data)


def _check_photos(folder: Path, files: Iterable[ShardFile]) -> None:
    """Raise a ``ValueError`` if two shards have one photo."""
    columns = []
    for file in files:
        found = CheckedParquet((folder / file.name).read_bytes(), IMAGES, file.rows, "image_id")
        columns.append(found.read(["image_id"])["image_id"])
    try:
        Ids(columns)
    except ValueError as error:
        raise ValueError(f"explanations: {error}; give every photo its own image_id") from None


def _flush(block: _Block) -> None:
    """Write the rows in memory to the draft of the block: a stream of Arrow's with its own schema."""
    if not block.entries:
        return
    measured = [k.removeprefix(METRIC) for k in _keys(block.entries, METRIC)]
    curves = [k.removeprefix(CURVE_OF) for k in _keys(block.entries, CURVE_OF)]
    schema = entry_schema(measured, curves)
    fill: dict[str, Any] = {f.name: [] if pa.types.is_list(f.type) else np.nan for f in schema}
    table = pa.Table.from_pylist([fill | row for row in block.entries], schema)
    with pa.ipc.new_stream(block.sink, schema) as stream:
        stream.write_table(table)
    block.entries.clear()


def _keys(rows: Iterable[Mapping[str, Any]], prefix: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))


def _drafted(path: Path) -> Iterator[pa.Table]:
    """What :func:`_flush` wrote, table by table."""
    with path.open("rb") as source:
        while source.peek(1):
            yield pa.ipc.open_stream(source).read_all()
