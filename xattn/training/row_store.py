"""Writing files of rows: claim their folder, store rows, finish it; a killed run leaves whole rows.

The files are those of :mod:`~xattn.training.row_files`. A row's numbers are written first, then its
checksum, then its state, and the index after all rows, so what counts is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from xattn.photos.base import Photos
from xattn.runtime import strict_json
from xattn.runtime.distributed import together
from xattn.runtime.files import output_error, write_json
from xattn.training.row_files import (
    CHECKSUMS,
    DIGEST,
    KEY,
    MISSING,
    ROWS,
    UNREADABLE,
    RowFile,
    RowFormat,
    checksum,
    index_digest,
    is_indexed,
    key_digest,
    mapped,
    rows_as_written,
)
from xattn.training.run_folder import LOCK_FILE, locked

T = TypeVar("T")


@contextlib.contextmanager
def claimed(folder: Path, key: dict[str, Any], kind: RowFormat, rank: int = 0) -> Iterator[None]:
    """Own ``folder``, which is new or holds rows with this ``key``; of several processes the first owns it.

    Raises:
        ValueError: it holds anything else, is damaged, or is in use; in all processes.
    """
    with ExitStack() as stack:
        together(lambda: None if rank else stack.enter_context(_claimed(folder, key, kind)))
        yield


@contextlib.contextmanager
def _claimed(folder: Path, key: dict[str, Any], kind: RowFormat) -> Iterator[None]:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{kind.argument}: {folder} is a file; name a folder")
    held = folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK_FILE}
    ours = kind.repairs and is_indexed(folder, kind, key)  # whatever became of the key
    if held and not ours and not (folder / KEY).is_file():
        raise ValueError(
            f"{kind.argument}: {folder} is not empty and holds no {kind.holds}; choose a new one"
        )
    if held and not ours and _begun(folder, kind):
        _check_key(folder, key, kind)
    with locked(folder, kind.argument):
        if not _begun(folder, kind):
            numbers = [path for pattern in kind.files for path in folder.glob(pattern)]
            for path in (*numbers, folder / ROWS, folder / CHECKSUMS):
                path.unlink(missing_ok=True)
        if not is_key(folder, key):
            write_json(folder / KEY, key, kind.argument)
        yield


def is_key(folder: Path, key: dict[str, Any]) -> bool:
    """Whether ``key`` is the one that ``folder`` says it has."""
    try:
        return bool(strict_json.parse((folder / KEY).read_bytes()) == key)
    except (OSError, ValueError):
        return False


def _begun(folder: Path, kind: RowFormat) -> bool:
    """Whether a row is stored; otherwise nothing is worth keeping, as when the disk had no room."""
    rows = folder / ROWS
    return (folder / kind.index).exists() or (rows.is_file() and any(rows.read_bytes()))


def _check_key(folder: Path, key: dict[str, Any], kind: RowFormat) -> None:
    try:
        old = strict_json.parse((folder / KEY).read_bytes())
        if not isinstance(old, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{kind.argument}: {folder / KEY} is damaged ({error}); delete {folder} and {kind.verb} again"
        ) from None
    if old == key:
        return
    if (found := old.get("format")) != kind.version:
        age = "a newer" if isinstance(found, int) and found > kind.version else "an older"
        raise ValueError(
            f"{kind.argument}: {folder} was written by {age} xattn, in format {found}, this one "
            f"writes {kind.version}; choose another folder, or delete it and {kind.verb} again"
        )
    differ = [
        f"{name}: {json.dumps(old.get(name))} there, {json.dumps(key.get(name))} here"
        for name in sorted({*old, *key})
        if old.get(name) != key.get(name)
    ]
    raise ValueError(
        f"{kind.argument}: {folder} has the key {key_digest(old)}, this backbone and data have "
        f"{key_digest(key)} ({'; '.join(differ)}); choose another folder, or delete it and {kind.verb} "
        f"again"
    )


def share_of(blocks: Sequence[T], rank: int, ranks: int) -> Sequence[T]:
    """Those of ``blocks`` that process ``rank`` of ``ranks`` computes: neighbours, as shards are read."""
    share = -(-len(blocks) // ranks)
    return blocks[rank * share : (rank + 1) * share]


class RowStore:
    """The files of ``crops`` x ``count`` rows while they are filled.

    Rows are written with ``write`` and not through a memory map, where a full disk would be a signal
    that kills the process.

    Args:
        files: the numbers of a row in each file, by its name.

    Where ``kind`` repairs, every row that is there is checked. Those that are not as they were written are
    ``damaged`` and missing again, and a file that is too long is cut.

    Attributes: ``rows``, the states of all rows; ``damaged``, numbers of rows.
    """

    def __init__(
        self,
        folder: Path,
        key: dict[str, Any],
        kind: RowFormat,
        files: Mapping[str, RowFile],
        count: int,
        crops: int,
    ) -> None:
        self.folder, self.key, self.kind, self.files = folder, key, kind, dict(files)
        self.count, self.total = count, count * crops
        try:
            self._allocate()
        except OSError as error:
            raise self._error(error) from error
        self.rows = np.fromfile(folder / ROWS, dtype=np.uint8)
        checksums = np.fromfile(folder / CHECKSUMS, dtype=np.uint8).reshape(-1, DIGEST)
        self.damaged: list[int] = []
        if kind.repairs:
            numbers = [mapped(folder / f, s, self.files[f].dtype) for f, s in self.shapes.items()]
            bad = ~rows_as_written(numbers, self.rows, checksums, kind)
            self.damaged = np.flatnonzero(bad & (self.rows != MISSING)).tolist()
            self.rows[bad] = MISSING
        self.rows[~checksums.any(1)] = MISSING  # rows of an older version, which wrote no checksums

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of every file."""
        return {name: [self.total, *file.shape] for name, file in self.files.items()}

    def _allocate(self) -> None:
        """Give every file its length, if the disk has room for all of them."""
        sizes = {name: file.bytes * self.total for name, file in self.files.items()}
        there = sum(f.stat().st_blocks * 512 for f in self.folder.iterdir() if f.is_file())
        free, needed = shutil.disk_usage(self.folder).free + there, sum(sizes.values())
        if needed > free:
            raise OSError(
                f"{self.kind.argument}: {self.folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB "
                f"are free; make room, {self.kind.smaller}or choose another disk"
            )
        others = {ROWS: self.total, CHECKSUMS: self.total * DIGEST}
        for file, size in {**sizes, **others}.items():
            with (self.folder / file).open("ab") as stream:  # another process may be here, too
                if stream.tell() > size and not self.kind.repairs:
                    raise ValueError(
                        f"{self.kind.argument}: {self.folder / file} is longer than it should be; "
                        f"delete {self.folder} and {self.kind.verb} again"
                    )
                stream.truncate(size)

    def _error(self, error: OSError) -> OSError:
        known = error.errno is None
        return error if known else output_error(self.kind.argument, self.folder, error)

    def missing(self, crop: int, size: int) -> list[range]:
        """Numbers of photos in blocks of ``size``: those of which a row of ``crop`` is missing."""
        lacks = self.rows[crop * self.count :][: self.count] == MISSING
        starts = range(0, self.count, size)
        blocks = [range(start, min(start + size, self.count)) for start in starts]
        return [block for block in blocks if lacks[block.start : block.stop].any()]

    def put_rows(
        self, first: int, states: NDArray[np.uint8], numbers: Sequence[NDArray[Any]]
    ) -> None:
        """Store rows from ``first`` on, (rows, ...) of every file; their states last, so that no half row
        counts."""
        try:
            for (name, file), values in zip(self.files.items(), numbers, strict=True):
                self._write(name, first * file.bytes, values.tobytes())
            sealed = states.tolist() if self.kind.repairs else [None] * len(states)
            checksums = [checksum(numbers, row, state) for row, state in enumerate(sealed)]
            self._write(CHECKSUMS, first * DIGEST, b"".join(checksums))
            self._write(ROWS, first, states.tobytes())
        except OSError as error:
            raise self._error(error) from error

    def _write(self, file: str, at: int, data: bytes) -> None:
        with (self.folder / file).open("r+b", buffering=0) as stream:
            stream.seek(at)
            _write_all(stream, data)

    def finish_rows(self, photos: Photos, about: Mapping[str, Any], reason: str) -> None:
        """Write the index, which makes the folder whole.

        Args:
            about: what else the index says.
            reason: of photos that were unreadable then and can be read now.
        """
        rows = np.fromfile(self.folder / ROWS, dtype=np.uint8).reshape(-1, self.count)
        if (rows == MISSING).any():
            raise OSError(
                f"{self.kind.argument}: {self.folder} lacks rows that were written; check the disk"
            )
        lost = np.flatnonzero((rows == UNREADABLE).any(0)).tolist()
        skipped = [(i, why_unreadable(photos, i, self.key["max_pixels"]) or reason) for i in lost]
        if len(skipped) == self.count:
            raise ValueError(
                f"data: none of the {self.count} images could be read; the first: {skipped[0][1]}"
            )
        for file in (*self.files, CHECKSUMS, ROWS):
            with (self.folder / file).open("rb") as stream:
                os.fsync(stream.fileno())
        index = {
            "key": key_digest(self.key),
            **about,
            "photos": self.count,
            "skipped": skipped,
            "names": [photos.name(i) for i in range(self.count)],
        }
        index = strict_json.parse(json.dumps(index))  # as it will be read
        index["sha256"] = index_digest(index)
        write_json(self.folder / self.kind.index, index, self.kind.argument)


def why_unreadable(photos: Photos, index: int, max_pixels: int) -> str:
    """The reason why a photo cannot be read; empty if it can."""
    try:
        photos.load(index, max_pixels)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
