"""Writing a pack photo by photo: maps go to disk as they come, so that memory does not grow with them.

    maps.safetensors   every map, float32 (h, w), by the entry's id
    features.safetensors   what the classifier reads of each photo, float16 (M, d), where it was kept
    manifest.json      an entry a line: class, method, view, metrics, curves, hashes; what is known of
                       each image; the protocols
    thumbnails/, overlays/   JPEG files by image and by entry
    overlay.mp4        the film of a clip

A pack appears whole or not at all, and carries the SHA-256 of every map and thumbnail. Everything
is a pure function of what is written: equal explanations give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from xattn.packs.explanation import Explanation
from xattn.packs.format import (
    FEATURES,
    FORMAT,
    MANIFEST,
    MAPS,
    OVERLAY_SIDE,
    VERSION,
    VIDEO,
    check_output,
    is_pack,
    needs_pyarrow,
    owned_files,
)
from xattn.packs.photo_summary import disagreement_of, features_of, jpeg, thumbnail_jpeg
from xattn.photos.ids import file_stem
from xattn.pictures.overlay import overlay
from xattn.runtime.files import atomic_folder, file_sha256
from xattn.runtime.version import __version__

_DRAFT = "maps.data"


@contextmanager
def pack_writer(
    folder: str | Path, overlays: bool = True, format: int = 1, **options: Any
) -> Iterator[Any]:
    """A :class:`PackWriter` of the pack ``folder``, which appears, or replaces an earlier one, when the
    block ends.

    ``format`` 2 is for many photos and has no overlays and no film: the writer is a
    :class:`~xattn.packs.sharded.shard_writer.ShardWriter` and takes its ``options``.

    Raises:
        ValueError: a folder that is not a pack, nothing was added, or pyarrow is missing for format 2.
        OSError: it cannot be written, or the disk is full; earlier results are intact.
    """
    if format == 2:
        try:
            from xattn.packs.sharded.shard_writer import shard_writer
        except ModuleNotFoundError as error:
            raise ValueError(needs_pyarrow("output", error)) from None
        with shard_writer(folder, **options) as shards:
            yield shards
        return
    folder = check_output(folder)
    with atomic_folder(folder, owned_files(folder), is_pack) as temporary:
        writer = PackWriter(temporary, overlays)
        try:
            yield writer
            writer.close()
        finally:
            writer.abandon()


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
        overlays: also write pictures into ``overlays/``, the map in colour over the photo.
        skipped: (file name, reason) of images that could not be read, for the manifest.
        video: a film of overlays, moved into the pack.
        metrics: what the explanations' metrics are, by column:
            ``{"higher_is_better": bool, "formula": str, "protocol_id": str}``.

    Raises:
        ValueError: no explanations, two with the same id, or a folder that is not a pack.
        OSError: the folder cannot be written or the disk is full; earlier results are intact.
    """
    explanations = list(explanations)
    groups: dict[str, list[Explanation]] = {}
    for explanation in explanations:
        groups.setdefault(explanation.image_id, []).append(explanation)
    with pack_writer(folder, overlays) as writer:
        for group in groups.values():
            writer.add(group)
        if video is not None:
            writer.add_video(video)
        writer.skipped = list(skipped)
        writer.order = [e.id for e in explanations]
        writer.metrics = metrics or {}
    return Path(folder)


class PackWriter:
    """See :func:`pack_writer`.

    Attributes:
        skipped: (file name, reason) of images that could not be read.
        metrics: by column key, {"higher_is_better", "formula", "protocol_id"} of the metrics that
            explanations carry.
        shares: by name of a curve, the shares of pixels that its values stand for, where they are not
            at equal steps over [0, 1].
        order: the ids of the entries in the order of the manifest; by default as they were added.
    """

    def __init__(self, folder: Path, overlays: bool) -> None:
        self.folder, self.overlays = folder, overlays
        self.skipped: list[tuple[str, str]] = []
        self.metrics: Mapping[str, Mapping[str, Any]] = {}
        self.shares: Mapping[str, Sequence[float]] = {}
        self.order: Sequence[str] | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        self._images: dict[str, dict[str, Any]] = {}
        self._features: dict[str, NDArray[np.float16]] = {}
        self._protocols: dict[str, int] = {}
        self._header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}
        self._video: str | None = None
        self._end = 0
        self._stems: dict[str, set[str]] = {"thumbnails": set(), "overlays": set()}
        self._maps = (folder / _DRAFT).open("wb")

    def add(self, group: Sequence[Explanation], thumbnail: bytes | None = None) -> None:
        """All explanations of one photo; ``thumbnail`` is its JPEG file where that is known already.

        Raises:
            ValueError: a photo or an explanation that was added before, a view that is too large, or
                features that are not finite or of another length than those before.
        """
        photo = group[0]
        if photo.image_id in self._images:
            raise ValueError(
                f"explanations: {photo.image_id!r} was added before; add all of a photo at once"
            )
        record = {**photo.facts.to_json(), "disagreement": _or_none(disagreement_of(group))}
        names = [e.id for e in group]
        for number, name in enumerate(names):
            if name in self._entries or name in names[:number]:
                raise ValueError(
                    f"explanations: {name!r} comes twice; give every photo its own image_id"
                )
        overlays: list[str | None] = [None] * len(group)
        if thumbnail is None and photo.source is not None:
            pixels = photo.photo(OVERLAY_SIDE)
            overlays = [self._overlay(pixels, e) for e in group] if self.overlays else overlays
            thumbnail = thumbnail_jpeg(pixels)
        stored = None
        if thumbnail is not None:
            stored = self._file("thumbnails", photo.image_id, thumbnail)
            record["thumbnail_sha256"] = hashlib.sha256(thumbnail).hexdigest()
        for e, drawn in zip(group, overlays, strict=True):
            self._entries[e.id] = self._entry(e, stored, drawn)
        self._images[photo.image_id] = record
        self._keep_features(group)

    def use_thumbnail(self, group: Sequence[Explanation], name: str, sha256: str) -> None:
        """Let a photo that was added without pixels use a thumbnail that is in the folder already."""
        self._images[group[0].image_id]["thumbnail_sha256"] = sha256
        for e in group:
            self._entries[e.id]["thumbnail"] = name

    def add_video(self, film: Path) -> None:
        """Move a film of overlays into the pack."""
        shutil.move(film, self.folder / VIDEO)
        self._video = file_sha256(self.folder / VIDEO)

    def close(self) -> None:
        """Write the maps and the manifest."""
        if not self._entries:
            raise ValueError("explanations: got none; a pack needs at least one")
        self._maps.close()
        header = json.dumps(self._header, ensure_ascii=False, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # as safetensors aligns its data
        with (self.folder / MAPS).open("wb") as whole, (self.folder / _DRAFT).open("rb") as draft:
            whole.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(draft, whole, 1 << 20)
        (self.folder / _DRAFT).unlink()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "xattn": __version__,
            "protocols": [json.loads(text) for text in self._protocols],
            "skipped": [{"file_name": name, "reason": why} for name, why in self.skipped],
            "metrics": self.metrics,
            "shares": self.shares,
            "features": self._write_features(),
            "images": self._images,
            "entries": [self._entries[i] for i in self.order or self._entries],
            "video": None if self._video is None else VIDEO,
            "video_sha256": self._video,
        }
        # A file name that is no UTF-8 has half characters, which JSON can write as \udc80.
        data = manifest_text(manifest).encode("utf-8", "backslashreplace")
        write_file(self.folder / MANIFEST, data)

    def abandon(self) -> None:
        """Close what is open."""
        self._maps.close()

    def _keep_features(self, group: Sequence[Explanation]) -> None:
        first = next(iter(self._features.values()), None)
        row = features_of(group, None if first is None else len(first))
        if row is not None:
            self._features[group[0].image_id] = row

    def _write_features(self) -> dict[str, Any] | None:
        """Write the features in the order of the entries, if every photo has some; returns what the
        manifest says of them."""
        names = dict.fromkeys(self._entries[i]["image_id"] for i in self.order or self._entries)
        if not all(name in self._features for name in names):
            return None
        values = np.stack([self._features[name] for name in names])
        save_file({"features": values}, self.folder / FEATURES)
        return {"shape": list(values.shape), "sha256": hashlib.sha256(values.tobytes()).hexdigest()}

    def _entry(self, e: Explanation, thumbnail: str | None, drawn: str | None) -> dict[str, Any]:
        e.view.check_size()
        data = np.ascontiguousarray(e.map, dtype="<f4").tobytes()
        begin, self._end = self._end, self._end + len(data)
        self._maps.write(data)
        shape = list(e.map.shape)
        self._header[e.id] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, self._end]}
        protocol = json.dumps(e.protocol, ensure_ascii=False, allow_nan=False)
        return {
            "id": e.id,
            "image_id": e.image_id,
            "file_name": Path(e.file_name).name,
            "target": e.target,
            "target_name": e.target_name,
            "probability": e.probability,
            "method": e.method,
            "is_mask": e.is_mask,
            "sanity": e.sanity,
            "protocol": self._protocols.setdefault(protocol, len(self._protocols)),
            "view": e.view.to_json(),
            "shape": shape,
            "min": float(e.map.min()),
            "max": float(e.map.max()),
            "thumbnail": thumbnail,
            "overlay": drawn,
            "metrics": {key: value for key, value in e.metrics.items() if math.isfinite(value)},
            "curves": {key: list(values) for key, values in e.curves.items()},
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    def _overlay(self, photo: Image.Image, e: Explanation) -> str:
        drawn = overlay(photo, e.on_photo((photo.height, photo.width)))
        return self._file("overlays", e.id, jpeg(drawn))

    def _file(self, folder: str, id: str, data: bytes) -> str:
        """Write a picture into a folder of the pack; its name."""
        name = f"{folder}/{file_stem(id, self._stems[folder])}.jpg"
        write_file(self.folder / name, data)
        return name


def write_file(path: Path, data: bytes) -> None:
    """A file, with the folder it is in."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """JSON with a line an entry and a line an image: for people, and read in half the time."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    parts = []
    for key, value in manifest.items():
        if key == "entries":
            text = "[\n  " + ",\n  ".join(map(line, value)) + "\n ]"
        elif key == "images" and value:
            rows = (f"{line(name)}: {line(record)}" for name, record in value.items())
            text = "{\n  " + ",\n  ".join(rows) + "\n }"
        else:
            text = line(value)
        parts.append(f" {line(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _or_none(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
