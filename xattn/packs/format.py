"""The files of a pack.

manifest.json                metrics, counts, the files of each shard with their hashes
entries-00000.parquet        one row per map, photo by photo
images-00000.parquet         one row per photo
maps-00000.safetensors       every map, float32 (h, w), by entry_id
thumbnails-00000.safetensors JPEG files as uint8 (n,), by image_id
features-00000.safetensors   the classifier's input for each photo, float16 (M, d), if requested
overlays/, overlay.mp4       pictures of the maps over the photos, and the film of a clip
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from xattn.runtime import strict_json

FORMAT, VERSION = "xattn-pack", 1
MANIFEST, VIDEO, OVERLAYS = "manifest.json", "overlay.mp4", "overlays"
MAPS = "maps-00000.safetensors"  # in the first shard
SHARD_FILE = re.compile(
    r"(?:entries|images)-[0-9]{5,9}\.parquet|(?:maps|thumbnails|features)-[0-9]{5,9}\.safetensors"
)
SHARD_PHOTOS, SHARD_BYTES = 4096, 64 << 20  # limits after which a new shard begins
THUMBNAIL_SIDE, OVERLAY_SIDE = 512, 2048  # longest side in pixels


class LaterVersion(ValueError):
    """Raised for a pack that needs a later version of xattn."""


def shard_file(kind: str, number: int) -> str:
    """Return the name of a file of shard ``number``.

    >>> shard_file("maps", 12)
    'maps-00012.safetensors'
    """
    ending = "parquet" if kind in ("entries", "images") else "safetensors"
    return f"{kind}-{number:05}.{ending}"


def is_pack_file(name: str) -> bool:
    """Return whether a pack's writer may replace a file of this name in its folder; all other files belong
    to the user."""
    return name in (MANIFEST, VIDEO, OVERLAYS) or SHARD_FILE.fullmatch(name) is not None


def interrupted_output(folder: str | Path) -> Path:
    """Return the folder for the pack of an interrupted run: ``folder``, or an unused name beside it if it
    already contains a pack."""
    folder, number = Path(folder), 1
    place = folder
    while (place / MANIFEST).exists():
        place = folder.with_name(f"{folder.name}-interrupted{f'-{number}' * (number > 1)}")
        number += 1
    return place


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read the ``manifest.json`` of a pack and check that its version is supported.

    Raises:
        FileNotFoundError: the folder does not exist. ValueError: it is not a pack, is damaged, or has a
            later version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"pack: there is no folder {folder}; give one that save_pack wrote")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise unreadable_manifest(str(folder), error) from None
    return parse_manifest(data, str(folder))


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """Return the content of a ``manifest.json`` after checking it; ``name`` is the pack's name, for
    errors.

    Raises:
        ValueError: it does not describe a pack, is damaged, or has a later version.
    """
    try:
        manifest = strict_json.parse(data)
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable_manifest(name, error) from None
    if found != FORMAT or type(version) is not int or version < 1:
        raise ValueError(
            f"pack: {MANIFEST} of {name} does not belong to a pack; its format is {found!r:.60}"
        )
    if version > VERSION:
        shown = version if version < 1e9 else "of many digits"
        raise LaterVersion(
            f"pack: {name} has format version {shown}, but this xattn reads "
            f"only up to {VERSION}; upgrade xattn"
        )
    return manifest  # type: ignore[no-any-return]


def unreadable_manifest(name: str, error: Exception) -> ValueError:
    """Return the error for a pack, called ``name``, whose manifest cannot be read or parsed."""
    return ValueError(
        f"pack: {name} has no readable {MANIFEST} ({type(error).__name__}); give a folder that "
        "save_pack wrote"
    )


def is_pack(folder: Path) -> bool:
    """Return whether a folder is a pack, perhaps of a later version."""
    try:
        read_manifest(folder)
    except LaterVersion:
        return True
    except ValueError:
        return False
    return True
