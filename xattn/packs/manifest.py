"""The manifest of a pack, read into columns; nothing in it is believed before it was checked.

What is known of each entry lies in columns: ten thousand small objects would be walked by every full
garbage collection of the process.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xattn.packs.contained_files import AGAIN, PackError
from xattn.packs.format import MANIFEST, THUMBNAIL, VIDEO
from xattn.photos.view import View
from xattn.runtime.names import encodable, visible

MAX_NAME = 400  # characters of an id
MAX_CLASS = 1 << 31
MAX_CURVE = 100_000  # values
MAX_METRICS = MAX_TOP = 1000
MAX_FEATURES = 1 << 16  # numbers of a photo
_SHA256, _THUMBNAIL = re.compile(r"[0-9a-f]{64}"), re.compile(THUMBNAIL)
_FRAME = re.compile(r"frame-([0-9]{6,15})")
_REQUIRED: dict[str, set[type]] = {  # keys of an entry, and the types that their values may have
    "id": {str},
    "image_id": {str},
    "method": {str},
    "target": {int},
    "target_name": {str},
    "probability": {int, float},
    "is_mask": {bool},
    "file_name": {str},
    "protocol": {int},
    "view": {dict},
    "shape": {list},
    "thumbnail": {str, type(None)},
}
_RANGE: dict[str, set[type]] = {"min": {int, float}, "max": {int, float}}
_OPTIONAL: dict[str, tuple[Any, set[type]]] = {  # keys that older packs lack: default, types
    "sanity": (False, {bool}),
    "metrics": ({}, {dict}),
    "curves": ({}, {dict}),
    "sha256": (None, {str, type(None)}),
}
# The tables of a pack, by column with the type of its values; see xattn.packs.tables.
ENTRY_TABLE: dict[str, type] = {
    "image_id": object,
    "method": object,
    "target": int,
    "target_name": object,
    "probability": float,
    "is_value": bool,
    "is_mask": bool,
    "sanity": bool,
    "min": float,
    "max": float,
}
IMAGE_TABLE: dict[str, type] = {
    "file_name": object,
    "title": object,
    "label": object,
    "label_name": object,
    "predicted": object,
    "predicted_name": object,
    "confidence": float,
    "right": object,
    "disagreement": float,
    "methods": int,
}
_IMAGE_COLUMNS = ("image_id", *IMAGE_TABLE, "top", "thumbnail", "thumbnail_sha256")
Top = tuple[tuple[int, str, float], ...]


class MetricInfo(NamedTuple):
    """A metric of a pack: ``key`` names the column of ``Pack.entries``."""

    key: str
    higher_is_better: bool
    protocol_id: str
    formula: str


class DamagedFile(PackError):
    """A file of a pack that is not what was written: the ``file``'s name and the ``reason``."""

    def __init__(self, file: str, reason: str, message: str | None = None) -> None:
        super().__init__(message or f"{file} is damaged: {reason}; copy the pack again, or {AGAIN}")
        self.file, self.reason = file, reason


def damaged(reason: str) -> DamagedFile:
    """The error of a manifest that cannot be used."""
    return DamagedFile(MANIFEST, reason)


@dataclass(eq=False)
class Manifest:
    """What a manifest says.

    Attributes:
        xattn: the version of xattn that wrote the pack.
        protocols: the protocols, which the column ``protocol`` of the entries numbers.
        metrics: what the metrics are.
        measured: by metric, its value for each entry, NaN where there is none.
        shares: by name of a curve, the shares of pixels that its values stand for.
        features: (photos, length) of their features and the hash of these; None where there are none.
        video: the hash of the film, "" if the film has none, None without a film.
        entries: the columns of the entries by key; a "view" is a :class:`View` and "curves" are arrays.
        images: the columns of the images, in the order of the entries: those of ``IMAGE_TABLE``,
            "image_id", "top" (the classifier's first classes), "thumbnail" and "thumbnail_sha256".
    """

    xattn: str
    protocols: list[dict[str, Any]]
    metrics: list[MetricInfo]
    measured: dict[str, array[float]]
    shares: dict[str, list[float]]
    features: tuple[tuple[int, int], str] | None
    video: str | None
    entries: dict[str, list[Any]]
    images: dict[str, list[Any]]


def read_columns(manifest: dict[str, Any], trusted: bool = False) -> Manifest:
    """The columns of a parsed manifest.

    Args:
        trusted: the pack is the caller's own. Names stay as they were written and may have any length,
            as may curves; the pack may be empty; the range of a map may be missing; and metrics whose
            description is incomplete are left out. Otherwise the manifest may come from anywhere: names
            are made visible and bounded, and all of this is refused.

    Raises:
        DamagedFile: something is missing, of another type, out of its range, or outside the pack.
        PackError: the pack is empty.
    """
    entries = _entry_columns(manifest, trusted)
    protocols = list_of_tables(manifest, "protocols")
    if not all(0 <= number < len(protocols) for number in entries["protocol"]):
        raise damaged("an entry has a protocol that is not listed")
    any_size = [protocol.get("probability") == "value" for protocol in protocols]
    for number, value in zip(entries["protocol"], entries["probability"], strict=True):
        if not (is_finite(value) if any_size[number] else 0 <= value <= 1):
            raise damaged("a probability is not in 0..1")
    entries["is_value"] = [any_size[number] for number in entries["protocol"]]
    metrics = metric_infos(table_of(manifest, "metrics"), trusted)
    measured = entries.pop("metrics")
    keys = dict.fromkeys(metric.key for metric in metrics)
    if trusted:
        keys |= dict.fromkeys(key for given in measured for key in given)
    return Manifest(
        xattn=encodable(str(manifest.get("xattn", "")))[:MAX_NAME],
        protocols=protocols,
        metrics=metrics,
        measured={
            key: _measured(key, measured, trusted) for key in keys or (m.key for m in metrics)
        },
        shares=shares_of(table_of(manifest, "shares"), trusted),
        features=read_features(manifest.get("features"), len(set(entries["image_id"]))),
        video=_video(manifest, trusted),
        entries=entries,
        images=_image_columns(table_of(manifest, "images"), entries, protocols, trusted),
    )


# ---------------------------------------------------------------------- entries


def _entry_columns(manifest: dict[str, Any], trusted: bool) -> dict[str, list[Any]]:
    entries = list_of_tables(manifest, "entries")
    if not entries and not trusted:
        raise PackError("The pack is empty; explain at least one photo")
    required = _REQUIRED if trusted else _REQUIRED | _RANGE
    optional = _OPTIONAL | ({k: (0.0, kinds) for k, kinds in _RANGE.items()} if trusted else {})
    columns = {key: _column(entries, key, kinds) for key, kinds in required.items()}
    for key, (default, kinds) in optional.items():
        columns[key] = [entry.get(key, default) for entry in entries]
        _check_types(columns[key], key, kinds)
    _check_ids(columns["id"])
    if not trusted:
        for key in ("id", "image_id", "method"):
            check_names(columns[key], key)
        for key in ("file_name", "target_name"):
            columns[key] = [_shown(value) for value in columns[key]]
    if not all(0 <= value < MAX_CLASS for value in columns["target"]):
        raise damaged("a target is no class")
    for key in _RANGE:
        if not all(map(is_finite, columns[key])):
            raise damaged(f"a {key} is not finite")
    for name in columns["thumbnail"]:
        if name is not None and not _THUMBNAIL.fullmatch(name):
            raise damaged(f"the thumbnail {name[:60]!r} lies outside the pack")
    for value in columns["sha256"]:
        check_hash(value)
    columns["view"] = _views(columns["view"])
    columns["curves"] = [_curves(given, trusted) for given in columns["curves"]]
    return columns


def _column(entries: Sequence[dict[str, Any]], key: str, kinds: set[type]) -> list[Any]:
    try:
        values = [entry[key] for entry in entries]
    except KeyError:
        raise damaged(f"an entry has no {key}") from None
    _check_types(values, key, kinds)
    return values


def _check_ids(ids: list[str]) -> None:
    """Raise unless the ids are unique; else one map could be listed a million times."""
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise damaged(f"the id {id[:60]} comes twice")
        seen.add(id)


def _views(given: list[dict[str, Any]]) -> list[View]:
    """Equal views are one object: a pack has few."""
    known: dict[str, View] = {}
    views = []
    for record in given:
        key = repr(record)
        if key not in known:
            known[key] = view_of(record)
        views.append(known[key])
    return views


def view_of(record: dict[str, Any]) -> View:
    """The view of a record; DamagedFile where it is none."""
    try:
        view = View.from_json(record)
    except (ValueError, OverflowError):
        raise damaged("an entry's view is no view") from None
    try:
        return view.check_size()
    except ValueError:
        raise damaged("an entry's view has more than a million pixels a side") from None


def _curves(given: dict[str, Any], trusted: bool) -> dict[str, array[float]]:
    """Arrays, as the garbage collector does not look into them."""
    try:
        if not all(type(values) is list for values in given.values()):
            raise TypeError
        if not trusted and any(len(values) > MAX_CURVE for values in given.values()):
            raise damaged(f"a curve has more than {MAX_CURVE:,} values")
        return {name: array("d", values) for name, values in given.items()}
    except (TypeError, OverflowError):
        raise damaged("an entry's curves are no numbers") from None


# ---------------------------------------------------------------------- images


def _image_columns(
    given: dict[str, Any],
    entries: dict[str, list[Any]],
    protocols: list[dict[str, Any]],
    trusted: bool,
) -> dict[str, list[Any]]:
    groups: dict[str, list[int]] = {}
    for i, image_id in enumerate(entries["image_id"]):
        groups.setdefault(image_id, []).append(i)
    of_top_classes = [protocol.get("classes") == "top" for protocol in protocols]
    rows = []
    for image_id, group in groups.items():
        record = given.get(image_id, {})
        if type(record) is not dict:
            raise damaged("what it says of an image is no table")
        top = _top(record.get("top", []), trusted)
        best = top[0] if top else _most_probable(group, entries, of_top_classes)
        predicted, predicted_name, confidence = best or (None, None, math.nan)
        label, label_name = _label(record, trusted)
        disagreement = record.get("disagreement")
        if disagreement is not None and not is_finite(disagreement):
            raise damaged("a disagreement is no number")
        right = None if label is None or predicted is None else label == predicted
        methods = len({entries["method"][i] for i in group}) if len(group) > 1 else 1
        file_name = entries["file_name"][group[0]]
        title = title_of(image_id, file_name, protocols[entries["protocol"][group[0]]])
        known = (label, label_name, predicted, predicted_name, confidence, right)
        thumbnail = entries["thumbnail"][group[0]]
        if thumbnail is None and len(group) > 1:
            thumbnail = next(filter(None, (entries["thumbnail"][i] for i in group)), None)
        sha256 = check_hash(record.get("thumbnail_sha256"))
        about = (disagreement, methods, top, thumbnail, sha256)
        rows.append((image_id, file_name, title, *known, *about))
    values = zip(*rows, strict=True) if rows else ([] for _ in _IMAGE_COLUMNS)
    return {key: list(column) for key, column in zip(_IMAGE_COLUMNS, values, strict=True)}


def title_of(image_id: str, file_name: str, protocol: dict[str, Any]) -> str:
    """What to call an image: its file; a frame also by its number and its time, as a player shows it."""
    name = file_name or image_id
    video: Any = protocol.get("video")
    frame = _FRAME.fullmatch(image_id)
    if frame is None or type(video) is not dict:
        return name
    number = int(frame[1])
    fps: Any = video.get("fps")
    title = f"{name}, frame {number:,}"
    if not is_finite(fps) or not 0.001 <= fps <= 1000:
        return title
    minutes, hundredths = divmod(round(100 * number / fps), 6000)
    hours, left = divmod(minutes, 60)
    clock = f"{hours:,}:{left:02}" if hours else f"{minutes}"
    return f"{title}, {clock}:{hundredths / 100:05.2f}"


def _most_probable(
    group: list[int], entries: dict[str, list[Any]], of_top_classes: list[bool]
) -> tuple[int, str, float] | None:
    """The predicted class in an old pack: the most probable of the top classes that it explains."""
    top = [i for i in group if of_top_classes[entries["protocol"][i]]]
    if not top:
        return None
    i = max(top, key=lambda i: entries["probability"][i])
    return entries["target"][i], entries["target_name"][i], float(entries["probability"][i])


def _top(given: Any, trusted: bool) -> Top:
    if type(given) is not list or (len(given) > MAX_TOP and not trusted):
        raise damaged("an image's top classes are no list")
    top = []
    for item in given:
        kinds = [type(v) for v in item] if type(item) is list else []
        if kinds not in ([int, str, float], [int, str, int]) or not 0 <= item[2] <= 1:
            raise damaged("an image's top classes are not [class, name, probability]")
        if not 0 <= item[0] < MAX_CLASS:
            raise damaged("an image's top class is no class")
        top.append((item[0], item[1] if trusted else _shown(item[1]), float(item[2])))
    return tuple(top)


def _label(record: dict[str, Any], trusted: bool) -> tuple[int | None, str | None]:
    label, name = record.get("label"), record.get("label_name")
    if label is not None and (type(label) is not int or not 0 <= label < MAX_CLASS):
        raise damaged("a label is no class")
    if name is not None and not isinstance(name, str):
        raise damaged("the name of a label is no text")
    return label, name if name is None or trusted else _shown(name)


# ---------------------------------------------------------------------- metrics, curves, film


def metric_infos(given: dict[str, Any], trusted: bool = False) -> list[MetricInfo]:
    """What the metrics are; DamagedFile where one is not described."""
    if trusted:
        described = (_metric(key, record) for key, record in given.items())
        return [info for info in described if info is not None]
    if len(given) > MAX_METRICS:
        raise damaged("it has more than a thousand metrics")
    check_names(given, "metric")
    metrics = []
    for key, record in given.items():
        info = _metric(key, record)
        if info is None:
            raise damaged("a metric is not described")
        metrics.append(info)
    return metrics


def _metric(key: str, record: Any) -> MetricInfo | None:
    """A metric as it is described; None if the description cannot be used."""
    if type(record) is not dict or type(record.get("higher_is_better")) is not bool:
        return None
    texts = [record.get(name, "") for name in ("protocol_id", "formula")]
    if not all(type(text) is str for text in texts):
        return None
    return MetricInfo(key, record["higher_is_better"], *map(_shown, texts))


def _measured(key: str, given: list[dict[str, Any]], trusted: bool) -> array[float]:
    """The values of a metric, NaN for an entry without one."""
    values = [measured.get(key, math.nan) for measured in given]
    if trusted:
        values = [value if is_finite(value) else math.nan for value in values]
    elif key in ENTRY_TABLE:
        raise damaged(f"a metric has the name {key}")
    elif not all(value is None or value != value or is_finite(value) for value in values):
        raise damaged(f"a value of {key} is no number")
    return array("d", [math.nan if value is None else value for value in values])


def shares_of(given: dict[str, Any], trusted: bool = False) -> dict[str, list[float]]:
    """The shares of pixels by curve; DamagedFile where they are no numbers."""
    try:
        return {name: list(values) for name, values in _curves(given, trusted).items()}
    except DamagedFile:
        if not trusted:
            raise
        return {}


def read_features(given: Any, photos: int) -> tuple[tuple[int, int], str] | None:
    """Shape and hash of the features of so many ``photos``; None where the manifest tells of none.

    Raises:
        DamagedFile: they are not of these photos.
    """
    if given is None:
        return None
    shape = given.get("shape") if type(given) is dict else None
    if type(shape) is not list or len(shape) != 2 or set(map(type, shape)) != {int}:
        raise damaged("what it says of the features is no shape")
    if shape[0] != photos or not 0 < shape[1] <= MAX_FEATURES:
        raise damaged(f"it has features {str(shape)[:60]} for {photos:,} photos")
    sha256 = check_hash(given.get("sha256"))
    if sha256 is None:
        raise damaged("the features have no hash")
    return (shape[0], shape[1]), sha256


def skipped_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(file name, reason) of the images that were left out; what is no text is passed over."""
    found = manifest.get("skipped")
    records = [r for r in found if type(r) is dict] if type(found) is list else []
    pairs = [(record.get("file_name"), record.get("reason")) for record in records]
    return [(encodable(a), encodable(b)) for a, b in pairs if type(a) is str and type(b) is str]


def _video(manifest: dict[str, Any], trusted: bool) -> str | None:
    if manifest.get("video") is None or trusted:
        return None
    if manifest["video"] != VIDEO:
        raise damaged(f"its film is not {VIDEO}")
    return check_hash(manifest.get("video_sha256")) or ""


# ---------------------------------------------------------------------- checks


def table_of(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    """The table of a manifest's key, empty if it is missing; DamagedFile where it is none."""
    found = manifest.get(key, {})
    if type(found) is not dict:
        raise damaged(f"its {key} are no table")
    return found


def list_of_tables(manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of tables of a manifest's key; DamagedFile where it is none."""
    found = manifest.get(key)
    if type(found) is not list or not set(map(type, found)) <= {dict}:
        raise damaged(f"it lists no {key}")
    return found


def _check_types(values: Iterable[Any], key: str, kinds: set[type]) -> None:
    if not set(map(type, values)) <= kinds:
        raise damaged(f"{key} of an entry has another type")


def check_names(values: Iterable[str], key: str) -> None:
    """Raise a DamagedFile unless all values can be ids."""
    for value in set(values):
        if not value or len(value) > MAX_NAME or "\0" in value or encodable(value) != value:
            raise damaged(f"{key} of an entry is {value[:60]!a}")


def check_hash(value: Any) -> str | None:
    """A SHA-256 or None; DamagedFile for anything else."""
    if value is None:
        return None
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise damaged("a hash is no SHA-256")
    return value


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number that ``float`` can hold."""
    return type(value) in (int, float) and abs(value) < 1e300


def _shown(value: str) -> str:
    return visible(encodable(value))
