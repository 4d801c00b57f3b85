"""A cache of rows, one per photo and crop, in a folder of safetensors shards that are bound to a key.

    key.json                             what the numbers depend on
    rows-00000016-00000032.safetensors   rows 16 to 31: the tensors of a row by name, each (16, ...)

Row c n + i is crop c of photo i of n. The metadata of a shard contain the names of its photos, the reasons
why some could not be read, and a SHA-256 hash of these and of its tensors. A shard gets its final name
only when it is complete. A killed run therefore leaves only complete shards, and the next run computes the
missing and damaged ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Preprocessing
from xattn.photos.base import Photos
from xattn.runtime import strict_json
from xattn.runtime.distributed import fail_together, gather, peer_errors
from xattn.runtime.files import atomic_file, open_tensors, write_json
from xattn.training.data import TrainImages, load_batches
from xattn.training.run_folder import LOCK_FILE, lock_folder

KEY, RECORD = "key.json", "xattn"  # the file with the key; the metadata entry of a shard
SHARD = re.compile(r"rows-(\d+)-(\d+)\.safetensors")
OPEN = 4096  # largest number of shards that a reader keeps mapped


@dataclass(frozen=True)
class CacheKind:
    """A kind of cache, with the words used in its messages."""

    argument: str
    """The beginning of messages: the argument that names the folder."""
    holds: str
    """What such a folder contains."""
    version: int
    """Version of the row format."""
    verb: str
    """The verb for filling the cache, as in "delete it and VERB again"."""
    thorough: bool
    """Whether every shard is compared with its checksum when the folder is opened. Otherwise each shard is
    checked when it is read for the first time."""
    smaller: str = ""
    """A phrase that names an option with which less space is needed."""


FEATURES = CacheKind("features", "features", 3, "cache", False, "use dtype='float16', ")
OUTCOMES = CacheKind("table", "table of outcomes", 2, "compute", True)


class Shard(NamedTuple):
    """A shard with the rows ``start`` to ``stop`` - 1, the names of their photos, and for each photo the
    reason why it could not be read, or ""."""

    path: Path
    start: int
    stop: int
    names: list[str]
    reasons: list[str]
    record: dict[str, Any]


class Cache:
    """The shards in ``folder`` that belong to ``key``, which includes the numbers of ``photos`` and
    ``crops``.

    Args:
        names: names of the photos; by default those that were stored when the cache was written.

    Attributes: ``shards``, in the order of their rows; ``damaged``, the files whose contents have
        changed since they were written.

    """

    def __init__(
        self, folder: Path, key: dict[str, Any], kind: CacheKind, names: list[str] | None = None
    ) -> None:
        self.folder, self.key, self.kind = folder, key, kind
        self.count = int(key["photos"]["count"])
        self.crops = int(key["crops"])
        self.digest = key_digest(key)
        self.shards: list[Shard] = []
        self.damaged: list[Path] = []
        self._intact: set[Path] = set()
        self._tensors = functools.lru_cache(OPEN)(lambda number: self._read(self.shards[number]))
        for path in sorted(folder.glob("rows-*")):
            try:
                shard = _shard(path, self.digest)
                if kind.thorough:
                    self._read(shard)
            except (OSError, ValueError, LookupError, TypeError, SafetensorError):
                self.damaged.append(path)
            else:
                self.shards.append(shard)
        self.shards.sort(key=lambda shard: shard.start)
        self._shard_of = torch.full((self.count * self.crops,), -1)
        for number, shard in enumerate(self.shards):
            self._shard_of[shard.start : shard.stop] = number
        self._names = names

    # ------------------------------------------------------------------ reading

    @property
    def whole(self) -> bool:
        """Whether the cache contains all its rows."""
        return bool((self._shard_of >= 0).all())

    @functools.cached_property
    def photos(self) -> tuple[list[int], list[str], list[tuple[str, str]]]:
        """Return, for a complete cache, the numbers and names of the photos that could be read in all
        crops, and (name, reason) for all others."""
        names, reasons = [""] * self.count, [""] * self.count
        for shard in self.shards:
            for row, name, reason in zip(
                range(shard.start, shard.stop), shard.names, shard.reasons, strict=True
            ):
                photo = row % self.count
                names[photo], reasons[photo] = name, reasons[photo] or reason
        names = self._names or names
        kept = [i for i, reason in enumerate(reasons) if not reason]
        skipped = [(names[i], reason) for i, reason in enumerate(reasons) if reason]
        return kept, [names[i] for i in kept], skipped

    def rows(self, numbers: Tensor) -> dict[str, Tensor]:
        """Read the rows with the numbers (B,), a LongTensor; returns tensors (B, ...) by name.

        Raises:
            ValueError: a shard has changed since it was written.
        """
        places = zip(numbers.tolist(), self._shard_of[numbers].tolist(), strict=True)
        found = [(self._checked(n), row - self.shards[n].start) for row, n in places]
        return {name: torch.stack([t[name][i] for t, i in found]) for name in found[0][0]}

    def first_row(self) -> dict[str, Tensor]:
        """Return a single row, from which shapes can be read."""
        return self.rows(torch.tensor([self.shards[0].start]))

    def _checked(self, number: int) -> dict[str, Tensor]:
        try:
            return self._tensors(number)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{self.kind.argument}: {self.shards[number].path} has changed since it was "
                f"written ({error}); delete it and {self.kind.verb} again, which computes only "
                "its rows"
            ) from None

    def _read(self, shard: Shard) -> dict[str, Tensor]:
        """The tensors of a shard, mapped into memory; they are hashed once."""
        with open_tensors(shard.path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if shard.path not in self._intact:
            if _sha256(shard.record, tensors) != shard.record["sha256"]:
                raise ValueError("its checksum does not match")
            self._intact.add(shard.path)
        return tensors

    # ------------------------------------------------------------------ writing

    def missing(self, crop: int, size: int) -> list[range]:
        """Return the numbers of the photos without a row for ``crop``, in blocks of at most ``size``
        consecutive photos."""
        lacks = (self._shard_of.view(self.crops, self.count)[crop] < 0).nonzero()[:, 0].tolist()
        blocks: list[range] = []
        for photo in lacks:
            if blocks and blocks[-1].stop == photo and len(blocks[-1]) < size:
                blocks[-1] = range(blocks[-1].start, photo + 1)
            else:
                blocks.append(range(photo, photo + 1))
        return blocks

    @property
    def missing_rows(self) -> int:
        """Return the number of missing rows."""
        return int((self._shard_of < 0).sum())

    def require_room(self, row_bytes: int) -> None:
        """Raise an ``OSError`` unless the disk has room for the missing rows."""
        free, needed = shutil.disk_usage(self.folder).free, self.missing_rows * row_bytes
        if needed > free:
            raise OSError(
                f"{self.kind.argument}: {self.folder} needs {needed / 1e9:.2f} GB, but only "
                f"{free / 1e9:.2f} GB are free; free some space, {self.kind.smaller}or choose "
                "another disk"
            )

    def fill(
        self,
        photos: Photos,
        preprocessing: Preprocessing,
        size: int,
        compute: Callable[[int, range, Tensor | None, list[int]], Mapping[str, Tensor]],
        *,
        workers: int,
        process: tuple[int, int],
        progress: bool,
        desc: str,
    ) -> None:
        """Compute the missing rows for which ``process``, (rank, ranks), is responsible, in blocks of
        ``size`` photos.

        Args:
            compute: ``compute(crop, photos, images, readable)`` returns the rows of a block, each (n,
                ...), from the images (B, 3, H, W) of the readable photos, whose positions in the block are
                ``readable``.
        """
        rank, ranks = process
        photos.open_shards = max(photos.open_shards, 2)
        total = self.count * self.crops
        show = progress and rank == 0
        with tqdm(total=total, desc=desc, unit="photo", disable=not show) as bar:
            bar.update(total - self.missing_rows)
            for crop in range(self.crops):
                images = TrainImages(
                    photos, preprocessing, self.key["seed"] or 0, crop > 0, self.key["max_pixels"]
                )
                blocks = self.missing(crop, size)
                share = -(-len(blocks) // ranks)  # neighbours, because shards are read in order
                mine = blocks[rank * share : (rank + 1) * share]
                keys = [[(crop, i) for i in block] for block in mine]
                with contextlib.closing(load_batches(images, keys, workers)) as batches:
                    for block, (batch, unreadable) in zip(mine, batches, strict=True):
                        lost = dict(unreadable)
                        readable = [place for place, i in enumerate(block) if i not in lost]
                        self._write(
                            crop * self.count + block.start,
                            [photos.name(i) for i in block],
                            [lost.get(i, "") for i in block],
                            compute(crop, block, batch, readable),
                        )
                        bar.update(min(len(block) * ranks, total - bar.n))

    def _write(
        self, start: int, names: list[str], reasons: list[str], tensors: Mapping[str, Tensor]
    ) -> None:
        """Write the rows starting at ``start`` as one shard."""
        tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
        record = {"key": self.digest, "start": start, "names": names, "reasons": reasons}
        record["sha256"] = _sha256(record, tensors)
        path = self.folder / f"rows-{start:08d}-{start + len(names):08d}.safetensors"
        data = save(tensors, {RECORD: json.dumps(record)})
        with atomic_file(path, self.kind.argument) as temporary:
            _store(temporary, data)


def _store(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _shard(path: Path, digest: str) -> Shard:
    """The shard described by a file's name and metadata; an error if it does not belong to that key."""
    match = SHARD.fullmatch(path.name)
    if match is None:
        raise ValueError("its name is not that of a shard")
    start, stop = int(match[1]), int(match[2])
    with open_tensors(path) as file:
        record = strict_json.parse(file.metadata()[RECORD])
    names, reasons = list(record["names"]), list(record["reasons"])
    if (record["key"], record["start"]) != (digest, start):
        raise ValueError("it belongs to another key or another folder")
    if not len(names) == len(reasons) == stop - start:
        raise ValueError("its name does not fit its rows")
    return Shard(path, start, stop, names, reasons, record)


def _sha256(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a shard's record, without the hash itself, and of its tensors."""
    digest = hashlib.sha256()
    for part in (
        {name: value for name, value in record.items() if name != "sha256"},
        sorted(tensors),
    ):
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    for _, tensor in sorted(tensors.items()):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def key_digest(key: dict[str, Any]) -> str:
    """Return the SHA-256 of a key, which does not depend on the order of its entries."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------- folders


def filled_cache(
    folder: Path,
    key: dict[str, Any],
    kind: CacheKind,
    photos: Photos,
    rank: int,
    fill: Callable[[Cache], None],
) -> Cache:
    """Return the cache of ``photos`` in ``folder``; all processes call ``fill`` to compute missing rows.

    A complete cache is read without a lock, so many runs can read it.

    Raises:
        ValueError: ``folder`` contains other files or is in use, or no photo could be read. OSError: the
            folder cannot be written.
    """
    names = [photos.name(i) for i in range(len(photos))]
    with peer_errors("start all of them again to continue"):
        found = _as_it_is(folder, key, kind, names)
        if not all(gather(found is not None)):
            with ExitStack() as stack:
                fail_together(
                    lambda: None if rank else stack.enter_context(_claimed(folder, key, kind))
                )
                cache = fail_together(lambda: Cache(folder, key, kind, names))
                fail_together(lambda: None if rank else _drop_damaged(cache))
                fail_together(lambda: fill(cache))
                found = fail_together(lambda: Cache(folder, key, kind, names))
    assert found is not None
    kept, _, skipped = found.photos
    if not kept:
        raise ValueError(
            f"data: none of the {len(skipped)} images could be read; the first: {skipped[0][1]}"
        )
    return found


def _as_it_is(folder: Path, key: dict[str, Any], kind: CacheKind, names: list[str]) -> Cache | None:
    """The cache, if it is complete and has this key."""
    try:
        if _key(folder) != key:
            return None
    except (OSError, ValueError):
        return None
    cache = Cache(folder, key, kind, names)
    return cache if cache.whole and not cache.damaged else None


@contextlib.contextmanager
def _claimed(folder: Path, key: dict[str, Any], kind: CacheKind) -> Iterator[None]:
    """Lock ``folder``, which is new or contains rows with this ``key``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{kind.argument}: {folder} is a file; name a folder")
    held = folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK_FILE}
    if held and not _is_ours(folder, key):
        if not (folder / KEY).is_file():
            raise ValueError(
                f"{kind.argument}: {folder} is not empty and contains no {kind.holds}; choose a "
                "new one"
            )
        if any(folder.glob("rows-*")):  # otherwise there is nothing to keep
            _refuse(folder, key, kind)
    with lock_folder(folder, kind.argument):
        for leftover in folder.glob(".rows-*"):  # from a run that was killed while writing
            leftover.unlink()
        try:
            same = _key(folder) == key
        except (OSError, ValueError):
            same = False
        if not same:
            if _is_ours(folder, key):
                warnings.warn(
                    f"{kind.argument}: {folder / KEY} was damaged, but its rows belong to this "
                    "key, so it is written again",
                    stacklevel=5,
                )
            write_json(folder / KEY, key, kind.argument)
        yield


def _is_ours(folder: Path, key: dict[str, Any]) -> bool:
    """Whether a shard belongs to ``key``, even if the key file is missing or damaged."""
    digest = key_digest(key)
    for path in folder.glob("rows-*"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, SafetensorError):
            _shard(path, digest)
            return True
    return False


def _refuse(folder: Path, key: dict[str, Any], kind: CacheKind) -> None:
    try:
        old = _key(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{kind.argument}: {folder} is damaged ({KEY}: {error}); {kind.verb} again, or delete it first"
        ) from None
    if old == key:
        return  # all its shards are damaged
    differ = [
        f"{name}: {json.dumps(old.get(name))} there, {json.dumps(key.get(name))} here"
        for name in sorted({*old, *key})
        if old.get(name) != key.get(name)
    ]
    raise ValueError(
        f"{kind.argument}: {folder} has the key {key_digest(old)}, but this backbone and data "
        f"have {key_digest(key)} ({'; '.join(differ)}); choose another folder, or delete it and "
        f"{kind.verb} again"
    )


def _key(folder: Path) -> dict[str, Any]:
    key = strict_json.parse((folder / KEY).read_bytes())
    if not isinstance(key, dict):
        raise ValueError("it is not a JSON object")
    return key


def _drop_damaged(cache: Cache) -> None:
    """Delete damaged shards, with one warning."""
    if not cache.damaged:
        return
    files = ", ".join(path.name for path in cache.damaged[:3])
    more = f" and {len(cache.damaged) - 3} more" if len(cache.damaged) > 3 else ""
    warnings.warn(
        f"{cache.kind.argument}: these files in {cache.folder} have changed since they were "
        f"written: {files}{more}; their rows are computed again",
        stacklevel=6,
    )
    for path in cache.damaged:
        path.unlink()
