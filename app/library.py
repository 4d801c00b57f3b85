"""Finds the packs, comparisons, boards and heads in a folder and its subfolders, each with an id that is
not a path.

The folders are searched again for every query, which takes little time. A pack is read again only if its
stat signature (time, size, inode) has changed. Links to places outside the folder are not followed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xattn.packs.contained_files import LocalFolder, PackError, open_inside
from xattn.packs.format import MANIFEST, MAPS
from xattn.packs.reader import MAX_MANIFEST, RECENT_MAPS, NotAPack, Pack
from xattn.runtime.files import Signature
from xattn.runtime.head_files import CONFIG_FILE
from xattn.runtime.lru_cache import LRUCache
from xattn.runtime.names import visible

LEADERBOARD = "leaderboard.json"
BOARD = "board.json"
JOBS = "jobs"  # the folder in the root that contains all jobs
NAME = r"[^\W_][\w .+-]{0,79}"  # folder names that users may give
DEPTH = 3  # number of levels of subfolders that are searched
MAX_FOLDERS = 20_000
OPEN_PACKS = 8
PASSING_PACKS = 4
SCRATCH_PACKS = 64
Signatures = tuple[Signature, Signature | None]


@dataclass(frozen=True)
class PackInfo:
    """An entry in the list of packs; ``problem`` is the reason why the pack cannot be opened, or None."""

    id: str
    name: str
    entries: int = 0
    images: int = 0
    methods: tuple[str, ...] = ()
    """The titles of the methods."""
    problem: str | None = None
    modified: float = 0.0
    """The time at which its manifest was written, in Unix seconds."""
    version: str = ""
    photo: str = ""
    """The id of its first photo."""


@dataclass(frozen=True)
class ComparisonInfo:
    """A folder written by ``xattn compare``; ``pack_id`` is the pack inside it, or None."""

    id: str
    name: str
    pack_id: str | None = None
    folder: Any = field(default=Path(), repr=False)


@dataclass(frozen=True)
class HeadInfo:
    """A folder written by ``save_head``."""

    id: str
    name: str
    folder: Path = field(default=Path(), repr=False)


@dataclass
class Found:
    """The result of one search: the paths and names of the folders by id.

    ``outside`` contains the names of packs that are links to places outside the root.
    """

    packs: dict[str, tuple[Any, str]] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    comparisons: dict[str, tuple[Any, str]] = field(default_factory=dict)
    boards: dict[str, tuple[Path, str]] = field(default_factory=dict)
    heads: dict[str, tuple[Path, str]] = field(default_factory=dict)


class Library:
    """The packs, comparisons, boards and heads in ``root`` and its subfolders.

    All threads of a process share one library.

    Attributes:
        root: the folder; for :class:`~xattn.app.remote_library.RemoteLibrary`, a folder in a store.
        keeps: whether results can be saved in the root.
    """

    root: Any
    keeps = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self._lock = threading.Lock()
        self._maps = LRUCache(RECENT_MAPS)
        self._open, self._passing = LRUCache(OPEN_PACKS), LRUCache(PASSING_PACKS)
        self._opening: dict[str, threading.Lock] = {}
        self._infos: dict[str, tuple[Signatures, PackInfo | None]] = {}
        self._known: dict[str, tuple[Path, str]] = {}
        self._scratch = LRUCache(SCRATCH_PACKS)

    def packs(self) -> list[PackInfo]:
        """All packs, sorted by name, including those that cannot be opened."""
        found = self._look()
        infos = [
            PackInfo(pack_id, name, problem=self._leads_out(name))
            for pack_id, name in found.outside.items()
        ]
        for pack_id, (folder, name) in found.packs.items():
            info = self._info(pack_id, folder, name)
            if info is not None:
                infos.append(info)
        with self._lock:
            self._infos = {k: v for k, v in self._infos.items() if k in found.packs}
        return sorted(infos, key=_order)

    def newest(self) -> list[str]:
        """The ids of all packs, newest first; no pack is read for this."""
        found = []
        for pack_id, (folder, _) in self._look().packs.items():
            with contextlib.suppress(OSError):  # it may just have been deleted
                found.append((-(folder / MANIFEST).stat().st_mtime, pack_id))
        return [pack_id for _, pack_id in sorted(found)]

    def open(self, pack_id: str, passing: bool = False) -> Pack:
        """Open the pack with this id; it is read again if its manifest has changed.

        Args:
            passing: whether the pack is only needed briefly, such as for a picture in the list of packs. It
                then does not replace opened packs in the cache.

        Raises:
            PackError: there is no such pack, or it cannot be read.
        """
        folder, name = self._place(pack_id)
        try:
            return self._opened(pack_id, folder, name, passing)
        except PackError as error:
            raise PackError(f"The pack {name} cannot be shown. {error}") from None

    def add_scratch(self, folder: str | Path) -> str:
        """Add a pack outside the root; return its id, which cannot be guessed and is not in any list."""
        pack_id = f"scratch-{secrets.token_hex(24)}"  # the key of a component must not contain "__"
        self._scratch.put(pack_id, Path(folder).resolve(), 1)
        return pack_id

    def comparisons(self) -> list[ComparisonInfo]:
        """The folders written by ``xattn compare``, sorted by name."""
        found = self._look()
        packs = {folder: pack_id for pack_id, (folder, _) in found.packs.items()}
        infos = (
            ComparisonInfo(id, name, packs.get(folder / "pack"), folder)
            for id, (folder, name) in found.comparisons.items()
        )
        return sorted(infos, key=_order)

    def boards(self) -> dict[str, tuple[Path, str]]:
        """The folder and name of each board that ``xattn board`` made, by id, sorted by name."""
        return dict(sorted(self._look().boards.items(), key=lambda item: item[1][1].casefold()))

    def heads(self) -> list[HeadInfo]:
        """The folders of heads, sorted by name."""
        found = self._look().heads.items()
        infos = (HeadInfo(id, name, folder) for id, (folder, name) in found)
        return sorted(infos, key=_order)

    def read(self, comparison_id: str, name: str, limit: int = MAX_MANIFEST) -> bytes:
        """Read a file of the comparison with this id.

        Raises:
            PackError: there is no such comparison or file, or the file is outside the comparison.
        """
        return LocalFolder(self._comparison(comparison_id)).read(name, limit)

    def signature(self, comparison_id: str, name: str) -> Signature:
        """The stat signature of the file that :meth:`read` reads, which shows whether the file has changed.

        Raises:
            PackError: there is no such comparison or file, or the file is outside the comparison.
        """
        with open_inside(self._comparison(comparison_id), name) as stream:
            return Signature.of(os.fstat(stream.fileno()))

    def _comparison(self, comparison_id: str) -> Any:
        found = self._look().comparisons
        if comparison_id not in found:
            raise PackError("There is no such comparison; choose one from the list")
        return found[comparison_id][0]

    def new_folder(self, name: str) -> Path:
        """The path of a new folder ``name`` in the root, for results that the user saves.

        Raises:
            ValueError: the name is invalid or taken, or the root is read-only.
        """
        name = name.strip()
        if not re.fullmatch(NAME, name) or name.endswith("."):
            raise ValueError(
                "Give a name of letters, digits, spaces, dots and dashes; it is used as a folder name."
            )
        if name.casefold() == JOBS:
            raise ValueError(
                f"The folder {JOBS} is reserved for training jobs; choose another name."
            )
        if not self.keeps:
            raise ValueError(
                f"This viewer shows {self.root}, to which it cannot write. To keep results, start "
                "xattn app on a local folder."
            )
        if os.path.lexists(self.root / name):
            raise ValueError(
                f"There is already a folder {name!r}; choose another name. Nothing was overwritten."
            )
        return Path(self.root / name)

    # ------------------------------------------------------------------ searching

    def _place(self, pack_id: str) -> tuple[Path, str]:
        unknown = PackError("There is no such pack; choose one from the list")
        if not isinstance(pack_id, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,120}", pack_id):
            raise unknown
        if (scratch := self._scratch.get(pack_id)) is not None:
            return scratch, "live result"
        place = self._known.get(pack_id)
        if place is None or place[0].resolve() != place[0]:
            found = self._look()
            if pack_id in found.outside:
                raise PackError(self._leads_out(found.outside[pack_id]))
            place = found.packs.get(pack_id)
        if place is None:
            raise unknown
        return place

    def _leads_out(self, name: str) -> str:
        return (
            f"{name} is a link that leads out of {self.root.name}; copy the pack there, or start the "
            f"viewer on its own folder"
        )

    def _opened(self, pack_id: str, folder: Any, name: str, passing: bool = False) -> Pack:
        with self._lock:
            opening = self._opening.setdefault(pack_id, threading.Lock())
        with opening:  # a second caller waits, and then uses the pack that the first has read
            try:
                signature = self._signature(folder)
            except OSError:
                raise PackError("It is gone; choose another one, or put it back") from None
            known = self._open.get(pack_id)
            kept = self._passing if passing and known is None else self._open
            known = known or self._passing.get(pack_id)
            pack: Pack | None = None if known is None or known[0] != signature else known[1]
            if pack is None or pack.files.address != str(folder):
                pack = Pack(folder, pack_id, name, self._maps)
            kept.put(pack_id, (signature, pack), 1)
        return pack

    def _signature(self, folder: Any) -> Signatures:
        """The signatures of the manifest and of the maps, which is None if there are no maps.

        Raises:
            OSError: there is no manifest.
        """
        manifest = Signature.of((folder / MANIFEST).stat())
        try:
            return manifest, Signature.of((folder / MAPS).stat())
        except OSError:
            return manifest, None

    def _info(self, pack_id: str, folder: Any, name: str) -> PackInfo | None:
        """The entry of a pack in the list; None if the manifest in the folder is not that of a pack."""
        try:
            signature = self._signature(folder)
        except OSError:
            return None  # it has just been deleted
        with self._lock:
            known = self._infos.get(pack_id)
        if known is not None and known[0] == signature:
            return known[1]
        info: PackInfo | None
        try:
            pack = self._opened(pack_id, folder, name, passing=True)
            info = PackInfo(
                pack_id,
                name,
                *pack.counts,
                tuple(map(pack.title_of, pack.methods)),
                modified=signature[0].mtime_ns / 1e9,
                version=pack.version,
                photo=pack.key(pack.first_entry)[0],
            )
        except NotAPack as error:  # without maps, manifest.json probably belongs to another program
            damaged = (folder / MAPS).exists()
            info = PackInfo(pack_id, name, problem=str(error)) if damaged else None
        except PackError as error:
            info = PackInfo(pack_id, name, problem=str(error))
        with self._lock:
            self._infos[pack_id] = (signature, info)
        return info

    def _is_head(self, folder: Path, names: set[str]) -> bool:
        """Whether the folder contains a head's weights, and none of its files is outside the root."""
        files = [n for n in names if n.endswith(".safetensors") or n == CONFIG_FILE]
        inside = all((folder / n).resolve().is_relative_to(self.root) for n in files)
        return len(files) > 1 and inside

    def _look(self) -> Found:
        found = Found()
        for folder, real, names in _walk(self.root):
            relative = folder.relative_to(self.root).as_posix()
            name = self.root.name if relative == "." else relative
            if relative.endswith("/pack") and (folder.parent / LEADERBOARD).is_file():
                name = relative.removesuffix("/pack")
            id, name = id_of(relative), visible(name)
            if not real.is_relative_to(self.root):
                if (real / MANIFEST).exists():
                    found.outside[id] = name
                continue
            if MANIFEST in names:
                found.packs[id] = (real, name)
            if LEADERBOARD in names:
                found.comparisons[id] = (real, name)
            if BOARD in names:
                found.boards[id] = (real, name)
            if CONFIG_FILE in names and self._is_head(real, names):
                found.heads[id] = (real, name)
        with self._lock:
            self._known = found.packs
        return found


def _order(info: PackInfo | ComparisonInfo | HeadInfo) -> tuple[str, str]:
    return info.name.casefold(), info.id


def _walk(root: Path) -> Iterator[tuple[Path, Path, set[str]]]:
    """Yield ``root`` and its subfolders, each with its real path and the names that it contains.

    Hidden folders and folders inside packs are left out. For a link to a place outside the root, the set of
    names is empty.
    """
    waiting = [(root, 0)]
    seen: set[Path] = set()
    while waiting and len(seen) < MAX_FOLDERS:
        folder, depth = waiting.pop()
        real = folder.resolve()
        if real in seen:
            continue
        seen.add(real)
        if not real.is_relative_to(root):
            yield folder, real, set()
            continue
        try:
            with os.scandir(real) as entries:
                inside = [(entry.name, entry.is_dir()) for entry in entries]
        except OSError:
            continue
        names = {name for name, _ in inside}
        yield folder, real, names
        if depth < DEPTH and not {MANIFEST, MAPS} <= names:
            folders = sorted((n for n, is_dir in inside if is_dir and n[0] != "."), reverse=True)
            waiting += [(folder / name, depth + 1) for name in folders]


def id_of(relative: str) -> str:
    """An id for a relative path; it consists of some readable letters and a hash, and does not change when
    the viewer is restarted."""
    letters = re.sub(r"[^A-Za-z0-9]+", "-", relative).strip("-")[:40] or "root"
    return f"{letters}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:12]}"
