"""Labels of photos: from folder names, a table of groups, or a file; and splits that keep classes even."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.photos.images import SUFFIXES
from xattn.runtime import strict_json
from xattn.runtime.files import printable

FOLDS = 5


@dataclass(frozen=True)
class Labels:
    """``index`` LongTensor (n,): the class of every photo, -1 where it has none; ``names`` of the K
    classes in order; ``used``: numbers of the photos with a class."""

    index: Tensor
    names: list[str]
    used: list[int]


class Split(NamedTuple):
    """Numbers of the photos to train on, to stop early by, and to report."""

    train: list[int]
    validation: list[int]
    test: list[int]


def read_groups(paths: Sequence[Path], file: Path) -> dict[Path, str]:
    """The group of every photo that has one, by the name of its folder."""
    if not file.is_file():
        raise FileNotFoundError(f"data: no file {file}; give {{folder: {{'group': name}}}} as JSON")
    classes = strict_json.read(file, "data", "mend it")
    folders = {p.parent.name for p in paths}
    missing = sorted(folders - set(classes)) if isinstance(classes, dict) else []
    if missing:
        raise ValueError(f"data: {file} does not name the folders {', '.join(missing[:5])}")
    if not isinstance(classes, dict) or not all(
        _has_group(classes[name]) and isinstance(classes[name]["group"], str | None)
        for name in folders
    ):
        raise ValueError(
            f"data: {file} has another form; give {{folder: {{'group': name or null}}}} as JSON"
        )
    groups = {p: classes[p.parent.name]["group"] for p in paths}
    return {p: group for p, group in groups.items() if group is not None}


def stratified_folds(groups: Sequence[str], folds: int = FOLDS, seed: int = 0) -> list[list[int]]:
    """Numbers of the photos in each of ``folds`` parts that split every group evenly."""
    rng = random.Random(seed)
    parts: list[list[int]] = [[] for _ in range(folds)]
    dealt = 0
    for name in sorted(set(groups)):
        members = [i for i, group in enumerate(groups) if group == name]
        rng.shuffle(members)
        for i in members:
            parts[dealt % folds].append(i)
            dealt += 1
    return [sorted(part) for part in parts]


def read_labels(names: Sequence[str], file: str | Path | None = None) -> Labels:
    """The classes of photos by their ``names``, as :class:`~xattn.photos.base.Photos` gives them.

    Args:
        file: None takes the name of each photo's folder. A ``.json`` file holds
            ``{folder: {"group": name or null}}`` or ``{photo: label}``, a ``.csv`` file lines
            ``photo,label``. A photo is named by its full name, by its last parts ("cat/7.jpg") or its
            file name, where that is unique. Null, or an empty cell, leaves a photo out.

    Raises:
        ValueError: photos without a label, or with two, a damaged file, or fewer than two classes.
        FileNotFoundError: no such file.
    """
    found: list[str | None] = (
        [printable(_folder(name)) for name in names]
        if file is None
        else _from_file(names, Path(file))
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
    """The class of every photo among a classifier's own, and its name; (None, name) for other labels.

    Args:
        labels: ``"folders"``, or a file as in :func:`read_labels`. Of a table by folder the first of
            its "label" (beside an "index", if two classes have that name) and its "group" counts
            that is a class. A label is a class by its number, by its name, by a part of its name
            between commas, or, of an ImageNet-1k classifier, by its WordNet id ("n01440764"), which
            ImageNet's own folders are named by.

    Raises:
        ValueError: photos without a label, a damaged file, or a label that names two classes.
        FileNotFoundError: no such file.
    """
    classes: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        for part in {name.lower(), *(p.strip() for p in name.lower().split(","))}:
            classes.setdefault(part, []).append(i)
    for identity, i in _wordnet_ids(class_names).items():
        classes.setdefault(identity, [i])
    if str(labels) == FOLDERS:
        given: list[tuple[str, Any]] = [(name, printable(_folder(name))) for name in names]
    else:
        given = _given(names, Path(labels))
    known: dict[str, tuple[int | None, str | None]] = {}
    for key, value in given:
        if key not in known:
            number, label = _class_of(value, key, classes, len(class_names), Path(labels))
            known[key] = (number, label if number is None else class_names[number])
    return [known[key] for key, _ in given]


def _wordnet_ids(class_names: Sequence[str]) -> dict[str, int]:
    """The classes of an ImageNet-1k classifier by WordNet id; {} of any other.

    A classifier is recognised by its class names: timm's, or (with a few exceptions) their first
    synonyms, as in torchvision.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if infer_imagenet_subset({"num_classes": len(class_names)}) != "imagenet-1k":
        return {}
    info = ImageNetInfo("imagenet-1k")
    pairs = zip(class_names, info.label_descriptions(), strict=True)
    alike = sum(name.split(",")[0].lower() == own.split(",")[0].lower() for name, own in pairs)
    ids: list[str] = info.label_names()
    return {identity: i for i, identity in enumerate(ids)} if alike > 0.9 * len(ids) else {}


def _class_of(
    value: Any, key: str, classes: dict[str, list[int]], count: int, file: Path
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


def split(labels: Labels, seed: int = 0, fold: int = 0, folds: int = FOLDS) -> Split:
    """Fold ``fold`` of the labelled photos to report, the next to stop early by, the others to train.

    Raises:
        ValueError: a class too small to be in all three parts.
    """
    if not 0 <= fold < folds or folds < 3:
        raise ValueError(f"fold: got {fold} of {folds}; give 0..{folds - 1} of at least 3 folds")
    classes = [labels.names[labels.index[i]] for i in labels.used]
    small = [f"{name!r} ({count})" for name, count in Counter(classes).items() if count < 3]
    if small:
        raise ValueError(
            f"labels: {len(small)} classes have fewer than 3 photos, such as {small[0]}; a class has "
            f"to be in the training, validation and test parts: give coarser labels or more photos"
        )
    parts = [[labels.used[i] for i in p] for p in stratified_folds(classes, folds, seed)]
    held = {fold, (fold + 1) % folds}
    train = sorted(i for k, part in enumerate(parts) if k not in held for i in part)
    return Split(train, parts[(fold + 1) % folds], parts[fold])


def check_labels(labels: Tensor, index: Sequence[int], classes: int, part: str) -> Tensor:
    """``labels[index]``; a ValueError that names ``part`` for a label that is missing or none of
    0..classes - 1, for no photo at all, and in training for a single class."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: got {labels.dtype} of shape {tuple(labels.shape)}; give a LongTensor (n,)"
        )
    numbers = torch.as_tensor(list(index), dtype=torch.long, device="cpu")
    if not len(numbers):
        raise ValueError(f"{part}: got no photo; give some")
    if int(numbers.min()) < 0 or int(numbers.max()) >= len(labels):
        raise ValueError(f"{part}: got photo {int(numbers.max())}, there are {len(labels)} labels")
    chosen = labels[numbers].long()
    bad = (chosen < 0) | (chosen >= classes)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: photo {int(numbers[at])} of {part} has {int(chosen[at])}, the head has the "
            f"classes 0..{classes - 1}; leave out photos without a label, or create the head with "
            f"more classes"
        )
    if part == "train" and len(chosen.unique()) < 2:
        raise ValueError(
            f"labels: all photos of train have the class {int(chosen[0])}; give two classes or more"
        )
    return chosen


# ---------------------------------------------------------------------- reading


def _folder(name: str) -> str:
    folder = PurePath(name).parent.name
    if not folder or PurePath(name).suffix.lower() not in SUFFIXES:
        raise ValueError(f"labels: {name!r} lies in no folder that names its class; give a file")
    return folder


def _from_file(names: Sequence[str], file: Path) -> list[str | None]:
    found = _given(names, file)
    return [_label(e["group"] if isinstance(e, dict) else e, key, file) for key, e in found]


def _given(names: Sequence[str], file: Path) -> list[tuple[str, Any]]:
    """What a file says of every photo, a label or a table with a "group", and under which name."""
    if not file.is_file():
        raise FileNotFoundError(f"labels: no file {file}; give a .json or .csv file")
    try:
        text = file.read_text(encoding="utf-8-sig")
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
    reader = csv.reader(text.splitlines())
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
    """A JSON object; json itself takes the last of two values of one key."""
    table: dict[str, Any] = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            raise ValueError(f"it gives {key!r} twice, as {table[key]!r} and {value!r}")
    return table


def _matched(names: Sequence[str], table: dict[str, Any], file: Path) -> list[str | None]:
    """The key of every photo: the longest end of its name that the table has."""
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


def _label(value: Any, key: str, file: Path) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(
            f"labels: {file} gives {key!r} the label {value!r}; write a name or number"
        )
    return printable(str(value))


def _natural(name: str) -> tuple[int, int, str]:
    """Numbers by value, before names."""
    number = _number(name)
    return (1, 0, name) if number is None else (0, number, name)


def _number(text: str) -> int | None:
    """A whole number; Python makes none of thousands of digits."""
    digits = text.removeprefix("-").isdecimal() and len(text) <= 18
    return int(text) if digits else None
