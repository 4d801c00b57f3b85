"""Photos by number, wherever they are: files, a Hugging Face dataset, or webdataset shards.

``data`` is a folder, a ``.txt`` list, one image, a list of paths, or a dataset by the scheme names of
``timm.data`` (the split is "train" if left out):

* ``hfds/NAME_OR_PATH[:split]``: a map-style Hugging Face dataset, from the hub or a local folder
  (images, parquet files, or what ``save_to_disk`` wrote). Its image column is found by its type.
* ``wds/PATH[:split]``: webdataset shards of a folder or URL whose ``_info.json`` names files and
  lengths of each split, as ``timm.data`` reads it; or local shards named in braces,
  ``wds/PATH/photos-{0000..0031}.tar``, whose samples are counted once by their tar headers.

A local folder that is called ``hfds`` or ``wds`` is given as ``./hfds``.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
import re
import tarfile
import threading
from abc import abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from xattn.images import MAX_PIXELS, SUFFIXES, decode_image, list_images, load_image
from xattn.runtime.files import printable

SCHEMES = ("hfds", "wds")
BLOCK = 256  # undecoded samples of a shard that a reader holds; training shuffles within them
MOST_SAMPLES = 1 << 40  # of a shard
MOST_SHARDS = 1_000_000
TAIL = 4096  # last bytes of a photo that its description holds
_READING = threading.Lock()


@dataclass(frozen=True)
class StoredPhoto:
    """One photo of a :class:`Photos`, not read yet."""

    photos: Photos
    index: int

    @property
    def name(self) -> str:
        """Path, row number, or shard and position."""
        return self.photos.name(self.index)

    def load(self, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """8-bit RGB, upright; ValueError or OSError where the photo cannot be read."""
        return self.photos.load(self.index, max_pixels)


class Photos(Sequence[StoredPhoto]):
    """Photos with fixed numbers 0 .. len - 1; also a sequence of :class:`StoredPhoto`."""

    streamed = False
    """Whether the photos are read by streams, fast in :meth:`order` only."""
    open_shards = 1
    """How many shards a reader keeps open, each with a block of undecoded samples."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What the photo is called in lists; nothing is read for it."""

    @abstractmethod
    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        """8-bit RGB, upright; ValueError or OSError where the photo cannot be read.

        The message names the file or the shard and key. May be called from several threads.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Count and hash, to tell whether a resumed run sees the same photos."""

    def close(self) -> None:
        """Forget open files; processes must not share them."""

    def order(self, seed: int, epoch: int) -> list[int]:
        """The numbers in the order of training, a pure function of (seed, epoch)."""
        numbers = list(range(len(self)))
        random.Random(f"{seed}/{epoch}").shuffle(numbers)
        return numbers

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [StoredPhoto(self, i) for i in range(*index.indices(len(self)))]
        return StoredPhoto(self, range(len(self))[index])


Data: TypeAlias = str | Path | Sequence[str | Path] | Photos


def is_stored(data: Any) -> bool:
    """Whether ``data`` names a dataset by a scheme rather than files."""
    return isinstance(data, str) and data.partition("/")[0].lower() in (*SCHEMES, "hfids")


def open_photos(data: Data) -> Photos:
    """The photos that ``data`` stands for (see the module), without opening one.

    Raises:
        ValueError: no photo, an unknown split, a dataset that cannot be opened, or the extra
            ``xattn[data]`` is not installed.
        FileNotFoundError: a missing folder, list file or shard.
    """
    if isinstance(data, Photos):
        return data
    if is_stored(data):
        scheme, _, rest = str(data).partition("/")
        match = re.fullmatch(r"(.+?)(?::([A-Za-z_][\w+-]*(?:\[[^\]]*\])?))?", rest)
        if match is None:
            raise ValueError(f"data: got {data!r}; give {scheme}/NAME_OR_PATH[:split]")
        if scheme.lower() == "hfds":
            return _open_hf(match[1], match[2])
        if scheme.lower() == "wds":
            return _open_shards(match[1], match[2])
        raise ValueError(
            "data: hfids/ (Hugging Face streaming) does not say how many samples a shard holds, so "
            "a run could not resume; give hfds/ (the same dataset, kept on disk) or wds/"
        )
    if isinstance(data, str | Path):
        return Files(list_images(data))
    paths = [Path(p) for p in data]  # type: ignore[arg-type]
    if not paths:
        raise ValueError("data: got an empty list of images; give at least one path")
    return Files(paths)


class Files(Photos):
    """Image files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return load_image(self.paths[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size if path.is_file() else -1
            digest.update(printable(f"{path.parent.name}/{path.name}:{size};").encode())
            if size > 0:
                digest.update(_end(path, size))
        return {"count": len(self), "sha256": digest.hexdigest()}


def _end(path: Path, size: int) -> bytes:
    """The last bytes of a file: other pixels of the same size differ there, too."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, size - TAIL))
            return stream.read(TAIL)
    except OSError:  # an unreadable photo is skipped and listed when its turn comes
        return b""


# ---------------------------------------------------------------------- Hugging Face datasets


class Rows(Photos):
    """The image column (undecoded) of a map-style Hugging Face dataset."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"row-{index}"

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        cell = self.dataset[index][self.column] or {}
        if cell.get("bytes"):
            label = cell.get("path") or self.name(index)
            return decode_image(io.BytesIO(cell["bytes"]), label, max_pixels)
        if not cell.get("path"):
            raise ValueError(f"image: {self.name(index)} holds no image")
        return load_image(cell["path"], max_pixels)

    def describe(self) -> dict[str, Any]:
        return {"kind": "hfds", "count": len(self), "fingerprint": self.dataset._fingerprint}


def _hf_dataset(name: str, split: str | None) -> Any:
    import datasets
    from timm.data import create_dataset

    if not any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return create_dataset(f"hfds/{name}", split=split or "train").reader.dataset
    saved = datasets.load_from_disk(name)  # timm's reader does not open what save_to_disk wrote
    if not isinstance(saved, dict):
        split = split or str(saved.split)
        saved = {str(saved.split): saved}
    split = split or "train"
    if split not in saved:
        raise ValueError(f"unknown split {split!r}, it has {', '.join(saved)}")
    return saved[split]


def _open_hf(name: str, split: str | None) -> Rows:
    try:
        import datasets
    except ImportError:
        raise ValueError('data: hfds/ needs datasets; run: pip install "xattn[data]"') from None
    folder = Path(name).expanduser()
    if not folder.exists() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise FileNotFoundError(f"data: no folder {name}; check the path after hfds/")
    try:
        dataset = _hf_dataset(str(folder) if folder.exists() else name, split)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"data: hfds/{name} cannot be opened ({reason}); give a dataset as "
            f"hfds/NAME_OR_PATH:SPLIT"
        ) from error
    if not len(dataset):
        raise ValueError(f"data: hfds/{name} is empty; give another dataset or split")
    columns = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, datasets.Image)
        # timm adds an empty column "image" where there is none of that name
        and dataset.data.column(column).null_count < len(dataset.data)
    ]
    if "image" not in columns and len(columns) != 1:
        raise ValueError(
            f"data: hfds/{name} has the image columns {columns}; it needs just one, or one that is "
            f"called image"
        )
    column = "image" if "image" in columns else columns[0]
    dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return Rows(dataset, column)


# ---------------------------------------------------------------------- webdataset shards


class Shards(Photos):
    """Samples of webdataset shards, numbered as they are stored.

    A sample's image is its member with the suffix jpg, jpeg, png, webp, ... A shard is read front
    to back and once where it is asked for in stored order, or in :meth:`order`, which permutes the
    shards and the samples within blocks of :data:`BLOCK`: shards have to be written shuffled.
    Numbers that a truncated shard does not hold are unreadable photos.

    In training each loader worker reads shards of its own. A resumed run starts every worker at the
    beginning of the first shard that it had not finished and reads over, without decoding, what was
    trained on: at most one shard a worker is read twice, no sample is trained on twice or lost. The
    order depends on how many workers a run was started with; a resumed run keeps it with any number.

    timm's reader gives files and lengths. Its sample stream is not used: a shuffle buffer that spans
    shards, and repeats until a count is reached, cannot be put back to where it was.
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
        """Without open files, so that explanations of its photos can be pickled and copied."""
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
    """One shard, read forwards; the samples of the current block are at hand in any order."""

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
        """Shard/key and the encoded image; or what is wrong, and None."""
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


def _open_shards(path: str, split: str | None) -> Shards:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise ValueError('data: wds/ needs webdataset; run: pip install "xattn[data]"') from None
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
    """Files and lengths of ``split`` by the ``_info.json`` in ``root``."""
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
            f"data: _info.json of {root} has shard_lengths that are no numbers of samples; correct them, "
            f"or leave them out"
        )
    return urls, lengths


def _count(path: str) -> int:
    """Samples in a local shard by its headers alone; the same grouping as when it is read."""
    from webdataset.tariterators import group_by_keys

    try:
        with tarfile.open(path) as tar:
            names = (m.name for m in tar if m.isreg() and not re.match(r"__[^/]*__($|/)", m.name))
            return sum(
                1 for _ in group_by_keys({"fname": n, "data": b"", "__url__": path} for n in names)
            )
    except (tarfile.TarError, ValueError, EOFError, MemoryError) as error:
        raise ValueError(  # damaged, xz may ask for any memory
            f"data: shard {path} is damaged ({error}); fetch or write it again"
        ) from error
