"""The files of a pack, its manifest, and where a pack may be written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from xattn.runtime import strict_json
from xattn.runtime.files import follow_link, output_error, temporary_folder
from xattn.runtime.stores import is_remote, place_of

FORMAT, VERSION, LATEST = "xattn-pack", 1, 2
MANIFEST, MAPS, VIDEO = "manifest.json", "maps.safetensors", "overlay.mp4"
FIRST_MAPS = "maps-00000.safetensors"  # of a pack of format 2
FEATURES = "features.safetensors"
THUMBNAIL = r"thumbnails/[^/\\\0]+\.jpg"  # what a thumbnail may be named
SHARD_FILE = re.compile(
    r"(?:entries|images)-[0-9]{5,9}\.parquet|(?:maps|thumbnails|features)-[0-9]{5,9}\.safetensors"
)
_OWNED = (MANIFEST, MAPS, FEATURES, VIDEO, "thumbnails", "overlays")
SHARD_PHOTOS, SHARD_MAPS = 4096, 1 << 16  # the most photos and maps of a shard of format 2
THUMBNAIL_SIDE, OVERLAY_SIDE = 512, 2048  # longest side in pixels


class LaterVersion(ValueError):
    """A pack that this xattn cannot read, and a later one can."""


def check_output(folder: str | Path) -> Path:
    """Refuse ``folder`` now rather than after the work.

    Raises:
        ValueError: it is a file, a link that leads nowhere, or a folder with other things in it than
            a pack.
        OSError: nothing can be written there.
    """
    if is_remote(folder, "output"):
        raise ValueError(
            f"output: got {place_of(folder)}; write the pack to a local folder, then copy it there, or use "
            f"xattn explain --output"
        )
    folder = follow_link(folder)
    if folder.is_dir() and any(folder.iterdir()) and not is_pack(folder):
        raise ValueError(
            f"output: {folder} is not empty and is not a pack of xattn; choose a new folder, "
            f"nothing was overwritten"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is a file; name a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder):
            pass
    except OSError as error:
        raise output_error("output", folder, error) from error
    return folder


def is_pack_file(name: str) -> bool:
    """Whether a pack's writer replaces what has this name in its folder; all else is the user's."""
    return name in _OWNED or SHARD_FILE.fullmatch(name) is not None


def owned_files(folder: Path) -> list[str]:
    """The names in a pack that its writer replaces, of both formats; all else is the user's."""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return [*_OWNED, *(name for name in names if SHARD_FILE.fullmatch(name))]


def interrupted_output(folder: str | Path) -> Path:
    """Where the pack of a run that was stopped goes: ``folder``, or beside a pack that is there."""
    folder = Path(folder)
    whole = (folder / MANIFEST).exists()
    return folder.with_name(f"{folder.name}-interrupted") if whole else folder


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The checked ``manifest.json`` of a pack.

    Raises:
        FileNotFoundError: no such folder. ValueError: not a pack, damaged, or of a later version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"pack: no folder {folder}; give one that save_pack wrote")
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise unreadable_manifest(str(folder), error) from None
    return parse_manifest(data, str(folder))


def parse_manifest(data: bytes, name: str) -> dict[str, Any]:
    """The bytes of a ``manifest.json``, checked; ``name`` is of the pack, for errors.

    Raises:
        ValueError: not of a pack, damaged, or of a later version.
    """
    try:
        manifest = strict_json.parse(data)
        found, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable_manifest(name, error) from None
    if found != FORMAT or type(version) is not int or version < 1:
        raise ValueError(
            f"pack: {MANIFEST} of {name} is not of a pack; it says format {found!r:.60}"
        )
    if version > LATEST:
        raise LaterVersion(
            f"pack: {name} has format version {version}, this xattn reads up to {LATEST}; "
            f"upgrade xattn"
        )
    return manifest  # type: ignore[no-any-return]


def unreadable_manifest(name: str, error: Exception) -> ValueError:
    """The error of a pack, called ``name``, whose manifest cannot be read or parsed."""
    return ValueError(
        f"pack: {name} holds no readable {MANIFEST} ({type(error).__name__}); "
        f"give a folder that save_pack wrote"
    )


def photos_of_a_shard(maps: int) -> int:
    """How many photos a shard holds, of photos with so many ``maps`` each."""
    return max(1, min(SHARD_PHOTOS, SHARD_MAPS // max(1, maps)))


def needs_pyarrow(argument: str, error: ModuleNotFoundError) -> str:
    """What to say where a module of format 2 cannot be imported."""
    return (
        f"{argument}: a pack of format 2 needs {error.name}, which is not installed; "
        f'run: pip install "xattn[app]"'
    )


def is_pack(folder: Path) -> bool:
    """Whether a folder is a pack, perhaps of a later version."""
    try:
        read_manifest(folder)
    except LaterVersion:
        return True
    except ValueError:
        return False
    return True
