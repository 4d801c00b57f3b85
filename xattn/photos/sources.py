"""Opens numbered photos from files, a Hugging Face dataset, or webdataset shards.

``data`` is a folder, a ``.txt`` list, one image, a list of paths, or a dataset in the notation of
``timm.data`` (the split is "train" by default):

* ``SCAN.nii`` or ``SCAN.nii.gz``: the axial slices of a volume, see :mod:`xattn.photos.volumes`.
* a URL of an object store, ``s3://BUCKET/FOLDER``, ``gs://...`` or ``hf://...``: see
  :mod:`xattn.runtime.stores`. Photos are read when their turn comes.
* ``hfds/NAME_OR_PATH[:split]``: a map-style Hugging Face dataset, from the hub or a local folder
  (images, parquet files, or what ``save_to_disk`` wrote). Its image column is found by its type.
* ``wds/PATH[:split]``: webdataset shards of a folder or URL whose ``_info.json`` names files and
  lengths of each split, as ``timm.data`` reads it; or local shards named in braces,
  ``wds/PATH/photos-{0000..0031}.tar``, whose samples are counted once by their tar headers.

A local folder named ``hfds`` or ``wds`` is written ``./hfds``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xattn.photos.base import Data, Photos
from xattn.photos.image_files import Files
from xattn.photos.image_names import is_volume
from xattn.photos.images import list_images
from xattn.runtime.stores import StorePath, place_of

SCHEMES = ("hfds", "wds")


def is_stored(data: Any) -> bool:
    """Whether ``data`` names a dataset by a scheme rather than files."""
    return isinstance(data, str) and data.partition("/")[0].lower() in (*SCHEMES, "hfids")


def is_listed(images: Any) -> bool:
    """Whether ``images`` is what :func:`open_photos` takes, rather than pixels or a loader."""
    if isinstance(images, list | tuple):
        return bool(images) and all(isinstance(i, str | Path | StorePath) for i in images)
    return isinstance(images, str | Path | StorePath | Photos)


def _is_folder_of(place: Path | StorePath, listed: Sequence[Path | StorePath]) -> bool:
    """Whether ``place``, which stands for the photos ``listed``, is their folder; no store is asked."""
    if isinstance(place, Path):
        return place.is_dir()
    return place.suffix.lower() != ".txt" and place not in listed


def open_photos(data: Data) -> Photos:
    """The photos that ``data`` stands for (see the module); none is read yet.

    Raises:
        ValueError: no photo, an unknown split, a dataset that cannot be opened, or the extra
            ``xattn[data]`` is not installed.
        FileNotFoundError: a missing folder, list file or shard.
    """
    if isinstance(data, Photos):
        return data
    if is_volume(data):
        from xattn.photos.volumes import AxialSlices

        return AxialSlices(data)  # type: ignore[arg-type]
    if is_stored(data):
        scheme, _, rest = str(data).partition("/")
        match = re.fullmatch(r"(.+?)(?::([A-Za-z_][\w+-]*(?:\[[^\]]*\])?))?", rest)
        if match is None:
            raise ValueError(f"data: got {data!r}; give {scheme}/NAME_OR_PATH[:split]")
        if scheme.lower() == "hfds":
            from xattn.photos.huggingface import open_dataset

            return open_dataset(match[1], match[2])
        if scheme.lower() == "wds":
            from xattn.photos.shards import open_webdataset

            return open_webdataset(match[1], match[2])
        raise ValueError(
            "data: hfids/ (Hugging Face streaming) does not say how many samples a shard holds, so "
            "a run could not resume; give hfds/ (the same dataset, kept on disk) or wds/"
        )
    if isinstance(data, str | Path | StorePath):
        place, files = place_of(data, "images"), list_images(data)
        return Files(files, place if _is_folder_of(place, files) else place.parent)
    paths = [place_of(p, "images") for p in data]  # type: ignore[arg-type]
    if not paths:
        raise ValueError("data: got an empty list of images; give at least one path")
    return Files(paths)
