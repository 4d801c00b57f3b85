"""Samples of webdataset shards, as numbered photos that are read from start to end."""

from __future__ import annotations

import hashlib
import io
import math
import random
import re
import tarfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.image_names import SUFFIXES
from xattn.photos.images import MAX_PIXELS, decode_image
from xattn.runtime.files import printable

BLOCK = 256  # undecoded samples that a reader holds at a time; training shuffles within them
MOST_SAMPLES = 1 << 40  # limit for a shard
MOST_SHARDS = 1_000_000
_READING = threading.Lock()


class Shards(Photos):
    """Samples of webdataset shards, numbered as they are stored.

    A sample's image is its member with the suffix jpg, jpeg, png, webp, ... Each shard is read once, from
    start to end, if samples are requested in the order in which they are stored or in that of
    :meth:`order`, which permutes the shards, and the samples within blocks of :data:`BLOCK`. Shards should
    therefore be written shuffled. Samples that are missing at the end of a truncated shard count as
    unreadable photos.

    In training each loader worker reads its own shards. A resumed run starts every worker at the beginning
    of its first unfinished shard and skips, without decoding, the samples already trained on: at most one
    shard per worker is read twice, and no sample is trained on twice or lost. The order depends on the
    number of workers at the start of a run; a resumed run keeps that order, whatever its own number of
    workers.

    timm's reader is used only for the files and lengths of the shards. The reader's stream of samples is
    not used, because its state cannot be restored: the stream passes through a shuffle buffer that spans
    shards, and repeats samples until a count is reached.
    """

    streamed = True

    def __init__(self, urls: Sequence[str], lengths: Sequence[int]) -> None:
        self.urls, self.lengths = list(urls), list(lengths)
        self.starts = [0, *accumulate(self.lengths)]
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def close(self) -> None:
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, so that explanations of these photos can be pickled and copied."""
        return {**self.__dict__, "_open": OrderedDict()}

    def order(self, seed: int, epoch: int) -> list[int]:
        rng = random.Random(f"{seed}/{epoch}")
        shards = list(range(len(self.urls)))
        rng.shuffle(shards)
        numbers: list[int] = []
        for shard in shards:
            end = self.starts[shard + 1]
            for start in range(self.starts[shard], end, BLOCK):
                block = list(range(start, min(start + BLOCK, end)))
                rng.shuffle(block)
                numbers += block
        return numbers

    def _place(self, index: int) -> tuple[int, int]:
        """Shard, and position in it."""
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{_label(self.urls[shard])}#{position}"

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        shard, position = self._place(index)
        with _READING:
            reader = self._open.pop(shard, None)
            if reader is None or reader.block > position // BLOCK:
                reader = _Shard(self.urls[shard])
            self._open[shard] = reader
            while len(self._open) > self.open_shards:
                self._open.popitem(last=False)
            name, data = reader.sample(position)
        if data is None:
            raise ValueError(f"image: {name}")
        return decode_image(io.BytesIO(data), name, max_pixels)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for url, length in zip(self.urls, self.lengths, strict=True):
            size = Path(url).stat().st_size if Path(url).is_file() else -1
            digest.update(printable(f"{_label(url)}:{length}:{size};").encode())
        return {"kind": "wds", "count": len(self), "sha256": digest.hexdigest()}


def _label(url: str) -> str:
    return url.rpartition("/")[2]


class _Shard:
    """One shard, read forwards; samples of the current block are available in any order."""

    def __init__(self, url: str) -> None:
        from webdataset.tariterators import tarfile_samples

        errors: list[str] = []

        def stop(error: Exception) -> bool:  # without self: in a cycle the file would stay open
            errors.append(f" ({type(error).__name__}: {error.args[0] if error.args else ''})")
            return False

        self.label, self.block, self._errors = _label(url), -1, errors
        self._held: list[tuple[str, bytes | None]] = []
        self._samples: Iterator[dict[str, Any]] = iter(
            tarfile_samples([{"url": url}], handler=stop)
        )

    @property
    def _error(self) -> str:
        return self._errors[-1] if self._errors else ""

    def sample(self, position: int) -> tuple[str, bytes | None]:
        """A sample's name (shard/key) and encoded image or, if there is no image, the reason and None."""
        while self.block < position // BLOCK:
            self._held = [self._image(s) for s in islice(self._samples, BLOCK)]
            self.block += 1
        at = position % BLOCK
        if at < len(self._held):
            return self._held[at]
        return f"{self.label}#{position} is missing, the shard ended early{self._error}", None

    def _image(self, sample: dict[str, Any]) -> tuple[str, bytes | None]:
        name = f"{self.label}/{sample['__key__']}"
        for suffix, data in sample.items():
            if f".{suffix}" in SUFFIXES:
                return f"{name}.{suffix}", data
        return f"{name} has no image" + (self._error and f", the shard is cut{self._error}"), None


def open_webdataset(path: str, split: str | None) -> Shards:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ValueError(
            'data: wds/ needs webdataset, which is not installed; run: pip install "xattn[data]"'
        ) from None
    remote = "://" in path or path.startswith("pipe:")
    path = path if remote else str(Path(path).expanduser())
    lengths: Sequence[int] = ()
    if re.search(r"\.(tar|tgz|tar\.\w+)$", path):
        if split is not None:
            raise ValueError(
                f"data: got the split {split!r} of shards that are named one by one; leave it out, or "
                f"give a folder with _info.json"
            )
        counts = [int(b) - int(a) + 1 for a, b in re.findall(r"\{(\d{1,18})\.\.(\d{1,18})", path)]
        if math.prod(counts) > MOST_SHARDS:
            raise ValueError(f"data: {path} names more than {MOST_SHARDS} shards; name fewer")
        try:
            urls = expand_urls(path)
        except ValueError as error:
            raise ValueError(f"data: {path} cannot be read ({error}); close its braces") from None
    else:
        urls, lengths = _split_files(path, split or "train", remote)
    if not remote:
        missing = [url for url in urls if not Path(url).is_file()]
        if missing:
            raise FileNotFoundError(
                f"data: {len(missing)} of {len(urls)} shards are missing, the first is {missing[0]}; "
                f"fetch them, or correct the path or _info.json"
            )
    if len(lengths) != len(urls):
        if remote:
            raise ValueError(
                f"data: the lengths of the shards of {path} are not known; give the folder's URL and "
                f"let its _info.json list filenames and shard_lengths"
            )
        lengths = [_count(url) for url in urls]
    shards = Shards(urls, lengths)
    if not len(shards):
        raise ValueError(f"data: the shards of wds/{path} hold no sample; give others")
    return shards


def _split_files(root: str, split: str, remote: bool) -> tuple[list[str], Sequence[int]]:
    """Files and lengths of ``split`` from the ``_info.json`` in ``root``."""
    from timm.data import create_dataset

    if not remote:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"data: no folder {root}; check the path after wds/")
        if not any((Path(root) / name).is_file() for name in ("_info.json", "info.json")):
            raise ValueError(
                f"data: {root} has no _info.json; write one, or name the shards in braces: "
                f"wds/{root}/photos-{{0000..0031}}.tar"
            )
    try:
        info = create_dataset("wds/", root=root, split=split).reader.split_info
    except Exception as error:
        raise ValueError(
            f"data: wds/{root} cannot be opened ({type(error).__name__}: {error}); give a split of its "
            f"_info.json as wds/PATH:SPLIT"
        ) from error
    urls, lengths = [f"{root}/{name}" for name in info.filenames], info.shard_lengths
    if not all(type(n) is int and 0 <= n <= MOST_SAMPLES for n in lengths):
        raise ValueError(
            f"data: _info.json of {root} has shard_lengths that are not numbers of samples; correct them, "
            f"or leave them out"
        )
    return urls, lengths


def _count(path: str) -> int:
    """Number of samples in a local shard, from its headers alone, grouped as when it is read."""
    from webdataset.tariterators import group_by_keys

    try:
        with tarfile.open(path) as tar:
            names = (m.name for m in tar if m.isreg() and not re.match(r"__[^/]*__($|/)", m.name))
            return sum(
                1 for _ in group_by_keys({"fname": n, "data": b"", "__url__": path} for n in names)
            )
    except (tarfile.TarError, ValueError, EOFError, MemoryError) as error:
        raise ValueError(  # if damaged, xz may request any amount of memory
            f"data: shard {path} is damaged ({error}); fetch or write it again"
        ) from error
