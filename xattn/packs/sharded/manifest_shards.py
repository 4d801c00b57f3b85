"""The manifest of format 2, checked: what the pack's columns mean, and which files it has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xattn.packs.format import FORMAT, SHARD_FILE
from xattn.packs.manifest import (
    MAX_NAME,
    MetricInfo,
    check_hash,
    check_names,
    damaged,
    list_of_tables,
    metric_infos,
    shares_of,
    table_of,
    view_of,
)
from xattn.photos.view import View
from xattn.runtime.names import encodable
from xattn.runtime.version import __version__

MAX_SHARDS = 100_000
MAX_CURVES = 100  # names
MAX_METHODS = 1000


class ShardFile(NamedTuple):
    """A file of a shard, its rows or tensors, its size in bytes and its hash."""

    name: str
    rows: int
    size: int
    sha256: str


class Shard(NamedTuple):
    """The files of a shard; thumbnails where its photos have pictures, features in all shards or none."""

    entries: ShardFile
    images: ShardFile
    maps: ShardFile
    thumbnails: ShardFile | None
    features: ShardFile | None


@dataclass(eq=False)
class ShardManifest:
    """What a manifest of version 2 says; ``views`` become views when they are asked for.

    ``entries`` and ``images`` are the numbers of rows of all shards.
    """

    xattn: str
    protocols: list[dict[str, Any]]
    views: list[dict[str, Any]]
    metrics: list[MetricInfo]
    curves: list[str]
    shares: dict[str, list[float]]
    methods: list[str]
    entries: int
    images: int
    shards: list[Shard]

    def view(self, number: int) -> View:
        """A view by its number; DamagedFile where it is none."""
        return view_of(self.views[number])


def read_shards(manifest: dict[str, Any]) -> ShardManifest:
    """The checked contents of a parsed manifest of version 2.

    Raises:
        DamagedFile: something is missing, of another type, or out of its range.
    """
    shards = [_shard(record) for record in list_of_tables(manifest, "shards")]
    if not 1 <= len(shards) <= MAX_SHARDS:
        raise damaged("it lists no shards, or too many")
    names = [file.name for shard in shards for file in shard if file is not None]
    if len(set(names)) != len(names):
        raise damaged("two shards have one file")
    metrics = metric_infos(table_of(manifest, "metrics"))
    found = ShardManifest(
        xattn=encodable(str(manifest.get("xattn", "")))[:MAX_NAME],
        protocols=list_of_tables(manifest, "protocols"),
        views=list_of_tables(manifest, "views"),
        metrics=metrics,
        curves=_names(manifest, "curves", MAX_CURVES),
        shares=shares_of(table_of(manifest, "shares")),
        methods=_names(manifest, "methods", MAX_METHODS),
        entries=_count(manifest, "entries"),
        images=_count(manifest, "images"),
        shards=shards,
    )
    for key, files in (
        ("entries", [s.entries for s in shards]),
        ("images", [s.images for s in shards]),
    ):
        if sum(file.rows for file in files) != getattr(found, key):
            raise damaged(f"its {key} are not as many as those of its shards")
    return found


def manifest_bytes(
    names: Mapping[str, Sequence[str]],
    shards: Sequence[Mapping[str, ShardFile]],
    metrics: Mapping[str, Mapping[str, Any]],
    shares: Mapping[str, Sequence[float]],
    skipped: Sequence[tuple[str, str]],
) -> bytes:
    """The file of a manifest.

    Args:
        names: "methods", "metrics", "curves", and as JSON "protocols" and "views", in their order.
        shards: the files of each, by "entries", "images", "maps" and, if there are some, "thumbnails"
            and "features".
        metrics, shares, skipped: see :class:`~xattn.packs.sharded.shard_writer.ShardWriter`.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": 2,
        "xattn": __version__,
        "entries": sum(files["entries"].rows for files in shards),
        "images": sum(files["images"].rows for files in shards),
        "methods": names["methods"],
        "metrics": {key: metrics.get(key, {"higher_is_better": True}) for key in names["metrics"]},
        "curves": names["curves"],
        "shares": shares,
        "skipped": [{"file_name": name, "reason": why} for name, why in skipped],
        "protocols": [json.loads(text) for text in names["protocols"]],
        "views": [json.loads(text) for text in names["views"]],
        "shards": [_shard_record(files) for files in shards],
    }
    parts = []
    for key, value in manifest.items():
        rows = key in ("protocols", "views", "shards", "skipped") and value
        text = "[\n  " + ",\n  ".join(map(_line, value)) + "\n ]" if rows else _line(value)
        parts.append(f" {_line(key)}: {text}")
    # A file name that is no UTF-8 has half characters, which JSON can write as \udc80.
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode("utf-8", "backslashreplace")


def _shard_record(files: Mapping[str, ShardFile]) -> dict[str, Any]:
    return {
        kind: {"file": file.name, "rows": file.rows, "bytes": file.size, "sha256": file.sha256}
        for kind in Shard._fields
        if (file := files.get(kind)) is not None
    }


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _shard(record: dict[str, Any]) -> Shard:
    files = {kind: record.get(kind) for kind in Shard._fields}
    optional = dict.fromkeys(("thumbnails", "features"))
    given = {k: about for k, about in files.items() if k not in optional or about is not None}
    shard = {kind: _file(kind, about) for kind, about in given.items()}
    if (
        shard["entries"].rows != shard["maps"].rows
        or not shard["images"].rows <= shard["entries"].rows
    ):
        raise damaged("a shard has another number of maps than rows")
    if "features" in shard and shard["features"].rows != shard["images"].rows:
        raise damaged("a shard has features of another number of photos")
    return Shard(**{**optional, **shard})  # type: ignore[arg-type]


def _file(kind: str, record: Any) -> ShardFile:
    if type(record) is not dict or type(record.get("file")) is not str:
        raise damaged(f"a shard names no file of {kind}")
    name = record["file"]
    if not SHARD_FILE.fullmatch(name) or not name.startswith(f"{kind}-"):
        raise damaged(f"a shard's {kind} are {name[:60]!a}")
    rows, size = (_count(record, key) for key in ("rows", "bytes"))
    return ShardFile(name, rows, size, check_hash(record.get("sha256")) or "")


def _count(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if type(value) is not int or not 0 < value < 1 << 48:
        raise damaged(f"its {key} are no number of things")
    return value


def _names(manifest: dict[str, Any], key: str, most: int) -> list[str]:
    names = manifest.get(key, [])
    if type(names) is not list or len(names) > most or not all(type(n) is str for n in names):
        raise damaged(f"its {key} are no names")
    check_names(names, key)
    if len(set(names)) != len(names):
        raise damaged(f"one of its {key} comes twice")
    return names
