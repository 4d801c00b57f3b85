"""Opens numbered photos from files, a Hugging Face dataset, or webdataset shards.

``data`` is a folder, a ``.txt`` list, one image, a list of paths, or a dataset in the notation of
``timm.data`` (the split is "train" by default):

* ``SCAN.nii`` or ``SCAN.nii.gz``: the axial slices of a volume, see :mod:`xattn.photos.volumes`.
* a URL of an object store, ``s3://BUCKET/FOLDER``, ``gs://...`` or ``hf://...``: see
  :mod:`xattn.runtime.stores`. Photos are read when they are needed.
* ``hfds/NAME_OR_PATH[:split]``: a map-style Hugging Face dataset, from the hub or a local folder
  (images, parquet files, or what ``save_to_disk`` wrote). The dataset's image column is found by its type.
* ``wds/PATH[:split]``: webdataset shards in a folder or at a URL, with an ``_info.json`` that gives the
  files and lengths of each split, as ``timm.data`` expects; or local shards named in braces,
  ``wds/PATH/photos-{0000..0031}.tar``, whose samples are counted once by their tar headers.

A local folder named ``hfds`` or ``wds`` is written ``./hfds``. :func:`sample_photos` and
:func:`split_every_nth` select some of the photos, which keep their ids.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.base import Data, Photos
from xattn.photos.image_names import CLIP_FILES, is_volume, photo_ids, walk
from xattn.photos.images import MAX_PIXELS, decode_image, list_images, load_image
from xattn.runtime.files import printable
from xattn.runtime.stores import StorePath, resolve_place

TAIL = 4096  # last bytes of a photo that its description includes


def is_listed(images: Any) -> bool:
    """Whether :func:`open_photos` accepts ``images``; if not, they are pixels or a loader."""
    if isinstance(images, list | tuple):
        return bool(images) and all(isinstance(i, str | Path | StorePath) for i in images)
    return isinstance(images, str | Path | StorePath | Photos)


def open_clips(data: Data) -> Photos:
    """The clips, volumes and .npy arrays given by ``data``, a folder, a ``.txt`` list, a file or a list of
    files, for networks that read them whole.

    Raises:
        ValueError: a folder contains no such file, or the files are in a store. FileNotFoundError: a path
            does not exist.
    """
    if isinstance(data, Photos):
        return data
    given = [data] if isinstance(data, str | Path | StorePath) else data
    places = [resolve_place(p, "images") for p in given]  # type: ignore[arg-type]
    paths = [p for p in places if isinstance(p, Path)]
    if len(paths) < len(places):
        raise ValueError("images: got clips in a store; copy them to a local folder first")
    if len(paths) == 1 and paths[0].is_dir():
        found = sorted(walk(paths[0], CLIP_FILES))
        if not found:
            raise ValueError(
                f"images: no clip in folder {paths[0]}; clips end in .mp4, .avi, .nii.gz, .npy, ..."
            )
        return Files(found, paths[0])
    return Files([path for one in paths for path in list_images(one)])


def _is_folder_of(place: Path | StorePath, listed: Sequence[Path | StorePath]) -> bool:
    """Whether ``place``, which was given for the photos ``listed``, is their folder; queries no store."""
    if isinstance(place, Path):
        return place.is_dir()
    return place.suffix.lower() != ".txt" and place not in listed


def open_photos(data: Data, clips: bool = False) -> Photos:
    """The photos given by ``data`` (see the module), or with ``clips`` the clips (:func:`open_clips`); none
    is read yet.

    Raises:
        ValueError: there is no photo, the split is unknown, the dataset cannot be opened, or the extra
            ``xattn[data]`` is not installed.
        FileNotFoundError: a folder, list file or shard does not exist.

    Example:
        >>> import tempfile
        >>> from xattn import open_photos
        >>> from PIL import Image
        >>> photos = tempfile.mkdtemp()
        >>> for i in range(3):
        ...     Image.new("RGB", (64, 64), (25 * i, 90, 10)).save(f"{photos}/{i}.png")
        >>> len(open_photos(photos))
        3
    """
    if clips:
        return open_clips(data)
    if isinstance(data, Photos):
        return data
    if is_volume(data):
        from xattn.photos.volumes import AxialSlices

        return AxialSlices(data)  # type: ignore[arg-type]
    scheme, _, rest = data.partition("/") if isinstance(data, str) else ("", "", "")
    if scheme.lower() in ("hfds", "wds", "hfids"):
        match = re.fullmatch(r"(.+?)(?::([A-Za-z_][\w+-]*(?:\[[^\]]*\])?))?", rest)
        if match is None:
            raise ValueError(f"data: got {data!r}; give {scheme}/NAME_OR_PATH[:split]")
        if scheme.lower() == "hfds":
            return _open_dataset(match[1], match[2])
        if scheme.lower() == "wds":
            from xattn.photos.shards import open_webdataset

            return open_webdataset(match[1], match[2])
        raise ValueError(
            "data: hfids/ (Hugging Face streaming) does not say how many samples a shard holds, so "
            "a run could not resume; give hfds/ (the same dataset, kept on disk) or wds/"
        )
    if isinstance(data, str | Path | StorePath):
        place, files = resolve_place(data, "images"), list_images(data)
        return Files(files, place if _is_folder_of(place, files) else place.parent)
    listed = list(data) if isinstance(data, Sequence) else data
    if listed == []:
        raise ValueError("data: got an empty list of images; give at least one path")
    if not is_listed(listed):
        kind = type(listed[0] if isinstance(listed, list) else data).__name__
        raise ValueError(
            f"data: got {kind}; photos are read from files here: give a folder, a list of paths, or a "
            f"dataset such as 'hfds/NAME'"
        )
    paths = [resolve_place(p, "images") for p in listed]  # type: ignore[arg-type]
    return Files(paths)


# ---------------------------------------------------------------------- files and rows


class Files(Photos):
    """Image files; ``folder`` is the given folder; ``ids`` are passed if the files are a subset of a larger
    set of photos."""

    def __init__(
        self,
        paths: Sequence[Path | StorePath],
        folder: Path | StorePath | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.paths: list[Any] = list(paths)
        self._folder, self._ids = folder, ids

    @property
    def ids(self) -> Sequence[str]:
        """See :func:`xattn.photos.image_names.photo_ids`."""
        if self._ids is None:
            self._ids = photo_ids(self.paths, self._folder)
        return self._ids

    def part(self, numbers: Sequence[int]) -> Files:
        """Some of the files, with the same ids as in this object."""
        return Files([self.paths[i] for i in numbers], ids=[self.ids[i] for i in numbers])

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def id(self, index: int) -> str:
        return self.ids[index]

    def source(self, index: int) -> Path | StorePath:
        return self.paths[index]  # type: ignore[no-any-return]

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return load_image(self.paths[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for path in self.paths:
            if isinstance(path, StorePath):  # from a listing; nothing is read for it
                text = f"{path.parent.name}/{path.name}:{path.size}:{path.mark};"
                digest.update(printable(text).encode())
                continue
            size = path.stat().st_size if path.is_file() else -1
            digest.update(printable(f"{path.parent.name}/{path.name}:{size};").encode())
            if size > 0:
                digest.update(_end(path, size))
        return {"count": len(self), "sha256": digest.hexdigest()}


def _end(path: Path, size: int) -> bytes:
    """The last bytes of a file, which distinguish files that have the same size but different pixels."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, size - TAIL))
            return stream.read(TAIL)
    except OSError:  # an unreadable photo is skipped and listed when it is needed
        return b""


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
    saved = datasets.load_from_disk(name)  # timm's reader does not open save_to_disk's output
    if not isinstance(saved, dict):
        split = split or str(saved.split)
        saved = {str(saved.split): saved}
    split = split or "train"
    if split not in saved:
        raise ValueError(f"unknown split {split!r}, it has {', '.join(saved)}")
    return saved[split]


def _open_dataset(name: str, split: str | None) -> Rows:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            'data: hfds/ needs datasets, which is not installed; run: pip install "xattn[data]"'
        ) from None
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
        # timm adds an empty column "image" if there is none of that name
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


# ---------------------------------------------------------------------- some of the photos


class PartOfPhotos(Photos):
    """Some of the photos of ``whole``, given by ``numbers``; they are read by number, not streamed."""

    def __init__(self, whole: Photos, numbers: Sequence[int]) -> None:
        self.whole, self.numbers = whole, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.whole.name(self.numbers[index])

    def id(self, index: int) -> str:
        return self.whole.id(self.numbers[index])

    def source(self, index: int) -> Any:
        return self.whole.source(self.numbers[index])

    def load(self, index: int, max_pixels: int | None = MAX_PIXELS) -> Image.Image:
        return self.whole.load(self.numbers[index], max_pixels)

    def describe(self) -> dict[str, Any]:
        text = ",".join(map(str, self.numbers))
        part = {"count": len(self), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        return {**self.whole.describe(), "part": part}

    def close(self) -> None:
        self.whole.close()


def sample_photos(photos: Photos, limit: int, seed: int = 0) -> Photos:
    """Select ``limit`` photos, spread over their folders: one from each folder in turn. ``seed`` determines
    the order of the folders, and of the photos within each. With the same seed, a smaller limit selects the
    first of these photos.

    Without folders, the result is a random sample; of streamed photos, the first ``limit`` are taken.
    """
    numbers: Sequence[int] = range(len(photos))
    if not photos.streamed:
        folders: dict[str, list[int]] = {}
        for i in numbers:
            folders.setdefault(photos.id(i).rpartition("/")[0], []).append(i)
        for name, members in folders.items():
            random.Random(f"{seed}/{name}").shuffle(members)
        names = sorted(folders)
        random.Random(seed).shuffle(names)
        rounds = chain.from_iterable(zip_longest(*(folders[name] for name in names)))
        numbers = [i for i in rounds if i is not None]
    numbers = numbers[:limit]
    return photos.part(numbers) if isinstance(photos, Files) else PartOfPhotos(photos, numbers)


def limit_photos(
    images: Any, limit: int | None, seed: int = 0, clips: bool = False
) -> tuple[Any, int | None]:
    """Apply :func:`sample_photos` to the photos given by ``images``; return the result, and the limit that
    the caller must still apply. Pixels and loaders are returned unchanged, so the caller must take the
    first ``limit`` of them. With ``clips`` the files are clips (:func:`open_clips`).

    Raises:
        ValueError, OSError: as in :func:`open_photos`, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}; give at least 1")
    if not is_listed(images):
        return images, limit
    photos = open_photos(images, clips)
    return (photos if limit is None else sample_photos(photos, limit, seed)), None


def split_every_nth(photos: Photos, n: int) -> tuple[Photos, Photos]:
    """Split off every ``n``-th photo: return all other photos first, then the photos split off. The split
    is the same each time.

    Raises:
        ValueError: there are fewer than ``n`` photos, or they are streamed.
    """
    if photos.streamed:
        raise ValueError(
            "validation: shards cannot be split; name the photos to measure on (--validation)"
        )
    if len(photos) < n:
        raise ValueError(
            f"data: got {len(photos)} photos, one of {n} is kept to measure on; give more, or name "
            f"other photos to measure on (--validation)"
        )
    numbers = range(len(photos))
    kept = set(numbers[n - 1 :: n])
    rest = [i for i in numbers if i not in kept]
    return PartOfPhotos(photos, rest), PartOfPhotos(photos, sorted(kept))
