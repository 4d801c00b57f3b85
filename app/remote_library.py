"""Finds the packs and comparisons in a folder of an object store, which is only read.

The store is listed at most once in :data:`FRESH` seconds, and a pack is read again if the listing shows
that its manifest has changed. Heads and jobs are not shown, since they need files on disk.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from xattn.app.library import (
    DEPTH,
    LEADERBOARD,
    Found,
    Library,
    PackInfo,
    Signatures,
    id_of,
)
from xattn.packs.contained_files import PackError, RemoteFolder
from xattn.packs.format import MANIFEST
from xattn.packs.reader import MAX_MANIFEST
from xattn.runtime.files import Signature
from xattn.runtime.names import visible
from xattn.runtime.stores import StoreError, StorePath

FRESH = 20.0  # seconds for which a listing is used
MAX_FOLDERS = 2000
AT_ONCE = 8  # folders or manifests requested at the same time


class RemoteLibrary(Library):
    """A read-only library in an object store."""

    keeps = False

    def __init__(self, root: StorePath) -> None:
        super().__init__(".")
        self.root = root
        self._looking = threading.Lock()
        self._until = 0.0
        self._last = Found()
        self._files: dict[StorePath, dict[str, StorePath]] = {}
        self._problem: str | None = None

    def packs(self) -> list[PackInfo]:
        """All packs, sorted by name; if the store does not respond, the store itself has an entry."""
        found = self._look()
        with ThreadPoolExecutor(AT_ONCE) as pool:  # reads the manifests at the same time
            list(pool.map(lambda item: self._info(item[0], *item[1]), found.packs.items()))
        infos = super().packs()
        if self._problem is not None:
            infos.append(PackInfo("store", visible(str(self.root)), problem=self._problem))
        return infos

    def newest(self) -> list[str]:
        """The ids of all packs, newest first; no pack is read for this."""
        packs = self._look().packs.items()
        found = [
            (-self._files[folder][MANIFEST].modified, pack_id) for pack_id, (folder, _) in packs
        ]
        return [pack_id for _, pack_id in sorted(found)]

    def read(self, comparison_id: str, name: str, limit: int = MAX_MANIFEST) -> bytes:
        return RemoteFolder(self._comparison(comparison_id)).read(name, limit)

    def signature(self, comparison_id: str, name: str) -> Signature:
        file = self._files.get(self._comparison(comparison_id), {}).get(name)
        if file is None:
            raise PackError(f"{name} is missing; upload the comparison again")
        return _signature_of(file)

    def _place(self, pack_id: str) -> tuple[Any, str]:
        if isinstance(pack_id, str) and re.fullmatch(r"scratch-[\w-]{1,112}", pack_id):
            return super()._place(pack_id)
        place = self._look().packs.get(pack_id)
        if place is None:
            raise PackError(self._problem or "There is no such pack; choose one from the list")
        return place

    def _signature(self, folder: Any) -> Signatures:
        if not isinstance(folder, StorePath):
            return super()._signature(folder)
        manifest = self._files.get(folder, {}).get(MANIFEST)
        if manifest is None:
            raise FileNotFoundError(f"no file {folder / MANIFEST}")
        return _signature_of(manifest), None

    def _look(self) -> Found:
        with self._looking:
            if time.monotonic() >= self._until:
                try:
                    self._last, self._files = _found(self.root)
                    self._problem = None
                except (StoreError, FileNotFoundError) as error:
                    self._problem = str(error)  # the earlier listing is still used
                # If the store does not respond, a request can take a minute, so the next one is later.
                wait = FRESH if self._problem is None else 3 * FRESH
                self._until = time.monotonic() + wait
            return self._last


def _found(root: StorePath) -> tuple[Found, dict[StorePath, dict[str, StorePath]]]:
    found, files = Found(), {}
    for folder, names in _walk(root):
        files[folder] = names
        relative = folder.below(root) or "."
        name = root.name if relative == "." else relative
        if relative.endswith("/pack") and LEADERBOARD in files.get(folder.parent, {}):
            name = relative.removesuffix("/pack")
        if MANIFEST in names:
            found.packs[id_of(relative)] = (folder, visible(name))
        if LEADERBOARD in names:
            found.comparisons[id_of(relative)] = (folder, visible(name))
    return found, files


def _walk(root: StorePath) -> Iterator[tuple[StorePath, dict[str, StorePath]]]:
    """Yield ``root`` and its subfolders with their files, parents first; folders in packs are left out."""
    level, seen = [root], 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(DEPTH + 1):
            below = []
            for folder, (files, folders) in zip(
                level, pool.map(StorePath.entries, level), strict=True
            ):
                yield folder, files
                if MANIFEST not in files:
                    below += [folder / name for name in folders]
            seen += len(level)
            level = below[: MAX_FOLDERS - seen]


def _signature_of(file: StorePath) -> Signature:
    return Signature(int(file.modified * 1e9), file.size or 0, hash(file.mark))
