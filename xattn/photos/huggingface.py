"""The image column of a map-style Hugging Face dataset, as numbered photos."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from xattn.photos.base import Photos
from xattn.photos.images import MAX_PIXELS, decode_image, load_image


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


def open_dataset(name: str, split: str | None) -> Rows:
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
