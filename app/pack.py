"""One pack: its index read at once, a map or a photo only when it is asked for, each checked by its hash.

Nothing in a pack is believed: types, sizes and names are checked, ids are looked up and never joined
to a path, and every file is opened inside the pack's own folder or not at all. What is wrong is a
:class:`PackError`, whose text is for the person at the page.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd
from PIL import Image

from xattn.explanation import (
    MANIFEST,
    MAPS,
    THUMBNAIL,
    VIDEO,
    Explanation,
    ImageFacts,
    parse_manifest,
)
from xattn.files import file_sha256
from xattn.images import View, decode_image
from xattn.tensor_file import TensorFile

MAX_MANIFEST = 1 << 30  # bytes
MAX_THUMBNAIL = 32 << 20  # bytes
MAX_PIXELS = 4_000_000  # of a thumbnail; xattn writes 512 x 512
MAX_SIDE = 1_000_000  # of a photo or map, in pixels
MAX_NAME = 400  # characters of an id
RECENT_MAPS = 64 << 20  # bytes of maps that are kept
_AGAIN = "make the pack again"
_COLUMNS = {  # of entries, and what a value may be
    "image_id": {str},
    "file_name": {str},
    "method": {str},
    "target": {int},
    "target_name": {str},
    "probability": {int, float},
    "is_mask": {bool},
    "min": {int, float},
    "max": {int, float},
    "protocol": {int},
    "view": {dict},
    "shape": {list},
    "thumbnail": {str, type(None)},
}
_SHOWN = ("image_id", "method", "target", "target_name", "probability", "is_mask", "min", "max")


class PackError(ValueError):
    """What is wrong with a pack, and what to do, in words for the person who opens it."""


class MetricInfo(NamedTuple):
    """A metric of a pack: ``key`` names the column of ``Pack.entries``."""

    key: str
    higher_is_better: bool
    protocol_id: str
    formula: str


class Signature(NamedTuple):
    """What tells a file from the one that was there before, without reading it."""

    mtime_ns: int
    size: int
    inode: int


class _Entry(NamedTuple):
    """What an explanation needs beside its row in the index."""

    view: dict[str, Any]
    protocol: dict[str, Any]
    file_name: str
    sha256: str | None
    curves: Any


@dataclass(frozen=True)
class _Photo:
    thumbnail: str | None
    sha256: str | None
    facts: ImageFacts


class Recent:
    """What was read last, up to so many bytes; threads may share it."""

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


# ---------------------------------------------------------------------- files


def open_inside(folder: Path, name: str) -> IO[bytes]:
    """A regular file of ``folder`` (a resolved path) for reading; links that lead out are refused.

    Raises:
        PackError: it is gone, leads out of the folder, is no file, or may not be read.
    """
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder):
            raise PackError(
                f"{name} is a link that leads out of the pack; put the file itself there"
            )
        stream = open(path, "rb", opener=_open)
    except FileNotFoundError:
        raise PackError(f"{name} is missing; copy the pack again, or {_AGAIN}") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{name} cannot be read ({_why(error)}); check its permissions") from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise PackError(f"{name} is no regular file; copy the pack again, or {_AGAIN}")
    return stream


def _open(path: str, flags: int) -> int:
    # Not to wait for a pipe that somebody named like a picture.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def read_inside(folder: Path, name: str, limit: int) -> tuple[bytes, Signature]:
    """All bytes of a file of ``folder``, at most ``limit``, and its signature."""
    with open_inside(folder, name) as stream:
        found = os.fstat(stream.fileno())
        if found.st_size > limit:
            raise PackError(f"{name} has {found.st_size:,} bytes, over the limit of {limit:,}")
        try:
            data = stream.read(limit + 1)
        except OSError as error:
            raise PackError(f"{name} cannot be read ({_why(error)}); try again") from None
    return data, Signature(found.st_mtime_ns, found.st_size, found.st_ino)


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


# ---------------------------------------------------------------------- the pack


class Pack:
    """A pack that was opened; cheap to keep, safe to share between threads.

    Attributes:
        version: the first 12 hex digits of the manifest's SHA-256, for keys of caches.
        images: one row an image, by image_id: file_name, label, label_name, predicted,
            predicted_name, confidence, right, disagreement, methods (how many). ``label`` and
            ``predicted`` are classes of the classifier, or None; ``right`` is True, False, or None
            where one of them is not known.
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
        data, self.signature = read_inside(self.folder, MANIFEST, MAX_MANIFEST)
        self.version = hashlib.sha256(data).hexdigest()[:12]
        try:
            manifest = parse_manifest(data, self.name)
        except ValueError as error:
            raise PackError(str(error)) from None
        self.xattn = str(manifest.get("xattn", ""))
        self._manifest_sha256 = hashlib.sha256(data).hexdigest()
        entries, columns = _entries(manifest)
        protocols = manifest.get("protocols")
        _check_protocols(protocols, columns["protocol"])
        self.metrics = _metrics(manifest.get("metrics", {}))
        self._maps = self._open_maps(columns)
        self.entries = _entry_table(entries, columns, self.metrics)
        self._entries = {
            entry["id"]: _Entry(
                entry["view"],
                protocols[entry["protocol"]],
                entry["file_name"],
                _hash(entry.get("sha256"), "sha256"),
                entry.get("curves"),
            )
            for entry in entries
        }
        self.images, self._photos = _image_table(manifest, columns, protocols)
        self._video = _video(manifest)
        self.shares = _shares(manifest.get("shares", {}))

    def explanation(self, entry_id: str) -> Explanation:
        """One entry with its map, which is read now and checked by its hash."""
        entry = self._entry(entry_id)
        key = (self.folder, self.version, entry_id)
        kept = self._recent.get(key)
        if kept is not None:
            return kept  # type: ignore[no-any-return]
        row = self.entries.loc[entry_id]
        try:
            values = self._maps.read(entry_id, entry.sha256)
            view = View.from_json(entry.view)
            if (
                max(*view.photo_size, *view.resized, *map(abs, view.box), *view.input_size)
                > MAX_SIDE
            ):
                raise ValueError("a view of more than a million pixels a side")
            found = Explanation(
                map=values,
                target=int(row["target"]),
                target_name=row["target_name"],
                probability=float(row["probability"]),
                method=row["method"],
                view=view,
                image_id=row["image_id"],
                protocol=entry.protocol,
                file_name=entry.file_name,
                is_mask=bool(row["is_mask"]),
                facts=self._photo(row["image_id"]).facts,
                metrics={m.key: float(v) for m in self.metrics if (v := row[m.key]) == v},
                curves=self.curves(entry_id),
                sanity=bool(row["sanity"]),
            )
        except PackError:
            raise
        except (ValueError, OverflowError, OSError, KeyError) as error:
            raise PackError(f"The map {entry_id} is damaged ({_line(error)}); {_AGAIN}") from None
        self._recent.put(key, found, values.nbytes)
        return found

    def photo(self, image_id: str, side: int | None = None) -> Image.Image:
        """The stored thumbnail of a photo, RGB, shrunk to ``side`` pixels if it is larger."""
        try:
            image = decode_image(io.BytesIO(self.photo_bytes(image_id)), image_id, MAX_PIXELS)
        except PackError:
            raise
        except ValueError as error:
            raise PackError(
                f"The picture of {image_id} is damaged ({_line(error)}); {_AGAIN}"
            ) from None
        if side is not None:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        return image

    def photo_bytes(self, image_id: str) -> bytes:
        """The JPEG file of :meth:`photo`, checked by its hash."""
        photo = self._photo(image_id)
        if photo.thumbnail is None:
            raise PackError(
                f"The pack holds no picture of {image_id}; {_AGAIN} from photos on disk"
            )
        data, _ = read_inside(self.folder, photo.thumbnail, MAX_THUMBNAIL)
        if photo.sha256 is not None and hashlib.sha256(data).hexdigest() != photo.sha256:
            raise PackError(
                f"The picture of {image_id} is not the one that was written; reload the page if the "
                f"pack was just replaced, else {_AGAIN}"
            )
        return data

    def curves(self, entry_id: str) -> dict[str, list[float]]:
        """Scores while pixels go or come, by "deletion", "insertion", ...; {} where not measured."""
        curves = self._entry(entry_id).curves
        if curves is None:
            return {}
        if not isinstance(curves, dict) or not all(map(_is_curve, curves.values())):
            raise PackError(f"The curves of {entry_id} are damaged; {_AGAIN}")
        return {name: [float(v) for v in values] for name, values in curves.items()}

    def top(self, image_id: str) -> list[tuple[int, str, float]]:
        """(class, its name, probability) of the classifier's first classes; [] in old packs."""
        return list(self._photo(image_id).facts.top)

    def provenance(self, entry_id: str) -> dict[str, Any]:
        """Where a map comes from: method, head, protocol, versions and hashes."""
        entry = self._entry(entry_id)
        row = self.entries.loc[entry_id]
        return {
            "method": row["method"],
            "backbone": entry.protocol.get("backbone"),
            "head": entry.protocol.get("head"),
            "protocol": entry.protocol,
            "xattn": self.xattn,
            "metrics": {m.key: m.protocol_id for m in self.metrics if row[m.key] == row[m.key]},
            "sha256": {
                "map": entry.sha256,
                "thumbnail": self._photo(row["image_id"]).sha256,
                "manifest": self._manifest_sha256,
            },
        }

    @property
    def video(self) -> Path | None:
        """The pack's film, or None; checked by its hash."""
        if self._video is None:
            return None
        open_inside(self.folder, VIDEO).close()
        path = (self.folder / VIDEO).resolve()
        if self._video and file_sha256(path) != self._video:
            raise PackError(f"{VIDEO} is not the film that was written; {_AGAIN}")
        return path

    def _open_maps(self, columns: dict[str, list[Any]]) -> TensorFile:
        try:
            maps = TensorFile(lambda: open_inside(self.folder, MAPS))
        except PackError:
            raise
        except (ValueError, OSError) as error:
            raise PackError(
                f"{MAPS} is damaged ({_line(error)}); copy the pack again, or {_AGAIN}"
            ) from None
        for entry_id, shape in zip(columns["id"], columns["shape"], strict=True):
            if list(maps.shape(entry_id) or ()) != shape or len(shape) != 2 or 0 in shape:
                raise PackError(
                    f"{MAPS} has no map {entry_id} of shape {str(shape)[:40]}; {_AGAIN}"
                )
        return maps

    def _entry(self, entry_id: str) -> _Entry:
        try:
            return self._entries[entry_id]
        except (KeyError, TypeError):
            raise PackError("The pack has no such map; choose one of its gallery") from None

    def _photo(self, image_id: str) -> _Photo:
        try:
            return self._photos[image_id]
        except (KeyError, TypeError):
            raise PackError("The pack has no such image; choose one of its gallery") from None


# ---------------------------------------------------------------------- the index


def _entries(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """The entries, and their checked columns."""
    entries = manifest.get("entries")
    if not isinstance(entries, list) or not set(map(type, entries)) <= {dict}:
        raise _damaged("it lists no entries")
    if not entries:
        raise PackError("The pack is empty; explain at least one photo")
    columns = {key: _column(entries, key, kinds) for key, kinds in _COLUMNS.items()}
    columns["id"] = _column(entries, "id", {str})
    for key in ("id", "image_id", "method"):
        _check_names(columns[key], key)
    if len(set(columns["id"])) < len(entries):
        raise _damaged("an id comes twice")
    for key in ("file_name", "target_name"):
        columns[key] = [_text(value) for value in columns[key]]
    if not all(0 <= value <= 1 for value in columns["probability"]):
        raise _damaged("a probability is not in 0..1")
    if not all(0 <= value < 1 << 31 for value in columns["target"]):
        raise _damaged("a target is no class")
    for key in ("min", "max"):
        if not all(map(_is_finite, columns[key])):
            raise _damaged(f"a {key} is not finite")
    for name in columns["thumbnail"]:
        if name is not None and not re.fullmatch(THUMBNAIL, name):
            raise _damaged(f"the thumbnail {name[:60]!r} lies outside the pack")
    return entries, columns


def _column(entries: Iterable[dict[str, Any]], key: str, kinds: set[type]) -> list[Any]:
    try:
        values = [entry[key] for entry in entries]
    except KeyError:
        raise _damaged(f"an entry has no {key}") from None
    if not set(map(type, values)) <= kinds:
        raise _damaged(f"an entry's {key} is of another type")
    return values


def _entry_table(
    entries: list[dict[str, Any]], columns: dict[str, list[Any]], metrics: list[MetricInfo]
) -> pd.DataFrame:
    table: dict[str, Any] = {key: columns[key] for key in _SHOWN}
    sanity = [entry.get("sanity", False) for entry in entries]
    if not set(map(type, sanity)) <= {bool}:
        raise _damaged("an entry's sanity is of another type")
    table["sanity"] = sanity
    given = [entry.get("metrics", {}) for entry in entries]
    if not set(map(type, given)) <= {dict}:
        raise _damaged("an entry's metrics are no table")
    for metric in metrics:
        if metric.key in table:
            raise _damaged(f"a metric has the name {metric.key}")
        values = [values.get(metric.key) for values in given]
        if not all(v is None or _is_finite(v) for v in values):
            raise _damaged(f"a value of {metric.key} is no number")
        table[metric.key] = [math.nan if v is None else float(v) for v in values]
    index = pd.Index(columns["id"], dtype=object, name="entry_id")
    texts = {key: object for key in _SHOWN if _COLUMNS[key] == {str}}  # else it depends on pandas
    kinds = {**texts, "probability": float, "min": float, "max": float}
    return pd.DataFrame(
        {key: pd.Series(v, index, dtype=kinds.get(key)) for key, v in table.items()}
    )


def _image_table(
    manifest: dict[str, Any], columns: dict[str, list[Any]], protocols: list[dict[str, Any]]
) -> tuple[pd.DataFrame, dict[str, _Photo]]:
    given = manifest.get("images", {})
    if not isinstance(given, dict):
        raise _damaged("its images are no table")
    groups: dict[str, list[int]] = {}
    for i, image_id in enumerate(columns["image_id"]):
        groups.setdefault(image_id, []).append(i)
    photos, rows = {}, []
    for image_id, group in groups.items():
        record = given.get(image_id, {})
        if not isinstance(record, dict):
            raise _damaged(f"what it says of {image_id} is no table")
        top = _top(record.get("top", []))
        label, label_name = _label(record)
        best = top[0] if top else _best(group, columns, protocols)
        predicted, predicted_name, confidence = best or (None, None, math.nan)
        disagreement = record.get("disagreement")
        if disagreement is not None and not _is_finite(disagreement):
            raise _damaged(f"the disagreement of {image_id} is no number")
        thumbnail = next((t for i in group if (t := columns["thumbnail"][i]) is not None), None)
        sha256 = _hash(record.get("thumbnail_sha256"), "thumbnail_sha256")
        photos[image_id] = _Photo(thumbnail, sha256, ImageFacts(tuple(top), label, label_name))
        rows.append(
            (
                columns["file_name"][group[0]],
                label,
                label_name,
                predicted,
                predicted_name,
                confidence,
                None if label is None or predicted is None else label == predicted,
                math.nan if disagreement is None else float(disagreement),
                len({columns["method"][i] for i in group}),
            )
        )
    names = ("file_name", "label", "label_name", "predicted", "predicted_name", "confidence")
    floats = {"confidence": float, "disagreement": float, "methods": int}
    table = pd.DataFrame(
        {
            name: pd.Series(values, dtype=floats.get(name, object))
            for name, values in zip(
                (*names, "right", "disagreement", "methods"), zip(*rows, strict=True), strict=True
            )
        }
    )
    table.index = pd.Index(list(groups), dtype=object, name="image_id")
    return table, photos


def _best(
    group: list[int], columns: dict[str, list[Any]], protocols: list[dict[str, Any]]
) -> tuple[int, str, float] | None:
    """The predicted class of an old pack: the most probable of the top classes it explains."""
    top = [i for i in group if protocols[columns["protocol"][i]].get("classes") == "top"]
    if not top:
        return None
    i = max(top, key=lambda i: columns["probability"][i])
    return columns["target"][i], columns["target_name"][i], float(columns["probability"][i])


def _top(top: Any) -> list[tuple[int, str, float]]:
    if not isinstance(top, list) or len(top) > 1000:
        raise _damaged("an image's top classes are no list")
    found = []
    for item in top:
        kinds = [type(v) for v in item] if isinstance(item, list) else []
        if kinds not in ([int, str, float], [int, str, int]) or not 0 <= item[2] <= 1:
            raise _damaged("an image's top classes are not [class, name, probability]")
        if not 0 <= item[0] < 1 << 31:
            raise _damaged("an image's top class is no class")
        found.append((item[0], _text(item[1]), float(item[2])))
    return found


def _label(record: dict[str, Any]) -> tuple[int | None, str | None]:
    label, name = record.get("label"), record.get("label_name")
    if label is not None and (type(label) is not int or not 0 <= label < 1 << 31):
        raise _damaged("a label is no class")
    if name is not None and not isinstance(name, str):
        raise _damaged("the name of a label is no text")
    return label, None if name is None else _text(name)


def _metrics(given: Any) -> list[MetricInfo]:
    if not isinstance(given, dict) or len(given) > 1000:
        raise _damaged("its metrics are no table")
    metrics = []
    for key, record in given.items():
        if not isinstance(record, dict) or type(record.get("higher_is_better")) is not bool:
            raise _damaged("a metric is not described")
        protocol_id, formula = record.get("protocol_id", ""), record.get("formula", "")
        if not isinstance(protocol_id, str) or not isinstance(formula, str):
            raise _damaged("a metric is not described in words")
        _check_names([key], "metric")
        metrics.append(
            MetricInfo(key, record["higher_is_better"], _text(protocol_id), _text(formula))
        )
    return metrics


def _shares(given: Any) -> dict[str, list[float]]:
    if not isinstance(given, dict) or not all(map(_is_curve, given.values())):
        raise _damaged("the shares of its curves are no numbers")
    return {name: [float(v) for v in values] for name, values in given.items()}


def _check_protocols(protocols: Any, numbers: list[int]) -> None:
    if not isinstance(protocols, list) or not set(map(type, protocols)) <= {dict}:
        raise _damaged("it lists no protocols")
    if not all(0 <= number < len(protocols) for number in numbers):
        raise _damaged("an entry has a protocol that is not listed")


def _video(manifest: dict[str, Any]) -> str | None:
    """The film's hash, "" where old packs have none, None without a film."""
    video = manifest.get("video")
    if video is None:
        return None
    if video != VIDEO:
        raise _damaged(f"its film is not {VIDEO}")
    return _hash(manifest.get("video_sha256"), "video_sha256") or ""


def _check_names(values: Iterable[str], key: str) -> None:
    for value in set(values):
        if not value or len(value) > MAX_NAME or "\0" in value or _text(value) != value:
            raise _damaged(f"an entry's {key} is {value[:60]!a}")


def _hash(value: Any, key: str) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
        raise _damaged(f"a {key} is no SHA-256")
    return value


def _is_curve(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 100_000 and all(map(_is_finite, values))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # also what float() can hold


def _text(value: str) -> str:
    """Without the half characters that JSON can write and nothing can send."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _damaged(what: str) -> PackError:
    return PackError(f"{MANIFEST} is damaged: {what}; copy the pack again, or {_AGAIN}")
