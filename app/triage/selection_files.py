"""Writes a selection of photos as a list of files, a CSV with tags, a pack or a FiftyOne data set.

Since a selection can contain a hundred thousand photos, files are written in parts of a few thousand
photos, and packs photo by photo.
"""

from __future__ import annotations

import csv
import importlib
import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from xattn.app.triage.store import Mark
from xattn.photos.image_names import file_stem
from xattn.runtime.files import atomic_folder

if TYPE_CHECKING:
    from xattn.app.triage.selection import Selection
    from xattn.app.triage.store import Store
    from xattn.packs.explanation import Explanation
    from xattn.packs.reader import Pack

MOST_LISTED = 100_000  # largest number of photos in a list
MOST_WRITTEN = 20_000  # largest number of maps in a pack or data set
CHUNK = 2000
MARKS = ("tags", "rating", "note")  # columns of a CSV
CSV = "/xattn/csv"


def image_list(found: Selection) -> str:
    """A list file of the photos, with one path per line.

    Paths are relative to the folder that was explained, so that ``xattn explain LIST.txt`` can be run in
    this folder. A path that contains a line break or another unprintable character is left out.
    """
    lines = [
        "# Photos of a folder; put this list into the folder that was explained, and pass it to xattn."
    ]
    names: dict[str, None] = {}
    at = found.header.index("image_id")
    for start in range(0, found.count, CHUNK):
        names |= dict.fromkeys(str(line[at]) for line in found.lines(start, CHUNK))
        if len(names) >= MOST_LISTED:
            break
    return "\n".join([*lines, *list_lines(islice(names, MOST_LISTED))]) + "\n"


def list_lines(image_ids: Iterable[str]) -> list[str]:
    """Ids of photos as lines of a list file for ``xattn explain``.

    An id that contains a line break or another unprintable character is left out.
    """
    return [f"./{i}" if i.startswith("#") else i for i in image_ids if i.isprintable()]


def selection_csv(found: Selection, store: Store | None, count: int = CHUNK) -> Iterator[str]:
    """Yield a selection as CSV text, in parts of a few thousand lines.

    Each map has a line with its classes, probabilities and metrics, and with the tags, rating and note of
    its photo. An apostrophe is put before text that a spreadsheet would execute as a formula.
    """
    yield csv_lines([(*found.header, *MARKS)])
    for start in range(0, found.count, count):
        rows, marks = _marked(found, store, start, count)
        each = zip(rows, marks, strict=True)
        yield csv_lines((*row, "; ".join(m.tags), m.rating or "", m.note) for row, m in each)


def _marked(
    found: Selection, store: Store | None, start: int, count: int
) -> tuple[list[tuple[Any, ...]], list[Mark]]:
    """At most ``count`` rows of a selection, beginning with ``start``, and the mark of each row's photo."""
    at, rows = found.header.index("image_id"), found.lines(start, count)
    marks = {} if store is None else store.marks([row[at] for row in rows])
    return rows, [marks.get(row[at], Mark()) for row in rows]


def selection_parquet(found: Selection, store: Store | None) -> bytes:
    """The table of :func:`selection_csv` as a Parquet file; ``tags`` is a list."""
    import pyarrow as pa
    from pyarrow import parquet

    parts = []
    for start in range(0, max(1, found.count), CHUNK):
        rows, own = _marked(found, store, start, CHUNK)
        values = zip(*rows, strict=True) if rows else ((),) * len(found.header)
        columns = {
            name: pa.array(column) for name, column in zip(found.header, values, strict=True)
        }
        columns["tags"] = pa.array([m.tags for m in own], pa.list_(pa.string()))
        columns["rating"] = pa.array([m.rating or None for m in own], pa.int8())
        columns["note"] = pa.array([m.note for m in own], pa.string())
        parts.append(pa.table(columns))
    stream = io.BytesIO()
    # If a part has no value in a column, the column has no type there.
    parquet.write_table(pa.concat_tables(parts, promote_options="permissive"), stream)
    return stream.getvalue()


def csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as lines of CSV; every value is converted by :func:`cell`."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\r\n").writerows(map(cell, row) for row in rows)
    return stream.getvalue()


def cell(value: Any) -> Any:
    """A value as a CSV cell; missing values become empty, and text cannot be read as a formula."""
    if isinstance(value, str):
        return f"'{value}" if value.lstrip()[:1] in ("=", "+", "-", "@") else value
    return "" if value is None or value != value else value


def write_pack(pack: Pack, found: Selection, folder: Path) -> int:
    """Write the maps of a selection as a new pack with thumbnails, and return the number of maps.

    Raises:
        ValueError: there is no map, or there are more than ``MOST_WRITTEN``.
        PackError: a map cannot be read.
        OSError: the folder cannot be written.
    """
    from xattn.packs.writer import pack_writer  # imports torch

    _check_count(found)
    with pack_writer(folder) as writer:
        writer.metrics = {m.key: m._asdict() for m in pack.metrics}
        writer.shares = pack.shares
        for image_id, group in _groups(pack, found):
            writer.add(group, pack.photo_bytes(image_id) if pack.has_photo(image_id) else None)
    return found.count


def _groups(pack: Pack, found: Selection) -> Iterator[tuple[str, list[Explanation]]]:
    """Yield the maps of a selection photo by photo; photos are in the order of their first maps."""
    by_photo: dict[str, list[str]] = {}
    for entry_id in found.ids():
        by_photo.setdefault(pack.key(entry_id)[0], []).append(entry_id)
    for image_id, entry_ids in by_photo.items():
        yield image_id, [replace(pack.explanation(e), source=None) for e in entry_ids]


def _check_count(found: Selection) -> None:
    if not 0 < found.count <= MOST_WRITTEN:
        raise ValueError(
            f"This selection has {found.count:,} maps; 1 to {MOST_WRITTEN:,} can be written. Filter for "
            f"fewer."
        )


# ---------------------------------------------------------------------- FiftyOne


def fiftyone() -> ModuleType | None:
    """The module ``fiftyone``, or None if it is not installed."""
    try:
        return importlib.import_module("fiftyone")
    except ImportError:
        return None


def write_fiftyone(pack: Pack, found: Selection, folder: Path, store: Store | None = None) -> int:
    """Write a selection as a FiftyOne data set (``fo.types.FiftyOneDataset``), and return the number of
    photos.

    Each photo is a sample with its thumbnail, tags, ``note``, ``rating``, ``ground_truth`` and
    ``prediction``. Each map is a ``Heatmap`` in [0, 255] of the photo's size, in a field named after the
    method.

    Raises:
        ValueError: FiftyOne is not installed, there is no map, or there are more than ``MOST_WRITTEN``.
        PackError: a map or a photo cannot be read.
        OSError: the folder cannot be written.
    """
    fo = fiftyone()
    if fo is None:
        raise ValueError(
            "FiftyOne is not installed on the viewer's machine; run: pip install fiftyone"
        )
    _check_count(found)
    dataset = fo.Dataset()
    try:
        with tempfile.TemporaryDirectory() as media, atomic_folder(folder, ()) as temporary:
            groups, taken = _groups(pack, found), set[str]()
            while part := list(islice(groups, CHUNK)):
                marks = {} if store is None else store.marks([image_id for image_id, _ in part])
                dataset.add_samples(
                    [_sample(fo, pack, group, marks, Path(media), taken) for _, group in part]
                )
            dataset.export(
                export_dir=str(temporary), dataset_type=fo.types.FiftyOneDataset, export_media=True
            )
        return len(dataset)
    finally:
        dataset.delete()


def _sample(
    fo: ModuleType,
    pack: Pack,
    group: Sequence[Explanation],
    marks: Mapping[str, Mark],
    media: Path,
    taken: set[str],
) -> Any:
    first = group[0]
    image_id, mark = first.image_id, marks.get(first.image_id, Mark())
    stem = file_stem(image_id, taken)
    photo = media / f"{stem}.jpg"
    photo.write_bytes(pack.photo_bytes(image_id))
    with Image.open(photo) as image:
        size = (image.height, image.width)
    fields: dict[str, Any] = {"image_id": image_id, "file_name": first.file_name}
    if mark.note:
        fields["note"] = mark.note
    if mark.rating:
        fields["rating"] = mark.rating
    if first.facts.label_name:
        fields["ground_truth"] = fo.Classification(label=first.facts.label_name)
    if first.facts.top:
        _, name, probability = first.facts.top[0]
        fields["prediction"] = fo.Classification(label=name, confidence=probability)
    for number, explanation in enumerate(group):
        path = media / f"{stem}.{number}.png"
        values = np.nan_to_num(explanation.on_photo(size)) * 255
        Image.fromarray(values.round().astype(np.uint8)).save(path)
        field = re.sub(r"\W", "_", explanation.method, flags=re.ASCII)
        field = f"{field}_{explanation.target}" if field in fields else field
        fields[field] = fo.Heatmap(
            map_path=str(path), range=[0, 255], label=explanation.target_name
        )
    return fo.Sample(filepath=str(photo), tags=list(mark.tags), **fields)
