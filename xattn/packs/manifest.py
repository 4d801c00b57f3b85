"""The manifest of a pack, which describes its columns and files; everything in it is checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xattn.packs.contained_files import AGAIN, PackError
from xattn.packs.format import FORMAT, MANIFEST, SHARD_FILE, VERSION, VIDEO
from xattn.runtime.names import encodable, visible
from xattn.runtime.version import __version__

MAX_NAME = 400  # characters of an id
MAX_CURVE = 100_000  # values
MAX_METRICS = MAX_METHODS = 1000
MAX_SHARDS = 100_000
# Columns of Pack.entries other than metrics, which must have different names.
TABLE_COLUMNS = ("image_id", "method", "target", "target_name", "probability", "is_value", "is_mask",
                 "sanity", "min", "max")  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")


class MetricInfo(NamedTuple):
    """A metric of a pack: ``key`` names the column of ``Pack.entries``."""

    key: str
    higher_is_better: bool
    protocol_id: str
    formula: str
    title: str = ""
    about: str = ""


class DamagedFile(PackError):
    """Raised if the ``file`` of a pack is not as it was written; ``reason`` says what is wrong with it."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(
            f"The file {file} of this pack is damaged: {reason}; copy the pack again, or {AGAIN}"
        )
        self.file, self.reason = file, reason


def damaged_manifest(reason: str) -> DamagedFile:
    """Return the error for a manifest that cannot be used."""
    return DamagedFile(MANIFEST, reason)


class ShardFile(NamedTuple):
    """A file in a shard, with its number of rows or tensors, its size in bytes and its hash."""

    name: str
    rows: int
    size: int
    sha256: str


class Shard(NamedTuple):
    """The files of a shard; it has thumbnails if its photos have pictures, and either all shards have
    features or none do."""

    entries: ShardFile
    images: ShardFile
    maps: ShardFile
    thumbnails: ShardFile | None = None
    features: ShardFile | None = None


@dataclass(eq=False)
class Manifest:
    """The content of a manifest.

    Attributes:
        xattn: the version of xattn that wrote the pack.
        metrics: descriptions of the metrics.
        shares: by curve name, the shares of pixels that the curve's values belong to.
        methods: the methods of the entries and their titles, in order of first appearance.
        skipped: (file name, reason) of each image that was left out.
        video: the hash of the film, or None if there is none.
        entries, images: the total numbers of rows in all shards.
    """

    xattn: str
    metrics: list[MetricInfo]
    shares: dict[str, list[float]]
    methods: dict[str, str]
    skipped: list[tuple[str, str]]
    video: str | None
    entries: int
    images: int
    shards: list[Shard]


def read(manifest: dict[str, Any]) -> Manifest:
    """Return the contents of a parsed manifest after checking them.

    Raises:
        DamagedFile: something is missing, has the wrong type, or is out of range.
    """
    shards = [_shard(record) for record in _tables(manifest, "shards")]
    if not 1 <= len(shards) <= MAX_SHARDS:
        raise damaged_manifest("it lists no shards, or too many of them")
    names = [file.name for shard in shards for file in shard if file is not None]
    if len(set(names)) != len(names):
        raise damaged_manifest("two shards share a file")
    found = Manifest(
        xattn=encodable(str(manifest.get("xattn", "")))[:MAX_NAME],
        metrics=_metrics(_table(manifest, "metrics")),
        shares=curves_of(_table(manifest, "shares")),
        methods=_titles(_table(manifest, "methods")),
        skipped=_skipped(manifest),
        video=None if manifest.get("video") is None else _hash(_table(manifest, "video")),
        entries=_count(manifest, "entries"),
        images=_count(manifest, "images"),
        shards=shards,
    )
    for key in ("entries", "images"):
        if sum(getattr(shard, key).rows for shard in shards) != getattr(found, key):
            raise damaged_manifest(f"its number of {key} is not the sum over its shards")
    return found


def text(
    methods: Mapping[str, str],
    shards: Sequence[Shard],
    metrics: Mapping[str, Mapping[str, Any]],
    shares: Mapping[str, Sequence[float]],
    skipped: Sequence[tuple[str, str]],
    video: str | None = None,
) -> bytes:
    """Return the text of a manifest.

    Args:
        methods: the methods of the entries and their titles, in order of first appearance.
        metrics, shares, skipped: see :class:`~xattn.packs.writer.PackWriter`.
        video: the hash of the film.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "xattn": __version__,
        "entries": sum(shard.entries.rows for shard in shards),
        "images": sum(shard.images.rows for shard in shards),
        "methods": methods,
        "metrics": metrics,
        "shares": shares,
        "video": None if video is None else {"file": VIDEO, "sha256": video},
        "skipped": [{"file_name": name, "reason": why} for name, why in skipped],
        "shards": [
            {
                kind: {
                    "file": file.name,
                    "rows": file.rows,
                    "bytes": file.size,
                    "sha256": file.sha256,
                }
                for kind, file in shard._asdict().items()
                if file is not None
            }
            for shard in shards
        ],
    }
    parts = []
    for key, value in manifest.items():
        rows = key in ("shards", "skipped") and value
        shown = "[\n  " + ",\n  ".join(map(_line, value)) + "\n ]" if rows else _line(value)
        parts.append(f" {_line(key)}: {shown}")
    # A file name that is not UTF-8 has lone surrogates, which JSON can write as \udc80.
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode("utf-8", "backslashreplace")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------------- shards


def _shard(record: dict[str, Any]) -> Shard:
    files = {kind: record.get(kind) for kind in Shard._fields}
    optional = ("thumbnails", "features")
    given = {k: about for k, about in files.items() if k not in optional or about is not None}
    shard = Shard(**{kind: _file(kind, about) for kind, about in given.items()})
    if shard.entries.rows != shard.maps.rows or shard.images.rows > shard.entries.rows:
        raise damaged_manifest("a shard does not have as many maps as rows")
    if shard.features is not None and shard.features.rows != shard.images.rows:
        raise damaged_manifest("a shard does not have features for exactly its photos")
    return shard


def _file(kind: str, record: Any) -> ShardFile:
    if type(record) is not dict or type(record.get("file")) is not str:
        raise damaged_manifest(f"a shard names no file of {kind}")
    name = record["file"]
    if not SHARD_FILE.fullmatch(name) or not name.startswith(f"{kind}-"):
        raise damaged_manifest(f"a shard's {kind} are {name[:60]!a}")
    return ShardFile(name, _count(record, "rows"), _count(record, "bytes"), _hash(record))


# ---------------------------------------------------------------------- metrics, curves


def _metrics(given: dict[str, Any]) -> list[MetricInfo]:
    if len(given) > MAX_METRICS:
        raise damaged_manifest("it has more than a thousand metrics")
    _check_names(given, "metric")
    metrics = []
    for key, record in given.items():
        if type(record) is not dict or type(record.get("higher_is_better")) is not bool:
            raise damaged_manifest("a metric is not described")
        if key in TABLE_COLUMNS:
            raise damaged_manifest(f"a metric has the name {key}")
        texts = [record.get(name, "") for name in MetricInfo._fields[2:]]
        if not all(type(text) is str for text in texts):
            raise damaged_manifest("a metric is not described")
        shown = (visible(encodable(text)) for text in texts)
        metrics.append(MetricInfo(key, record["higher_is_better"], *shown))
    return metrics


def _titles(given: dict[str, Any]) -> dict[str, str]:
    """Methods with their titles."""
    if len(given) > MAX_METHODS or not all(type(title) is str for title in given.values()):
        raise damaged_manifest("its methods are not names with titles")
    _check_names(given, "method")
    return {name: visible(encodable(title))[:MAX_NAME] for name, title in given.items()}


def curves_of(given: dict[str, Any]) -> dict[str, list[float]]:
    """Return curves, or shares of pixels, by name; raise a DamagedFile if they are not finite numbers."""
    for values in given.values():
        # Finite numbers that a float can represent.
        if type(values) is not list or not all(
            type(v) in (int, float) and abs(v) < 1e300 for v in values
        ):
            raise damaged_manifest("the values of a curve are not numbers")
        if len(values) > MAX_CURVE:
            raise damaged_manifest(f"a curve has more than {MAX_CURVE:,} values")
    return {encodable(name): [float(v) for v in values] for name, values in given.items()}


def _skipped(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The skipped images; entries that are not text are ignored."""
    found = manifest.get("skipped")
    records = [r for r in found if type(r) is dict] if type(found) is list else []
    pairs = [(record.get("file_name"), record.get("reason")) for record in records]
    return [(encodable(a), encodable(b)) for a, b in pairs if type(a) is str and type(b) is str]


# ---------------------------------------------------------------------- checks


def _table(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    found = manifest.get(key, {})
    if type(found) is not dict:
        raise damaged_manifest(f"its {key} are not a table")
    return found


def _tables(manifest: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = manifest.get(key)
    if type(found) is not list or not set(map(type, found)) <= {dict}:
        raise damaged_manifest(f"it lists no {key}")
    return found


def _check_names(values: Iterable[str], key: str) -> None:
    for value in values:
        if not value or len(value) > MAX_NAME or "\0" in value or encodable(value) != value:
            raise damaged_manifest(f"{key} of an entry is {value[:60]!a}")


def _count(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if type(value) is not int or not 0 < value < 1 << 48:
        raise damaged_manifest(f"its number of {key} is not valid")
    return value


def _hash(record: dict[str, Any]) -> str:
    value = record.get("sha256")
    if not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise damaged_manifest("a hash is not a SHA-256")
    return value
