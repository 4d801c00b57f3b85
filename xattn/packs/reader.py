"""Packs read back as explanations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.format import MANIFEST, MAPS, THUMBNAIL, read_manifest
from xattn.photos.view import View
from xattn.runtime.tensor_file import TensorFile


def load_pack(folder: str | Path) -> list[Explanation]:
    """The explanations of a pack, in their order; photos come as thumbnails.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a pack, or a damaged one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        maps = TensorFile(lambda: (folder / MAPS).open("rb"))
    except (OSError, ValueError) as error:
        raise _damaged(folder / MAPS, "missing or damaged", error) from None
    try:
        taken: set[str] = set()
        for entry in manifest["entries"]:
            if entry["id"] in taken:  # one map may not stand for a million
                raise ValueError(f"{entry['id']} comes twice")
            taken.add(entry["id"])
        return [_entry(folder, manifest, maps, entry) for entry in manifest["entries"]]
    except _DamagedMaps as error:
        raise _damaged(folder / MAPS, "damaged", error) from None
    except (
        KeyError,
        TypeError,
        IndexError,
        ValueError,
        AttributeError,
        OverflowError,
        OSError,
    ) as error:
        raise _damaged(folder / MANIFEST, "damaged", error) from None


class _DamagedMaps(Exception):
    """The manifest may be right, the file of maps is not."""


def _damaged(path: Path, what: str, error: Exception) -> ValueError:
    spoken = isinstance(error, ValueError | OSError | _DamagedMaps)
    reason = " ".join((str(error) if spoken else f"{type(error).__name__}: {error}").split())
    if len(reason) > 300:
        reason = f"{reason[:200]} ... {reason[-80:]}"
    return ValueError(f"pack: {path} is {what} ({reason}); make the pack again")


def _entry(
    folder: Path, manifest: dict[str, Any], maps: TensorFile, entry: dict[str, Any]
) -> Explanation:
    if maps.shape(entry["id"]) is None:
        raise ValueError(f"{MAPS} has no map {entry['id']}")
    try:
        values = maps.read(entry["id"], entry.get("sha256"))
    except (OSError, ValueError) as error:
        raise _DamagedMaps(error) from None
    if list(values.shape) != entry["shape"]:
        raise ValueError(f"{entry['id']} has shape {list(values.shape)}, not {entry['shape']}")
    thumbnail = entry["thumbnail"]
    if thumbnail is not None and not re.fullmatch(THUMBNAIL, thumbnail):
        raise ValueError(f"thumbnail {thumbnail!r} lies outside the pack")
    source = folder / thumbnail if thumbnail is not None else None
    facts = manifest.get("images", {}).get(entry["image_id"], {})
    return Explanation(
        map=values,
        target=int(entry["target"]),
        target_name=str(entry["target_name"]),
        probability=float(entry["probability"]),
        method=str(entry["method"]),
        view=View.from_json(entry["view"]).check_size(),
        image_id=str(entry["image_id"]),
        protocol=manifest["protocols"][entry["protocol"]],
        file_name=str(entry["file_name"]),
        is_mask=bool(entry["is_mask"]),
        source=source if source is not None and source.is_file() else None,
        facts=ImageFacts.from_json(facts),
        metrics=entry.get("metrics", {}),
        curves=entry.get("curves", {}),
        sanity=bool(entry.get("sanity", False)),
    )
