"""Features of a frozen backbone, computed once and read from disk: memory-mapped tokens of every photo.

A cache is a folder with one file a tap, (views x n, N, C) numbers in row-major order, one for the
prefix tokens, (views x n, P, C), ``rows`` with the state of every row, ``sha256`` with the checksum of
its numbers in all files, and, once all rows are there, ``features.json``. Its key is the SHA-256 of what
the numbers depend on: the backbone's weights, its taps and preprocessing, and the description of the
photos. A caching run that was killed goes on with the blocks that are missing, and gives the numbers
that an undisturbed one gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from xattn.backbone import Backbone, Taps
from xattn.heads.attentive import Tokens
from xattn.photos.base import Data, Photos
from xattn.photos.images import MAX_PIXELS
from xattn.photos.sources import open_photos
from xattn.runtime import strict_json
from xattn.runtime.distributed import gather, processes
from xattn.runtime.files import output_error, write_json
from xattn.runtime.memory import is_out_of_memory
from xattn.training.data import TrainImages, load_batches
from xattn.training.run_folder import LOCK_FILE, locked

INDEX, KEY, ROWS, PREFIX, CHECKSUMS = "features.json", "key.json", "rows", "prefix", "sha256"
DIGEST = 32  # bytes of a SHA-256
MISSING, STORED, UNREADABLE = 0, 1, 2
FORMAT = 2  # 1: photos were told apart by names and sizes alone

Kind = Literal["float32", "float16"]


@dataclass(frozen=True, eq=False)
class Features:
    """Cached features; photo i is the i-th that could be read.

    ``names`` are the photos', ``skipped`` holds (name, reason) of those that could not be read,
    ``channels`` the width of every tap, ``grid`` their common (h, w), ``key`` what they were made of.
    """

    folder: Path
    key: dict[str, Any]
    names: list[str]
    skipped: list[tuple[str, str]]
    channels: tuple[int, ...]
    grid: tuple[int, int]
    prefix_tokens: int
    _rows: NDArray[np.int64] = field(repr=False)
    _photos: int
    _maps: tuple[NDArray[Any], ...] = field(repr=False)
    _checksums: NDArray[np.uint8] | None = field(default=None, repr=False)
    _checked: NDArray[np.bool_] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """SHA-256 of the key."""
        return _digest(self.key)

    @property
    def views(self) -> int:
        """How many crops of every photo there are: the evaluation crop, then random ones."""
        return int(self.key["views"])

    def batch(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Tokens:
        """Tokens of photos in float32: a (B, N, C_i) of every tap, and the prefix (B, P, C).

        Args:
            index: numbers of photos, 0 .. len - 1.
            view: which crop, 0 .. views - 1, one for all or one a photo.

        Raises:
            ValueError: the numbers are not those that were written. Each row is compared with its
                checksum when it is read for the first time.
        """
        photos = self._rows[np.asarray(index, dtype=np.int64)]
        rows = np.asarray(view, dtype=np.int64) * self._photos + photos
        read = [m[rows] for m in self._maps]
        self._check(rows, read)
        *patches, prefix = (torch.from_numpy(m).float() for m in read)
        return Tokens(tuple(patches), prefix, self.grid)

    def _check(self, rows: NDArray[np.int64], read: Sequence[NDArray[Any]]) -> None:
        if self._checksums is None or self._checked is None:
            return
        for place in np.flatnonzero(~self._checked[rows]).tolist():
            row = int(rows[place])
            if _checksum(read, place) != self._checksums[row].tobytes():
                raise ValueError(
                    f"features: the numbers of {self.names[self._position(row)]} in {self.folder} are "
                    f"not those that were written; delete the folder and cache again"
                )
            self._checked[row] = True

    def _position(self, row: int) -> int:
        return int(np.searchsorted(self._rows, row % self._photos))

    def taps(self, index: Sequence[int] | Tensor, view: int | Tensor = 0) -> Taps:
        """The same as :class:`~xattn.backbone.Taps` without logits (B, 0), for a head to read."""
        tokens = self.batch(index, view)
        maps = tuple(p.transpose(1, 2).unflatten(2, self.grid) for p in tokens.patches)
        return Taps(tokens.prefix.new_empty(len(tokens.prefix), 0), maps, tokens.prefix)


def feature_key(
    backbone: Backbone,
    photos: Photos,
    dtype: Kind = "float32",
    views: int = 1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """What cached features depend on."""
    return {
        "format": FORMAT,
        "backbone": {"name": backbone.name, "sha256": backbone.fingerprint},
        "taps": list(backbone.taps),
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "photos": photos.describe(),
        "max_pixels": max_pixels,
        "dtype": dtype,
        "views": views,
        "seed": seed if views > 1 else None,
    }


def cache_features(
    backbone: Backbone,
    data: Data,
    folder: str | Path,
    *,
    batch_size: int = 16,
    workers: int = 0,
    dtype: Kind = "float32",
    views: int = 1,
    seed: int = 0,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> Features:
    """The features of ``data``, computed into ``folder`` where they are not there yet.

    Args:
        data: see :func:`xattn.photos.sources.open_photos`. The first of its ``views`` is the evaluation
            crop, further ones are random crops and flips, pure functions of (seed, view, index).
        batch_size: photos a pass; every pass has this shape.
        dtype: of the numbers on disk; ``"float16"`` halves the space.

    Finer maps are averaged to the grid of the last tap. Photos that cannot be read are left out and
    listed. With several processes each computes its share.

    Raises:
        ValueError: ``folder`` holds the features of something else (both keys are named), is
            damaged or in use; no photo can be read; features that ``dtype`` cannot hold.
        OSError: ``folder`` cannot be written, or the disk has no room.
    """
    if dtype not in ("float32", "float16"):
        raise ValueError(f"dtype: got {dtype!r}; choose 'float32' or 'float16'")
    for name, value in (("batch_size", batch_size), ("views", views)):
        if isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value}; give a positive number")
    folder, photos = Path(folder), open_photos(data)
    ranks, rank = processes(backbone.device)
    key = feature_key(backbone, photos, dtype, views, seed, max_pixels)
    with ExitStack() as stack:
        refusal: Exception | None = None
        try:
            if rank == 0:
                stack.enter_context(_claimed(folder, key))
        except (ValueError, OSError) as error:
            refusal = error
        if (refusal := gather(refusal)[0]) is not None:
            raise refusal
        if not (folder / INDEX).is_file():
            failure: Exception | None = None
            try:
                store = _Store(folder, backbone, photos, key)
                gather(None)
                _fill(store, backbone, photos, batch_size, workers, rank, ranks, progress)
            except (ValueError, OSError, MemoryError) as error:
                failure = error
            failures = [f for f in gather(failure) if f is not None]
            if failures:
                raise failure or failures[0]
            if rank == 0:
                store.finish(photos)
            gather(None)
    return _opened(folder, key, [photos.name(i) for i in range(len(photos))])


def open_features(folder: str | Path) -> Features:
    """The finished features in ``folder``.

    Raises:
        ValueError: they are damaged, or were not finished. FileNotFoundError: there are none.
    """
    folder = Path(folder)
    if not (folder / KEY).is_file():
        raise FileNotFoundError(
            f"features: no features in {folder}; name a folder of cache_features"
        )
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"features: {folder} is not finished; cache the same photos again to go on"
        )
    return _opened(folder, None, None)


# ---------------------------------------------------------------------- the folder


@contextlib.contextmanager
def _claimed(folder: Path, key: dict[str, Any]) -> Iterator[None]:
    """Own ``folder``, which is new, or holds features of this ``key``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"features: {folder} is a file; name a folder")
    held = folder.is_dir() and {p.name for p in folder.iterdir()} - {LOCK_FILE}
    if held and not (folder / KEY).is_file():
        raise ValueError(f"features: {folder} is not empty and holds no features; choose a new one")
    if held and _begun(folder):
        _check_key(folder, key)
    with locked(folder, "features"):
        if not _begun(folder):
            for path in (*folder.glob("tap-*"), *(folder / f for f in (PREFIX, ROWS, CHECKSUMS))):
                path.unlink(missing_ok=True)
            write_json(folder / KEY, key, "features")
        yield


def _begun(folder: Path) -> bool:
    """Whether a row is stored; a run that found no room, say, has left nothing worth keeping."""
    rows = folder / ROWS
    return (folder / INDEX).exists() or (rows.is_file() and any(rows.read_bytes()))


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    try:
        old = strict_json.parse((folder / KEY).read_bytes())
        if not isinstance(old, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"features: {folder / KEY} is damaged ({error}); delete {folder} and cache again"
        ) from None
    if old == key:
        return
    if (found := old.get("format")) != FORMAT:
        age = "a newer" if isinstance(found, int) and found > FORMAT else "an older"
        raise ValueError(
            f"features: {folder} was written by {age} xattn, in format {found}, this one writes "
            f"{FORMAT}; choose another folder, or delete it and cache again"
        )
    differ = [
        f"{name}: {json.dumps(old.get(name))} there, {json.dumps(key.get(name))} here"
        for name in sorted({*old, *key})
        if old.get(name) != key.get(name)
    ]
    raise ValueError(
        f"features: {folder} has the key {_digest(old)}, this backbone and data have {_digest(key)} "
        f"({'; '.join(differ)}); choose another folder, or delete it and cache again"
    )


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _checksum(maps: Sequence[NDArray[Any]], row: int) -> bytes:
    """SHA-256 of one row of all files, one after the other."""
    digest = hashlib.sha256()
    for values in maps:
        digest.update(np.ascontiguousarray(values[row]).tobytes())
    return digest.digest()


def _opened(folder: Path, key: dict[str, Any] | None, names: list[str] | None) -> Features:
    try:
        key = key or strict_json.parse((folder / KEY).read_bytes())
        index = strict_json.parse((folder / INDEX).read_bytes())
        if index["key"] != _digest(key):
            raise ValueError(f"it belongs to the key {index['key']}, {KEY} has {_digest(key)}")
        old = "sha256" not in index and not (folder / CHECKSUMS).exists()
        if not old and index["sha256"] != _index_digest(index):
            raise ValueError(f"{INDEX} is not as it was written")
        photos, names = int(index["photos"]), names or index["names"]
        if not isinstance(names, list) or len(names) != photos:
            raise ValueError(f"{INDEX} does not name {photos} photos")
        skipped = {int(i): str(reason) for i, reason in index["skipped"]}
        if not set(skipped) < set(range(photos)):
            raise ValueError(f"{INDEX} skips photos that do not exist, or all of them")
        shapes = {str(file): [int(n) for n in shape] for file, shape in index["shapes"].items()}
        *taps, last = shapes
        if not taps or last != PREFIX or any(Path(file).name != file for file in shapes):
            raise ValueError(f"{INDEX} has the files {', '.join(shapes)}")
        total, grid = photos * int(key["views"]), (int(index["grid"][0]), int(index["grid"][1]))
        patches = grid[0] * grid[1]
        maps = []
        for file, shape in shapes.items():
            rows, tokens, _ = shape
            if rows != total or min(shape) < 0 or (file != PREFIX and tokens != patches):
                raise ValueError(f"{file} has the shape {shape}")
            size = math.prod(shape) * np.dtype(key["dtype"]).itemsize
            _check_size(folder / file, size)
            maps.append(
                np.memmap(folder / file, key["dtype"], "r", shape=tuple(shape))
                if size
                else np.zeros(shape, key["dtype"])
            )
        checksums = None
        if not old:
            _check_size(folder / CHECKSUMS, total * DIGEST)
            checksums = np.fromfile(folder / CHECKSUMS, np.uint8).reshape(total, DIGEST)
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError
    ) as error:  # fmt: skip
        raise ValueError(
            f"features: {folder} is damaged ({type(error).__name__}: {error}); delete it and cache "
            f"again"
        ) from None
    kept = [i for i in range(photos) if i not in skipped]
    return Features(
        folder=folder,
        key=key,
        names=[names[i] for i in kept],
        skipped=[(names[i], reason) for i, reason in sorted(skipped.items())],
        channels=tuple(shapes[file][2] for file in taps),
        grid=grid,
        prefix_tokens=shapes[PREFIX][1],
        _rows=np.asarray(kept, dtype=np.int64),
        _photos=photos,
        _maps=tuple(maps),
        _checksums=checksums,
        _checked=None if checksums is None else np.zeros(total, np.bool_),
    )


def _check_size(path: Path, size: int) -> None:
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not {size}")


def _index_digest(index: dict[str, Any]) -> str:
    return _digest({name: value for name, value in index.items() if name != "sha256"})


# ---------------------------------------------------------------------- filling it


class _Store:
    """The files of a cache while it is filled. Rows are written with ``write``, not through a memory
    map: there a full disk would be a signal that kills the process."""

    def __init__(
        self, folder: Path, backbone: Backbone, photos: Photos, key: dict[str, Any]
    ) -> None:
        self.folder, self.key = folder, key
        self.dtype: np.dtype[Any] = np.dtype(key["dtype"])
        self.grid = backbone.tap_sizes[-1]
        self.count, self.total = len(photos), len(photos) * key["views"]
        patches = self.grid[0] * self.grid[1]
        self.shapes = {
            f"tap-{i}": [self.total, patches, c] for i, c in enumerate(backbone.channels)
        }
        prefix = backbone.prefix_tokens
        self.shapes[PREFIX] = [self.total, prefix, backbone.channels[-1] if prefix else 0]
        sizes = {file: self._bytes(file) * self.total for file in self.shapes}
        try:
            there = sum(f.stat().st_blocks * 512 for f in folder.iterdir() if f.is_file())
            free, needed = shutil.disk_usage(folder).free + there, sum(sizes.values())
            if needed > free:
                raise OSError(
                    f"features: {folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                    f"make room, use dtype='float16', or choose another disk"
                )
            others = {ROWS: self.total, CHECKSUMS: self.total * DIGEST}
            for file, size in {**sizes, **others}.items():
                with (folder / file).open("ab") as stream:  # another process may be here, too
                    if stream.tell() > size:
                        raise ValueError(
                            f"features: {folder / file} is longer than it should be; delete "
                            f"{folder} and cache again"
                        )
                    stream.truncate(size)
        except OSError as error:
            raise self._error(error) from error
        self.rows = np.fromfile(folder / ROWS, dtype=np.uint8)
        checksums = np.fromfile(folder / CHECKSUMS, dtype=np.uint8).reshape(-1, DIGEST)
        self.rows[~checksums.any(1)] = MISSING  # rows of an older version, which wrote none

    def _bytes(self, file: str) -> int:
        """Of one row."""
        return int(np.prod(self.shapes[file][1:])) * self.dtype.itemsize

    def _error(self, error: OSError) -> OSError:
        return error if error.errno is None else output_error("features", self.folder, error)

    def put(self, first: int, states: NDArray[np.uint8], maps: Sequence[Tensor]) -> None:
        """Store rows from ``first`` on; their states last, so that no half row counts."""
        try:
            dtype = getattr(torch, self.dtype.name)
            numbers = [values.to(dtype).cpu().contiguous().numpy() for values in maps]
            for file, values in zip(self.shapes, numbers, strict=True):
                self._write(file, first * self._bytes(file), values.tobytes())
            checksums = b"".join(_checksum(numbers, row) for row in range(len(states)))
            self._write(CHECKSUMS, first * DIGEST, checksums)
            self._write(ROWS, first, states.tobytes())
        except OSError as error:
            raise self._error(error) from error

    def _write(self, file: str, at: int, data: bytes) -> None:
        with (self.folder / file).open("r+b", buffering=0) as stream:
            stream.seek(at)
            _write_all(stream, data)

    def finish(self, photos: Photos) -> None:
        """Write the index, which makes the folder a whole cache."""
        rows = np.fromfile(self.folder / ROWS, dtype=np.uint8).reshape(-1, self.count)
        if (rows == MISSING).any():
            raise OSError(f"features: {self.folder} lacks rows that were written; check the disk")
        skipped = []
        for i in np.flatnonzero((rows == UNREADABLE).any(0)).tolist():
            try:
                photos.load(i, self.key["max_pixels"])
                reason = "could not be read when the features were cached"
            except (ValueError, OSError) as error:
                reason = str(error)
            skipped.append((i, reason))
        if len(skipped) == self.count:
            raise ValueError(
                f"data: none of the {self.count} images could be read; the first: {skipped[0][1]}"
            )
        for file in (*self.shapes, CHECKSUMS, ROWS):
            with (self.folder / file).open("rb") as stream:
                _sync(stream)
        index = {
            "key": _digest(self.key),
            "shapes": self.shapes,
            "grid": list(self.grid),
            "photos": self.count,
            "skipped": skipped,
            "names": [photos.name(i) for i in range(self.count)],
        }
        index = strict_json.parse(json.dumps(index))  # as it will be read
        index["sha256"] = _index_digest(index)
        write_json(self.folder / INDEX, index, "features")


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _sync(stream: BinaryIO) -> None:
    import os

    os.fsync(stream.fileno())


def _fill(
    store: _Store,
    backbone: Backbone,
    photos: Photos,
    batch_size: int,
    workers: int,
    rank: int,
    ranks: int,
    progress: bool,
) -> None:
    """Compute the blocks of ``batch_size`` rows that are missing, this process's share of them."""
    n, key = store.count, store.key
    photos.open_shards = max(photos.open_shards, 2)
    with tqdm(
        total=store.total, desc="features", unit="photo", disable=not progress or rank > 0
    ) as bar:
        for view in range(key["views"]):
            images = TrainImages(
                photos, backbone.preprocessing, key["seed"] or 0, view > 0, key["max_pixels"]
            )
            starts = [
                start
                for start in range(0, n, batch_size)
                if (store.rows[view * n :][start : min(start + batch_size, n)] == MISSING).any()
            ]
            bar.update(n - sum(min(batch_size, n - start) for start in starts))
            share = -(-len(starts) // ranks)
            mine = starts[rank * share : (rank + 1) * share]
            keys = [[(view, i) for i in range(s, min(s + batch_size, n))] for s in mine]
            with contextlib.closing(load_batches(images, keys, workers)) as batches:
                for start, block, (batch, unreadable) in zip(mine, keys, batches, strict=True):
                    lost = {i for i, _ in unreadable}
                    states = np.array([UNREADABLE if i in lost else STORED for _, i in block])
                    maps = _maps(backbone, batch, states == STORED, batch_size)
                    _check(maps, states == STORED, store.dtype, photos, start)
                    store.put(view * n + start, states.astype(np.uint8), maps)
                    bar.update(min(len(block) * ranks, store.total - bar.n))


@torch.inference_mode()
def _maps(
    backbone: Backbone, batch: Tensor | None, readable: NDArray[np.bool_], batch_size: int
) -> list[Tensor]:
    """Tokens of every tap and the prefix tokens of a block, grey in the place of what is missing.

    The pass always has ``batch_size`` photos: another shape may give other last bits.
    """
    size = backbone.preprocessing.input_size
    images = torch.full((batch_size, len(backbone.preprocessing.mean), *size), 0.5, device="cpu")
    if batch is not None:
        images[torch.from_numpy(np.flatnonzero(readable))] = batch
    try:
        taps = backbone(images.to(backbone.device, next(backbone.parameters()).dtype))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"batch_size: out of memory with {batch_size} photos a pass; cache with fewer"
        ) from error
    grid = taps.maps[-1].shape[2:]
    patches = [
        (m if m.shape[2:] == grid else F.adaptive_avg_pool2d(m, tuple(grid)))
        .flatten(2)
        .transpose(1, 2)
        for m in taps.maps
    ]
    prefix = patches[-1].new_empty(batch_size, 0, 0) if taps.prefix is None else taps.prefix
    return [m[: len(readable)] for m in (*patches, prefix)]


def _check(
    maps: Sequence[Tensor],
    readable: NDArray[np.bool_],
    dtype: np.dtype[Any],
    photos: Photos,
    start: int,
) -> None:
    """Numbers that the file cannot hold are an error of the photo that brought them."""
    limit = float(np.finfo(dtype).max)
    for values in maps:
        if not values.numel():
            continue
        wide = values.flatten(1).float()
        good = (wide.abs() <= limit).all(1).cpu().numpy() | ~readable  # NaN is not good
        if not good.all():
            name = photos.name(start + int(np.flatnonzero(~good)[0]))
            raise ValueError(
                f"features: those of {name} are not finite in {dtype.name}; use dtype='float32' "
                f"and check the backbone's weights"
            )
