"""Packs that a command is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xattn.packs.reader import Pack


def open_packs(folders: Sequence[Path]) -> list[Pack]:
    """The packs in folders or at URLs, also in those of ``xattn compare``.

    Raises:
        ValueError: one of them is no pack, or damaged.
    """
    from xattn.packs.contained_files import PackError
    from xattn.packs.reader import Pack
    from xattn.runtime.stores import place_of

    opened = []
    for folder in folders:
        place = place_of(folder, "packs")
        try:
            place = _pack_of(place)
            opened.append(Pack(place, name=str(place), trusted=True))
        except PackError as error:
            raise ValueError(f"packs: {place} cannot be opened ({error})") from None
    return opened


def _pack_of(place: Any) -> Any:
    """The pack that a folder is, or holds as xattn compare writes it."""
    from xattn.packs.contained_files import folder_of
    from xattn.packs.format import MANIFEST

    if isinstance(place, Path) and not place.is_dir():
        raise ValueError(f"packs: {place} is no folder; give one that xattn explain wrote")
    inside = not folder_of(place).exists(MANIFEST) and folder_of(place / "pack").exists(MANIFEST)
    return place / "pack" if inside else place
