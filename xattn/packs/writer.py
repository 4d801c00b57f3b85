"""Write packs photo by photo, in one or several processes, so that memory use does not grow with the
number of maps.

The photos of a shard are held in memory until it is full, and then its files are written; the manifest is
written last. A pack appears only when it is complete; it contains the SHA-256 of every map and thumbnail.
Equal explanations give equal bytes, whichever process writes a block.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from xattn.correlation import disagreement
from xattn.packs import manifest
from xattn.packs.columns import IMAGES, entry_row, entry_schema, image_row, text, write_rows
from xattn.packs.explanation import Explanation
from xattn.packs.format import (
    FORMAT,
    MANIFEST,
    OVERLAY_SIDE,
    OVERLAYS,
    SHARD_BYTES,
    SHARD_PHOTOS,
    THUMBNAIL_SIDE,
    VIDEO,
    interrupted_output,
    is_pack,
    is_pack_file,
    shard_file,
)
from xattn.packs.manifest import Shard, ShardFile
from xattn.photos.image_names import file_stem
from xattn.pictures.overlay import overlay
from xattn.runtime.files import atomic_folder, check_output, file_sha256, follow_link, printable
from xattn.runtime.stores import is_remote, resolve_place

PARTS = 100  # shard numbers reserved for a block
Gather = Callable[[Any], list[Any]]


def gather_single(value: Any) -> list[Any]:
    """Gather the value of a single process, which is a list of that one value."""
    return [value]


@contextmanager
def pack_writer(
    folder: str | Path,
    overlays: bool = False,
    photos: int = SHARD_PHOTOS,
    gather: Gather = gather_single,
    rank: int = 0,
    keep: bool = False,
) -> Iterator[PackWriter]:
    """Context manager that yields a writer of the pack ``folder``. The pack appears, or replaces an earlier
    one, when the context ends.

    Args:
        overlays: also write pictures into ``overlays/``, which show the map in colour over the photo.
        photos: largest number of photos in a shard.
        gather, rank: for several processes that write one pack, see
            :func:`xattn.runtime.distributed.gather`; each writes its own blocks
            (:meth:`PackWriter.block`), and all of them leave the ``with`` block together.
        keep: after Ctrl-C or an error, save what was added as a pack, in ``folder`` or, if ``folder``
            already contains a pack, in ``<folder>-interrupted`` beside it. This works only in a single
            process.

    Raises:
        ValueError: the folder exists and is not a pack, or nothing was added.
        OSError: it cannot be written, or the disk is full; earlier results are intact.
    """
    check_local(folder)
    folder = follow_link(folder)
    with ExitStack() as stack:
        temporary: Path | None = None
        if rank == 0:
            names = os.listdir(folder) if folder.is_dir() else []
            owned = [name for name in names if is_pack_file(name)]
            temporary = stack.enter_context(atomic_folder(folder, owned, is_pack))
        writer = PackWriter(gather(temporary)[0], overlays, photos, gather, rank)
        try:
            yield writer
            writer.close()
        except BaseException as error:
            if keep:
                _rescue(writer, folder, error)
            raise
    gather(None)  # until the pack is in its place


def check_local(folder: str | Path) -> None:
    """Raise an error if the place is not a folder, or is in an object store, where packs cannot be written
    directly."""
    check_output(folder)
    if is_remote(folder, "output"):
        raise ValueError(
            f"output: got {resolve_place(folder)}; write the pack to a local folder, then copy it there, "
            f"or use xattn explain --output"
        )


def save_pack(
    folder: str | Path,
    explanations: Iterable[Explanation],
    overlays: bool = True,
    skipped: Sequence[tuple[str, str]] = (),
    video: Path | None = None,
    metrics: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a pack; an earlier pack in ``folder`` is replaced only once the new one is complete.

    Args:
        explanations: all explanations; in the pack, those of one photo are grouped together.
        overlays: also write pictures into ``overlays/``, which show the map in colour over the photo.
        skipped: (file name, reason) of images that could not be read, for the manifest.
        video: a film of overlays, moved into the pack.
        metrics: descriptions of the explanations' metrics, by column: ``{"higher_is_better": bool,
            "formula": str, "protocol_id": str}``, and ``"title"`` and ``"about"``, which are texts for
            readers.

    Raises:
        ValueError: there are no explanations, or two with the same id, or the folder is not a pack.
        OSError: the folder cannot be written or the disk is full; earlier results are intact.

    Example:
        >>> import numpy as np, tempfile, xattn
        >>> from xattn import save_pack
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> photo = np.zeros((64, 64, 3), np.uint8)
        >>> explanations = xattn.explain(photo, net, explainer="gradcam")
        >>> folder = save_pack(f"{tempfile.mkdtemp()}/pack", explanations)
        >>> len(xattn.load_pack(folder))
        1
    """
    groups: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault(explanation.image_id, []).append(explanation)
    with pack_writer(folder, overlays) as writer:
        carried = [key for group in groups.values() for e in group for key in e.metrics]
        undescribed = {
            key: {"higher_is_better": True} for key in carried if key not in (metrics or {})
        }
        writer.metrics = {**(metrics or {}), **undescribed}
        writer.skipped = list(skipped)
        for group in groups.values():
            writer.add(group)
        if video is not None:
            writer.add_video(video)
    return Path(folder)


def _rescue(writer: PackWriter, folder: Path, error: BaseException) -> None:
    """Save what was added before an error as a pack, and return a message with its place."""
    reason = f"stopped after {writer.last} by {type(error).__name__}"
    place = interrupted_output(folder)
    try:
        if not writer.finish_early(reason):
            return
        os.replace(writer.folder, place)
        saved = f"{place} contains what was explained so far"
    except (OSError, ValueError) as second:  # the first error is the one to raise
        saved = f"what was explained so far could not be saved ({second})"
    warnings.warn(f"explain: {reason}; {saved}", RuntimeWarning, stacklevel=4)


class _Photo(NamedTuple):
    """What was added for a photo; its rows lack their positions in the shard's files."""

    image: dict[str, Any]
    entries: list[dict[str, Any]]
    titles: dict[str, str]
    maps: list[NDArray[np.float32]]
    thumbnail: bytes | None
    features: NDArray[np.float16] | None


@dataclass
class _Shard:
    """A shard that is being built."""

    number: int
    photos: list[_Photo] = field(default_factory=list)
    size: int = 0


class PackWriter:
    """See :func:`pack_writer`.

    Attributes:
        skipped: (file name, reason) of images that could not be read, in this process.
        metrics: by column key, a description, as in :func:`save_pack`, of each metric that explanations
            contain; descriptions must be set before the first explanation is added.
        shares: by curve name, the shares of pixels that its values belong to, if they are not
            at equal steps over [0, 1].
        last: the id of the photo that was added last.
        is_first: whether this is the first of the processes that write the pack.
    """

    last = ""

    def __init__(
        self, folder: Path, overlays: bool, photos: int, gather: Gather, rank: int
    ) -> None:
        self.folder, self.overlays, self.photos = folder, overlays, photos
        self.skipped: list[tuple[str, str]] = []
        self.metrics: Mapping[str, Mapping[str, Any]] = {}
        self.shares: Mapping[str, Sequence[float]] = {}
        self._gather, self.is_first = gather, rank == 0
        self._skipped: list[tuple[int, tuple[str, str]]] = []  # with the number of their block
        self._ids: set[str] = set()
        self._stems: set[str] = set()
        self._video: str | None = None
        self._features_length: int | None = None
        self._closed = False
        self._shard = _Shard(0)
        self._written: dict[int, tuple[Shard, dict[str, str]]] = {}  # with the methods' titles

    def block(self, number: int) -> None:
        """Assign the photos that are added from now on to block ``number``, which is one shard or, with
        large maps, several; without a call, all belong to one block."""
        self._end_shard(number * PARTS)

    def add(
        self,
        group: Sequence[Explanation],
        thumbnail: bytes | None = None,
        picture: Image.Image | None = None,
    ) -> None:
        """Add all explanations of one photo.

        Args:
            thumbnail: the JPEG file of the photo's thumbnail, if it is already available.
            picture: the photo's pixels, at most ``OVERLAY_SIDE`` per side; by default they are read from
                the explanation's source.

        Raises:
            ValueError: the photo or an explanation was added before, a view is too large, a text is too
                long, or features have a different length than before.
        """
        photo, image_id = group[0], printable(group[0].image_id)
        if image_id in self._ids:
            raise ValueError(
                f"explanations: {photo.image_id!r} was added before; add all explanations of a "
                "photo at once"
            )
        names = [e.id for e in group]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"explanations: {min(twice)!r} occurs twice; give every photo its own image_id"
            )
        if thumbnail is None and picture is None and photo.source is not None:
            picture = photo.photo(OVERLAY_SIDE)
        if picture is not None:
            for e in group if self.overlays else ():
                self._draw(e, picture)
            thumbnail = thumbnail_jpeg(picture) if thumbnail is None else thumbnail
        if len(self._shard.photos) >= self.photos or self._shard.size >= SHARD_BYTES:
            self._end_shard(self._shard.number + 1)
        added = self._photo(group, thumbnail)
        if added.features is not None:
            self._features_length = len(added.features)
        self._ids.add(image_id)
        self.last = image_id
        self._shard.size += len(thumbnail or b"") + 500
        self._shard.size += sum(v.nbytes for v in added.maps)
        self._shard.size += sum(500 + len(row["curves"]) for row in added.entries)
        self._shard.photos.append(added)  # whole, whenever Ctrl-C is pressed

    def add_video(self, film: Path) -> None:
        """Move a film of overlays into the pack."""
        shutil.move(film, self.folder / VIDEO)
        self._video = file_sha256(self.folder / VIDEO)

    def close(self) -> None:
        """Finish the shards of this process; the first process also writes the manifest."""
        self._closed = True
        if self._gather is not gather_single:
            ids = Counter(id for found in self._gather(self._ids) for id in found)
            if twice := [id for id, count in ids.items() if count > 1]:
                raise ValueError(
                    f"explanations: {min(twice)} occurs twice; give every photo its own image_id"
                )
        self._end_shard(0)
        noted = [item for found in self._gather(self._skipped) for item in found]
        skipped = [item for _, item in sorted(noted, key=lambda item: item[0])]
        every = {k: v for found in self._gather(self._written) for k, v in found.items()}
        if not every:
            raise ValueError("explanations: got none; a pack needs at least one")
        shards = [every[number][0] for number in sorted(every)]
        titles = _first_titles(every[number][1] for number in sorted(every))
        if not all(shard.features for shard in shards):
            for features in (shard.features for shard, _ in self._written.values()):
                if features is not None:
                    (self.folder / features.name).unlink()
            shards = [shard._replace(features=None) for shard in shards]
        self._gather(None)
        if self.is_first:
            data = manifest.text(
                titles,
                shards,
                self.metrics,
                self.shares,
                skipped,
                self._video,
            )
            write_file(self.folder / MANIFEST, data)

    def finish_early(self, reason: str) -> bool:
        """Call :meth:`close` after an error, and record the ``reason`` among the skipped images; return
        whether there was anything to write."""
        if self._closed or not (self._written or self._shard.photos):
            return False
        self.skipped.append(("", reason))
        self.close()
        return True

    # ------------------------------------------------------------------ a shard

    def _photo(self, group: Sequence[Explanation], thumbnail: bytes | None) -> _Photo:
        maps = [np.ascontiguousarray(e.map, dtype="<f4") for e in group]
        hashes = [hashlib.sha256(values.tobytes()).digest() for values in maps]
        return _Photo(
            image_row(group, _disagreement(group), thumbnail),
            [entry_row(e, sha256, self.metrics) for e, sha256 in zip(group, hashes, strict=True)],
            {printable(e.method): text("method_title", e.method_title) for e in group},
            maps,
            thumbnail,
            _features(group, self._features_length),
        )

    def _draw(self, e: Explanation, photo: Image.Image) -> None:
        drawn = overlay(photo, e.on_photo((photo.height, photo.width)))
        write_file(self.folder / OVERLAYS / f"{file_stem(e.id, self._stems)}.jpg", _jpeg(drawn))

    def _end_shard(self, following: int) -> None:
        """Write the files of a shard, and begin number ``following``; a shard without photos has none."""
        number, photos = self._shard.number, self._shard.photos
        self._skipped += [(number, item) for item in self.skipped[len(self._skipped) :]]
        if photos:
            self._written[number] = self._write(number, photos)
        self._shard = _Shard(following)

    def _write(self, number: int, photos: Sequence[_Photo]) -> tuple[Shard, dict[str, str]]:
        entries = [row for photo in photos for row in photo.entries]
        images = [photo.image for photo in photos]

        def write(
            kind: str, tensors: Mapping[str, NDArray[Any]]
        ) -> tuple[ShardFile, dict[str, int]]:
            return write_tensors(self.folder / shard_file(kind, number), tensors)

        every = (values for photo in photos for values in photo.maps)
        maps, places = write(
            "maps", {row["entry_id"]: v for row, v in zip(entries, every, strict=True)}
        )
        for row in entries:
            row["place"] = places[row["entry_id"]]
        thumbnails, features, places = None, None, {}
        jpegs = {p.image["image_id"]: p.thumbnail for p in photos if p.thumbnail is not None}
        if jpegs:
            found = {id: np.frombuffer(data, np.uint8) for id, data in jpegs.items()}
            thumbnails, places = write("thumbnails", found)
        for row in images:
            row["thumbnail_place"] = places.get(row["image_id"], 0)
        read = [photo.features for photo in photos if photo.features is not None]
        if len(read) == len(photos):
            features, _ = write("features", {"features": np.stack(read).astype("<f2")})
            features = features._replace(rows=len(photos))
        files = []
        for kind, schema, rows in (
            ("entries", entry_schema(list(self.metrics)), entries),
            ("images", IMAGES, images),
        ):
            values = {f.name: [row[f.name] for row in rows] for f in schema}
            path = self.folder / shard_file(kind, number)
            files.append(write_rows(path, schema, values))
        titles = _first_titles(photo.titles for photo in photos)
        return Shard(files[0], files[1], maps, thumbnails, features), titles


def _first_titles(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Methods in order of first appearance, each with its first title."""
    titles: dict[str, str] = {}
    for given in found:
        for method, title in given.items():
            titles.setdefault(method, title)
    return titles


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]]
) -> tuple[ShardFile, dict[str, int]]:
    """Write a safetensors file, and return its record and the position of each tensor's first byte."""
    data = save(dict(tensors), {"format": FORMAT})  # with several keys the order is not fixed
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__")
    places = {name: begin + about["data_offsets"][0] for name, about in header.items()}
    write_file(path, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return ShardFile(path.name, len(tensors), len(data), sha256), places


def write_file(path: Path, data: bytes) -> None:
    """Write a file, and create its folder if necessary."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def thumbnail_jpeg(photo: Image.Image) -> bytes:
    """Return the JPEG file of a photo's thumbnail, at most ``OVERLAY_SIDE`` per side."""
    small = photo.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return _jpeg(small)


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88, optimize=True)
    return stream.getvalue()


def _disagreement(group: Sequence[Explanation]) -> float:
    """Disagreement of the methods on one photo, without sanity rows, on the classes that several explain;
    four decimals, NaN if there are none."""
    by_class: dict[Any, list[Explanation]] = {}
    for e in group:
        if not e.sanity and not e.is_mask:
            by_class.setdefault((e.target, e.view), []).append(e)
    values = [disagreement([e.map for e in maps]) for maps in by_class.values() if len(maps) > 1]
    values = [v for v in values if math.isfinite(v)]
    return round(sum(values) / len(values), 4) if values else math.nan


def _features(group: Sequence[Explanation], length: int | None) -> NDArray[np.float16] | None:
    """The features (d,) of a photo that the classifier received; None if they were not stored.

    Raises:
        ValueError: they are not finite, or not ``length`` numbers.
    """
    found = next((e.facts.features for e in group if e.facts.features is not None), None)
    if found is None:
        return None
    row, name = np.asarray(found, np.float16), group[0].image_id
    wanted = row.shape if length is None else (length,)
    if row.ndim != 1 or row.shape != wanted or not row.size:
        raise ValueError(f"features: the features of {name} have shape {row.shape}; give {wanted}")
    if not np.isfinite(row).all():
        raise ValueError(f"features: the features of {name} are not finite; check the weights")
    return row
