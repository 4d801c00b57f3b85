"""Labels of photos: from folder names, a table of groups, or a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from xattn.photos.classes import wordnet_ids
from xattn.photos.image_names import SUFFIXES
from xattn.runtime import strict_json
from xattn.runtime.files import printable
from xattn.runtime.stores import StorePath, resolve_place


@dataclass(frozen=True)
class Labels:
    """``index``, a LongTensor (n,), holds the class of each photo, or -1 if it has none; ``names`` are the
    names of the K classes in order, and ``used`` are the numbers of the photos with a class."""

    index: Tensor
    names: list[str]
    used: list[int]


def read_labels(names: Sequence[str], file: str | Path | None = None) -> Labels:
    """Read the classes of the photos with these ``names``, which come from
    :class:`~xattn.photos.base.Photos`.

    Args:
        file: a ``.json`` file with ``{folder: {"group": name or null}}`` or ``{photo: label}``, or a
            ``.csv`` file with lines ``photo,label``. A photo is given by its full name, by its last
            parts ("cat/7.jpg"), or by its file name if that is unique. Null, or an empty cell, leaves a
            photo out. Without a file, the label is the name of the photo's folder.

    Raises:
        ValueError: a photo has no label or two labels; the file is damaged; there are fewer than two
            classes.
        FileNotFoundError: there is no such file.
    """
    found: list[str | None] = (
        [printable(_folder(name)) for name in names]
        if file is None
        else labels_by_photo(names, resolve_place(file, "labels"))
    )
    classes = sorted({c for c in found if c is not None}, key=_natural)
    if len(classes) < 2:
        got = f"only the class {classes[0]!r}" if classes else "no class"
        where = "the folders of the photos" if file is None else file
        raise ValueError(f"labels: {where} name {got}; a classifier needs two or more")
    number = {name: i for i, name in enumerate(classes)}
    index = torch.tensor([-1 if c is None else number[c] for c in found], device="cpu")
    return Labels(index, classes, [i for i, c in enumerate(found) if c is not None])


FOLDERS = "folders"


def true_classes(
    names: Sequence[str], labels: str | Path, class_names: Sequence[str]
) -> list[tuple[int | None, str | None]]:
    """For every photo, (class, its name) if its label is one of the classifier's classes, otherwise (None,
    label).

    Args:
        labels: ``"folders"``, or a file as in :func:`read_labels`. A table with an entry per folder may
            give a "label" as well as a "group"; the label is used if it is a class, and otherwise the
            group. An "index" tells classes with the same name apart. A label is the number of a class, its
            name, one of the comma-separated parts of that name, or, for an ImageNet-1k classifier, its
            WordNet id ("n01440764"), as ImageNet's own folders are named.

    Raises:
        ValueError: a photo has no label; the file is damaged; a label names two classes.
        FileNotFoundError: there is no such file.
    """
    classes: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        for part in {name.lower(), *(p.strip() for p in name.lower().split(","))}:
            classes.setdefault(part, []).append(i)
    for identity, i in wordnet_ids(class_names).items():
        classes.setdefault(identity, [i])
    file = Path(FOLDERS) if str(labels) == FOLDERS else resolve_place(labels, "labels")
    if str(labels) == FOLDERS:
        given: list[tuple[str, Any]] = [(name, printable(_folder(name))) for name in names]
    else:
        given = _given(names, file)
    known: dict[str, tuple[int | None, str | None]] = {}
    for key, value in given:
        if key not in known:
            number, label = _class_of(value, key, classes, len(class_names), file)
            known[key] = (number, label if number is None else class_names[number])
    return [known[key] for key, _ in given]


def _class_of(
    value: Any, key: str, classes: dict[str, list[int]], count: int, file: Path | StorePath
) -> tuple[int | None, str | None]:
    index, texts = None, [value]
    if isinstance(value, dict):
        index, texts = value.get("index"), [value.get("label"), value["group"]]
    found = [text for text in (_label(text, key, file) for text in texts) if text is not None]
    for text in found:
        number = _number(text) if text.isdecimal() else None
        if number is not None and number < count:
            return number, text
        places = classes.get(text.strip().lower(), [])
        exact = [i for i in places if i == index] if len(places) > 1 else places
        if exact:
            return exact[0], text
        if places:
            raise ValueError(
                f"labels: {file} gives {key!r} the label {text!r}, which is the name of the classes "
                f"{', '.join(map(str, places))}; write the number of one"
            )
    return None, found[0] if found else None


def _folder(name: str) -> str:
    folder = PurePath(name).parent.name
    if not folder or PurePath(name).suffix.lower() not in SUFFIXES:
        raise ValueError(f"labels: {name!r} is in no folder that names its class; give a file")
    return folder


def labels_by_photo(names: Sequence[str], file: Path | StorePath) -> list[str | None]:
    """The label text of each photo in a file, see :func:`read_labels`."""
    found = _given(names, file)
    return [_label(e["group"] if isinstance(e, dict) else e, key, file) for key, e in found]


def _given(names: Sequence[str], file: Path | StorePath) -> list[tuple[str, Any]]:
    """(key, value) of every photo in ``file``; the value is a label or a table with a "group"."""
    if not file.is_file():
        raise FileNotFoundError(f"labels: no file {file}; give a .json or .csv file")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        csv_file = file.suffix.lower() == ".csv"
        table: Any = _csv(text) if csv_file else strict_json.parse(text, table=_object)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"labels: {file} is damaged ({error}); mend it") from None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"labels: {file} holds no table of labels; see read_labels")
    keys: list[str | None]
    tables = [key for key, value in table.items() if isinstance(value, dict)]
    if len(tables) == len(table) and all(map(_has_group, table.values())):
        keys = [_folder(n) if _folder(n) in table else None for n in names]
    elif tables:
        raise ValueError(
            f"labels: {file} gives {tables[0]!r} a table and other photos or folders none, or one "
            f"without a 'group'; write {{folder: {{'group': name or null}}}} or {{photo: label}} throughout"
        )
    else:
        keys = _matched(names, table, file)
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise ValueError(
            f"labels: {file} names no label of {len(missing)} of {len(names)} photos, such as "
            f"{missing[0]}; add them, or write null to leave a photo out"
        )
    return [(key, table[key]) for key in keys if key is not None]


def _has_group(value: Any) -> bool:
    return isinstance(value, dict) and "group" in value


def _csv(text: str) -> dict[str, str | None]:
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = [(reader.line_num, row) for row in reader if row]
    for number, row in rows:
        if len(row) != 2:
            raise ValueError(f"line {number} has {len(row)} cells, not photo,label")
    photo = [PurePath(row[0]).suffix.lower() in SUFFIXES for _, row in rows[:2]]
    if photo == [False, True]:  # a header
        rows = rows[1:]
    table: dict[str, str | None] = {}
    lines: dict[str, int] = {}
    for number, (name, value) in rows:
        key, label = name.strip(), value.strip() or None
        if table.setdefault(key, label) != label:
            raise ValueError(
                f"lines {lines[key]} and {number} give {key!r} the labels {table[key]!r} and {label!r}"
            )
        lines.setdefault(key, number)
    return table


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without contradictions; json itself keeps the last of two values for one key."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            raise ValueError(f"it gives {key!r} twice, as {table[key]!r} and {value!r}")
    return table


def _matched(
    names: Sequence[str], table: dict[str, Any], file: Path | StorePath
) -> list[str | None]:
    """The key of every photo: the longest suffix of its name that is in the table."""
    keys: list[str | None] = []
    used: dict[str, str] = {}
    for name in names:
        parts = PurePath(name).parts
        ends = [name, *("/".join(parts[i:]) for i in range(len(parts)))]
        key = next((end for end in ends if end in table), None)
        if key is not None and used.setdefault(key, name) != name:
            raise ValueError(
                f"labels: {key!r} of {file} stands for {used[key]} and {name}; name the folder, too"
            )
        keys.append(key)
    return keys


def _label(value: Any, key: str, file: Path | StorePath) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(
            f"labels: {file} gives {key!r} the label {value!r}; write a name or number"
        )
    return printable(str(value))


def _natural(name: str) -> tuple[int, int, str]:
    """A sort key: numbers by value, before names."""
    number = _number(name)
    return (1, 0, name) if number is None else (0, number, name)


def _number(text: str) -> int | None:
    """A whole number, or None; Python refuses to read thousands of digits."""
    digits = text.removeprefix("-").isdecimal() and len(text) <= 18
    return int(text) if digits else None
