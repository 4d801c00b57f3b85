"""The manifest of a pack as tables; nothing in it is believed before it was checked.

What is kept for every entry lies in columns: ten thousand small objects would be looked through by
every full garbage collection of the process.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from xattn.app.inside import AGAIN, PackError
from xattn.app.visible import visible
from xattn.packs.format import MANIFEST, THUMBNAIL, VIDEO
from xattn.photos.view import View

MAX_NAME = 400  # characters of an id
MAX_CLASS = 1 << 31
MAX_CURVE = 100_000  # values
_COLUMNS: dict[str, set[type]] = {  # of entries, and what a value may be
    "id": {str},
    "image_id": {str},
    "method": {str},
    "target": {int},
    "target_name": {str},
    "probability": {int, float},
    "is_mask": {bool},
    "min": {int, float},
    "max": {int, float},
    "file_name": {str},
    "protocol": {int},
    "view": {dict},
    "shape": {list},
    "thumbnail": {str, type(None)},
}
_OPTIONAL: dict[
    str, tuple[Any, set[type]]
] = {  # not in old packs: what stands for a missing one, and what a value may be
    "sanity": (False, {bool}),
    "metrics": ({}, {dict}),
    "curves": ({}, {dict}),
    "sha256": (None, {str, type(None)}),
}
_SHOWN = {
    "image_id": object,
    "method": object,
    "target": int,
    "target_name": object,
    "probability": float,
    "is_mask": bool,
    "sanity": bool,
    "min": float,
    "max": float,
}
_IMAGE = {
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
Top = tuple[tuple[int, str, float], ...]


class MetricInfo(NamedTuple):
    """A metric of a pack: ``key`` names the column of ``Pack.entries``."""

    key: str
    higher_is_better: bool
    protocol_id: str
    formula: str


@dataclass(eq=False)
class Index:
    """What a manifest says.

    ``images`` and ``entries`` are the tables of :class:`~xattn.app.pack.Pack`. Lists are by row of
    ``entries``: shapes, views, protocol (a number of ``protocols``), sha256, curves; and by row of
    ``images``: thumbnails, thumbnail_sha256, tops. ``video`` is the film's hash, "" where it has
    none, None without a film.
    """

    xattn: str
    protocols: list[dict[str, Any]]
    metrics: list[MetricInfo]
    shares: dict[str, list[float]]
    video: str | None
    entries: pd.DataFrame
    shapes: list[list[int]]
    views: list[View]
    protocol: list[int]
    sha256: list[str | None]
    curves: list[dict[str, array[float]]]
    images: pd.DataFrame
    thumbnails: list[str | None]
    thumbnail_sha256: list[str | None]
    tops: list[Top]


def read_index(manifest: dict[str, Any]) -> Index:
    """The tables of a manifest.

    Raises:
        PackError: something is missing, of another type, out of its range, or outside the pack.
    """
    columns = _checked_columns(manifest)
    protocols = _list_of_tables(manifest, "protocols")
    if not all(0 <= number < len(protocols) for number in columns["protocol"]):
        raise damaged("an entry has a protocol that is not listed")
    metrics = _metrics(_table(manifest, "metrics"))
    images, tops, hashes = _image_table(_table(manifest, "images"), columns, protocols)
    thumbnails = dict.fromkeys(columns["image_id"])
    for image_id, name in zip(columns["image_id"], columns["thumbnail"], strict=True):
        thumbnails[image_id] = thumbnails[image_id] or name
    return Index(
        xattn=_text(str(manifest.get("xattn", "")))[:MAX_NAME],
        protocols=protocols,
        metrics=metrics,
        shares={n: list(v) for n, v in _curves(_table(manifest, "shares")).items()},
        video=_video(manifest),
        entries=_entry_table(columns, metrics),
        shapes=columns["shape"],
        views=_views(columns["view"]),
        protocol=columns["protocol"],
        sha256=columns["sha256"],
        curves=[_curves(given) for given in columns["curves"]],
        images=images,
        thumbnails=list(thumbnails.values()),
        thumbnail_sha256=hashes,
        tops=tops,
    )


def damaged(what: str) -> PackError:
    """A manifest cannot be used."""
    return PackError(f"{MANIFEST} is damaged: {what}; copy the pack again, or {AGAIN}")


# ---------------------------------------------------------------------- entries


def _checked_columns(manifest: dict[str, Any]) -> dict[str, list[Any]]:
    entries = _list_of_tables(manifest, "entries")
    if not entries:
        raise PackError("The pack is empty; explain at least one photo")
    columns = {key: _column(entries, key, kinds) for key, kinds in _COLUMNS.items()}
    for key, (missing, kinds) in _OPTIONAL.items():
        columns[key] = [entry.get(key, missing) for entry in entries]
        _check_types(columns[key], key, kinds)
    for key in ("id", "image_id", "method"):
        _check_names(columns[key], key)
    if len(set(columns["id"])) < len(entries):
        raise damaged("an id comes twice")
    for key in ("file_name", "target_name"):
        columns[key] = [_shown(value) for value in columns[key]]
    if not all(0 <= value <= 1 for value in columns["probability"]):
        raise damaged("a probability is not in 0..1")
    if not all(0 <= value < MAX_CLASS for value in columns["target"]):
        raise damaged("a target is no class")
    for key in ("min", "max"):
        if not all(map(_is_finite, columns[key])):
            raise damaged(f"a {key} is not finite")
    for name in columns["thumbnail"]:
        if name is not None and not re.fullmatch(THUMBNAIL, name):
            raise damaged(f"the thumbnail {name[:60]!r} lies outside the pack")
    for value in columns["sha256"]:
        _check_hash(value)
    return columns


def _column(entries: Sequence[dict[str, Any]], key: str, kinds: set[type]) -> list[Any]:
    try:
        values = [entry[key] for entry in entries]
    except KeyError:
        raise damaged(f"an entry has no {key}") from None
    _check_types(values, key, kinds)
    return values


def _entry_table(columns: dict[str, list[Any]], metrics: Sequence[MetricInfo]) -> pd.DataFrame:
    index = pd.Index(columns["id"], dtype=object, name="entry_id")
    table = {key: pd.Series(columns[key], index, dtype=kind) for key, kind in _SHOWN.items()}
    for metric in metrics:
        if metric.key in table:
            raise damaged(f"a metric has the name {metric.key}")
        values = [given.get(metric.key) for given in columns["metrics"]]
        if not all(v is None or _is_finite(v) for v in values):
            raise damaged(f"a value of {metric.key} is no number")
        table[metric.key] = pd.Series(values, index, dtype=float)
    return pd.DataFrame(table)


def _views(given: list[dict[str, Any]]) -> list[View]:
    """Equal views are one object: a pack has few."""
    known: dict[str, View] = {}
    views = []
    for record in given:
        key = repr(record)
        if key not in known:
            known[key] = _view(record)
        views.append(known[key])
    return views


def _view(record: dict[str, Any]) -> View:
    try:
        view = View.from_json(record)
    except (ValueError, OverflowError):
        raise damaged("an entry's view is no view") from None
    try:
        return view.check_size()
    except ValueError:
        raise damaged("an entry's view has more than a million pixels a side") from None


def _curves(given: dict[str, Any]) -> dict[str, array[float]]:
    """Arrays, as the garbage collector does not look into them."""
    try:
        if not all(type(values) is list for values in given.values()):
            raise TypeError
        if any(len(values) > MAX_CURVE for values in given.values()):
            raise damaged(f"a curve has more than {MAX_CURVE:,} values")
        return {name: array("d", values) for name, values in given.items()}
    except (TypeError, OverflowError):
        raise damaged("an entry's curves are no numbers") from None


# ---------------------------------------------------------------------- images


def _image_table(
    given: dict[str, Any], columns: dict[str, list[Any]], protocols: list[dict[str, Any]]
) -> tuple[pd.DataFrame, list[Top], list[str | None]]:
    groups: dict[str, list[int]] = {}
    for i, image_id in enumerate(columns["image_id"]):
        groups.setdefault(image_id, []).append(i)
    from_top = [protocol.get("classes") == "top" for protocol in protocols]
    rows, tops, hashes = [], [], []
    for image_id, group in groups.items():
        record = given.get(image_id, {})
        if type(record) is not dict:
            raise damaged("what it says of an image is no table")
        top = _top(record.get("top", []))
        best = top[0] if top else _best(group, columns, from_top)
        predicted, predicted_name, confidence = best or (None, None, math.nan)
        label, label_name = _label(record)
        disagreement = record.get("disagreement")
        if disagreement is not None and not _is_finite(disagreement):
            raise damaged("a disagreement is no number")
        right = None if label is None or predicted is None else label == predicted
        methods = len({columns["method"][i] for i in group}) if len(group) > 1 else 1
        file_name = columns["file_name"][group[0]]
        about = (label, label_name, predicted, predicted_name, confidence, right)
        title = _title(image_id, file_name, protocols[columns["protocol"][group[0]]])
        rows.append((file_name, title, *about, disagreement, methods))
        tops.append(top)
        hashes.append(_check_hash(record.get("thumbnail_sha256")))
    index = pd.Index(list(groups), dtype=object, name="image_id")
    each = zip(_IMAGE.items(), zip(*rows, strict=True), strict=True)
    table = {key: pd.Series(values, index, dtype=kind) for (key, kind), values in each}
    return pd.DataFrame(table), tops, hashes


def _title(image_id: str, file_name: str, protocol: dict[str, Any]) -> str:
    """What a person calls an image: its file; of a frame also its number and time, as a player shows it."""
    name = file_name or image_id
    video: Any = protocol.get("video")
    frame = re.fullmatch(r"frame-([0-9]{6,15})", image_id)
    if frame is None or type(video) is not dict:
        return name
    number = int(frame[1])
    fps: Any = video.get("fps")
    title = f"{name}, frame {number:,}"
    if not _is_finite(fps) or not 0.001 <= fps <= 1000:
        return title
    minutes, hundredths = divmod(round(100 * number / fps), 6000)
    hours, left = divmod(minutes, 60)
    clock = f"{hours:,}:{left:02}" if hours else f"{minutes}"
    return f"{title}, {clock}:{hundredths / 100:05.2f}"


def _best(
    group: list[int], columns: dict[str, list[Any]], from_top: list[bool]
) -> tuple[int, str, float] | None:
    """The predicted class of an old pack: the most probable of the top classes that it explains."""
    top = [i for i in group if from_top[columns["protocol"][i]]]
    if not top:
        return None
    i = max(top, key=lambda i: columns["probability"][i])
    return columns["target"][i], columns["target_name"][i], float(columns["probability"][i])


def _top(given: Any) -> Top:
    if type(given) is not list or len(given) > 1000:
        raise damaged("an image's top classes are no list")
    top = []
    for item in given:
        kinds = [type(v) for v in item] if type(item) is list else []
        if kinds not in ([int, str, float], [int, str, int]) or not 0 <= item[2] <= 1:
            raise damaged("an image's top classes are not [class, name, probability]")
        if not 0 <= item[0] < MAX_CLASS:
            raise damaged("an image's top class is no class")
        top.append((item[0], _shown(item[1]), float(item[2])))
    return tuple(top)


def _label(record: dict[str, Any]) -> tuple[int | None, str | None]:
    label, name = record.get("label"), record.get("label_name")
    if label is not None and (type(label) is not int or not 0 <= label < MAX_CLASS):
        raise damaged("a label is no class")
    if name is not None and not isinstance(name, str):
        raise damaged("the name of a label is no text")
    return label, None if name is None else _shown(name)


# ---------------------------------------------------------------------- the rest


def _metrics(given: dict[str, Any]) -> list[MetricInfo]:
    if len(given) > 1000:
        raise damaged("it has more than a thousand metrics")
    _check_names(given, "metric")
    metrics = []
    for key, record in given.items():
        if type(record) is not dict or type(record.get("higher_is_better")) is not bool:
            raise damaged("a metric is not described")
        texts = [record.get(name, "") for name in ("protocol_id", "formula")]
        _check_types(texts, "description of a metric", {str})
        metrics.append(MetricInfo(key, record["higher_is_better"], *map(_shown, texts)))
    return metrics


def _video(manifest: dict[str, Any]) -> str | None:
    if manifest.get("video") is None:
        return None
    if manifest["video"] != VIDEO:
        raise damaged(f"its film is not {VIDEO}")
    return _check_hash(manifest.get("video_sha256")) or ""


def _table(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    found = manifest.get(key, {})
    if type(found) is not dict:
        raise damaged(f"its {key} are no table")
    return found


def _list_of_tables(manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = manifest.get(key)
    if type(found) is not list or not set(map(type, found)) <= {dict}:
        raise damaged(f"it lists no {key}")
    return found


def _check_types(values: Iterable[Any], key: str, kinds: set[type]) -> None:
    if not set(map(type, values)) <= kinds:
        raise damaged(f"{key} of an entry has another type")


def _check_names(values: Iterable[str], key: str) -> None:
    for value in set(values):
        if not value or len(value) > MAX_NAME or "\0" in value or _text(value) != value:
            raise damaged(f"{key} of an entry is {value[:60]!a}")


def _check_hash(value: Any) -> str | None:
    if value is None:
        return None
    if not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
        raise damaged("a hash is no SHA-256")
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # also what float() can hold


def _shown(value: str) -> str:
    return visible(_text(value))


def _text(value: str) -> str:
    """Without the half characters that JSON can write and nothing can send."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
