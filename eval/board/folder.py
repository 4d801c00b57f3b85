"""Reads and writes the folder of a board, which contains results that other people can check and extend.

    board.json                           networks, photos, columns, seeds, versions, the hash of every file
    tables/<network>.safetensors         the network's scores on masked versions of each photo
    rows/<row>/row.json                  a description of the row and its origin
    rows/<row>/values.csv                row,network,photo,class,column,value
    rows/<row>/maps-<network>.safetensors   maps of the explained class, the second class, random weights
                                            and mosaics
    report-card.csv  board.csv  index.html  audit-<seed>.csv
    state/                               the state for resuming a stopped command; may be deleted

Files may come from other people. Therefore, names are checked before they are used as paths, and no code
from the folder is executed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.eval.evaluation.facts import WHOLE_SIDE
from xattn.eval.metrics.registry import BOARD
from xattn.runtime import strict_json
from xattn.runtime.files import atomic_file, dump_tensors, file_sha256, open_tensors, write_json

FORMAT, SCHEMA = "xattn-board", 1
LARGEST = 2 << 30  # largest size of a file in bytes
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
LONGEST = 64 - len("maps-.safetensors")  # largest length of a network's name
CRITERIA: Mapping[str, tuple[str, ...]] = {
    "shared outcomes": ("squares", "subsets", "monotonicity", "photo-gain"),
    "contrasts": ("class-contrast", "network-contrast", "gridpg"),
    "map-shaped": ("ROAD", "thinned"),
    "planted": ("blind",),
}
"""The columns that may be used for ranks, by criterion; other columns are only shown."""
KINDS = ("code", "maps")
VALUE_TITLES = ("row", "network", "photo", "class", "column", "value")
SIDES = 4096  # largest side of a network's input in pixels


def check_name(argument: str, name: str) -> str:
    """Return ``name`` if it is allowed as a name in the folder of a board; otherwise raise a ValueError."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{argument}: got {name!r:.80}; give a name of up to 64 letters, digits and _ . + -, "
            f"not a path"
        )
    return name


def network_name(backbone_name: str) -> str:
    """The name under which a board stores a network."""
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", backbone_name).strip(".+-")
    if len(name) > LONGEST:
        cut = hashlib.sha256(backbone_name.encode()).hexdigest()[:6]
        name = f"{name[: LONGEST - 7].strip('.+-')}-{cut}"
    return name or "network"


@dataclass(frozen=True, eq=False)
class Board:
    """An open board; ``facts`` contains the contents of ``board.json``.

    The rows can be ranked with :func:`xattn.eval.board.ranks.board_ranks`.
    """

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Board:
        """Open the board in ``folder`` by reading and checking ``board.json``.

        Raises:
            ValueError: there is no board, or it is damaged or was written by another version.
            OSError: the file cannot be read.
        """
        folder = Path(folder)
        path = folder / "board.json"
        if not path.is_file():
            raise ValueError(
                f"board: {folder} has no board.json; give a folder that xattn board made"
            )
        try:
            facts = strict_json.parse(check_file_size(path).read_bytes())
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']!r}")
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"board: {path} is damaged or not a board ({error})") from None
        if facts.get("schema") != SCHEMA:
            raise ValueError(
                f"board: {path} has schema {facts.get('schema')!r}, but this version reads {SCHEMA}; use "
                f"xattn {facts.get('versions', {}).get('xattn', '?')!s:.20}"
            )
        board = cls(folder, facts)
        try:
            _check_facts(facts)
            for network in board.networks:
                board.path(f"rows/row/maps-{check_name('network', network['name'])}.safetensors")
            for row in board.row_names:
                check_name("row", row)
            for key in board.columns:
                check_name("column", key)
            for name in facts["files"]:
                board.path(name)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"board: {path} is damaged ({type(error).__name__}: {error})"
            ) from None
        return board

    # ------------------------------------------------------------------ contents

    @property
    def networks(self) -> list[dict[str, Any]]:
        """The entry of each network, with its name, hashes, size and columns."""
        return self.facts["networks"]  # type: ignore[no-any-return]

    @property
    def row_names(self) -> list[str]:
        return list(self.facts["rows"])

    @property
    def photos(self) -> list[dict[str, Any]]:
        """The entry of each photo, with its ``id`` and the ``sha256`` of its file."""
        return self.facts["photos"]  # type: ignore[no-any-return]

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """The direction and the chance level of each column, by key."""
        return self.facts["columns"]  # type: ignore[no-any-return]

    @property
    def groups(self) -> list[str]:
        """The metric groups that were measured."""
        return [*self.facts["groups"]]

    @property
    def admitted(self) -> list[str]:
        """The keys of the columns that are used for ranks: those in :data:`CRITERIA` that pass the report
        card on every network."""
        return [str(key) for key in self.facts["admitted"]]

    def network(self, name: str) -> dict[str, Any]:
        return next(n for n in self.networks if n["name"] == name)

    def path(self, name: str) -> Path:
        """The path of a file in the folder.

        Raises:
            ValueError: a board cannot contain a file with this name, or the path leads outside the folder.
        """
        parts = str(name).split("/")
        if not all(NAME.fullmatch(part) for part in parts) or len(parts) > 3:
            raise ValueError(f"board: {name!r:.80} is not a file of a board")
        path = self.folder.joinpath(*parts)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"board: {name} is outside {self.folder}")
        return path

    def has(self, row: str, network: str) -> bool:
        """Whether a row has maps for a network."""
        return self.path(f"rows/{row}/maps-{network}.safetensors").is_file()

    def row(self, name: str) -> dict[str, Any]:
        """The contents of a row's ``row.json``.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(f"rows/{name}/row.json")
        try:
            facts = strict_json.parse(check_file_size(path).read_bytes())
            if facts["kind"] not in KINDS:
                raise ValueError(f"kind {facts['kind']!r:.80}")
            trained, hashes = [*map(str, facts["trained_on"])], dict(facts["sha256"])
            return {
                **facts,
                **{"sanity": bool(facts["sanity"]), "trained_on": trained, "sha256": hashes},
            }
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"board: {path} is damaged ({error})") from None

    @cached_property
    def values(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """The values (networks, photos) by row and column; NaN where there is no value."""
        networks = {n["name"]: i for i, n in enumerate(self.networks)}
        photos = {photo["id"]: i for i, photo in enumerate(self.photos)}
        shape = len(networks), len(photos)
        found = {}
        for row in self.row_names:
            table = {key: np.full(shape, np.nan) for key in self.columns}
            for line in self.lines(row):
                try:
                    place = networks[line["network"]], photos[line["photo"]]
                    value = float(line["value"] or "nan")
                    if math.isinf(value):
                        raise ValueError(f"value {value}")
                    table[line["column"]][place] = value
                except (LookupError, ValueError) as error:
                    raise ValueError(f"board: rows/{row}/values.csv is damaged ({error})") from None
            found[row] = table
        return found

    def lines(self, row: str) -> Iterator[dict[str, str]]:
        """Yield the lines of a row's ``values.csv`` as dictionaries."""
        path = self.path(f"rows/{row}/values.csv")
        with check_file_size(path).open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != VALUE_TITLES:
                raise ValueError(f"board: {path} is damaged (titles {reader.fieldnames})")
            yield from reader

    def table(self, network: str) -> dict[str, Tensor]:
        """The table of a network: score drops (photos, masks) in float32 by name, and ``classes`` (photos,
        2).
        """
        path = check_file_size(self.path(f"tables/{network}.safetensors"))
        try:
            with open_tensors(path) as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:
            raise ValueError(f"board: {path} is damaged ({error})") from None

    @contextmanager
    def open_maps(self, row: str, network: str) -> Iterator[StoredMaps]:
        """Context manager that opens the maps of a row for one network."""
        path = check_file_size(self.path(f"rows/{row}/maps-{network}.safetensors"))
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open_tensors(path))
            except Exception as error:
                raise ValueError(f"board: {path} is damaged ({error})") from None
            yield StoredMaps(file, self.facts["whole_maps"])

    def save(self) -> None:
        """Compute the hash of every file, and write ``board.json``."""
        names = [*(f"tables/{n['name']}.safetensors" for n in self.networks)]
        for row in self.row_names:
            names += [f"rows/{row}/row.json", f"rows/{row}/values.csv"]
            names += [f"rows/{row}/maps-{n['name']}.safetensors" for n in self.networks]
        names += ["report-card.csv", "board.csv", "index.html"]
        names += [f"audit-{seed}.csv" for seed in self.facts["audits"]]
        self.facts["files"] = {
            name: file_sha256(self.path(name)) for name in names if self.path(name).is_file()
        }
        write_json(self.folder / "board.json", self.facts)

    def card(self) -> list[dict[str, str]]:
        """The lines of ``report-card.csv`` as dictionaries; empty if there is no report card."""
        path = self.path("report-card.csv")
        if not path.is_file():
            return []
        return list(csv.DictReader(io.StringIO(check_file_size(path).read_text(encoding="utf-8"))))


class StoredMaps:
    """The maps of one row for one network; each map is read when it is needed."""

    def __init__(self, file: Any, whole: int) -> None:
        self._file, self.keys, self._whole = file, set(file.keys()), whole

    def thin(self, photo: int, kind: str) -> bool:
        """Whether a map may have been reduced to area means.

        Raises:
            ValueError: the size or the precision of the map does not fit the board's settings.
        """
        key = f"{photo}/{kind}"
        if key not in self.keys:
            return False
        shape = self._file.get_slice(key).get_shape()
        if len(shape) != 3 or not 0 < max(shape[1:]) <= 4 * SIDES:
            raise ValueError(f"board: map {key} has shape {shape}, but it should be (n, h, w)")
        thin = is_thin(photo, shape, self._whole)
        if thin != (f"{key}/scale" in self.keys) or (thin and max(shape[1:]) > WHOLE_SIDE):
            raise ValueError(
                f"board: the size {shape[1]} x {shape[2]} or the precision of map {key} does not fit "
                f"whole_maps {self._whole}"
            )
        return thin

    def of(self, photo: int, kind: str = "own") -> Tensor | None:
        """The maps (n, h, w) of the photo with index ``photo``, in float32; None if there are none."""
        key = f"{photo}/{kind}"
        if key not in self.keys:
            return None
        values = self._file.get_tensor(key).float()
        scale = f"{key}/scale"
        return values * self._file.get_tensor(scale).float() if scale in self.keys else values


def is_thin(photo: int, shape: Sequence[int], whole: int) -> bool:
    """Whether maps of this shape may have been reduced to area means.

    Such maps are stored as float16 fractions of their largest value. All other maps are stored in float32,
    so that their scores can be recomputed.
    """
    return photo >= whole and max(shape[-2:]) >= WHOLE_SIDE


def write_maps(
    path: Path, maps: Iterator[tuple[int, str, NDArray[np.float32]]], whole: int
) -> None:
    """Write maps, given as (photo, kind, maps (n, h, w)), to a file.

    Maps of the first ``whole`` photos are stored in float32, and so are small maps; see :func:`is_thin`.
    """
    tensors: dict[str, Tensor] = {}
    for photo, kind, values in maps:
        made = torch.from_numpy(values.copy())
        if is_thin(photo, made.shape, whole):
            largest = made.abs().nan_to_num().max().clamp_min(1e-38)
            tensors[f"{photo}/{kind}/scale"] = largest[None]
            made = (made / largest).half()
        tensors[f"{photo}/{kind}"] = made
    write_tensors(path, tensors)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    with atomic_file(path) as temporary:
        dump_tensors(temporary, tensors)


def format_number(value: float) -> str:
    """A number in the format of ``values.csv``; NaN becomes an empty text."""
    return "" if math.isnan(value) else f"{value:.9g}"


def csv_of(lines: Sequence[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise an error if an entry of ``board.json`` is missing, has the wrong type or is out of range."""
    counts = {key: facts[key] for key in ("seed", "batch", "whole_maps", "card_photos")}
    counts |= {f"audits {seed}"[:80]: seed for seed in facts["audits"]}
    for network in facts["networks"]:
        size = [*network["size"], *(network["grid"] or ())]
        counts |= {f"size {i}": side for i, side in enumerate(size)} | {
            "classes": network["classes"]
        }
        if len(network["size"]) != 2 or len(size) not in (2, 4) or not max(size) <= SIDES:
            raise TypeError(f"size {network['size']!s:.80}")
        if not all(isinstance(network[key], str) for key in ("name", "sha256", "task")):
            raise TypeError("a network without a name")
    for key, count in counts.items():
        if type(count) is not int or not 0 <= count < (10**7 if key == "classes" else 2**63):
            raise TypeError(f"{key} {count!r:.80}")
    texts = [*facts["rows"], *facts["admitted"], *(photo["id"] for photo in facts["photos"])]
    texts += [*facts["columns"], *facts["files"].values()]
    if not all(isinstance(text, str) for text in texts) or not facts["photos"]:
        raise TypeError("rows, admitted, photos, columns or files")
    if not set(facts["groups"]) <= set(BOARD):
        raise TypeError(f"groups {facts['groups']!s:.80}")
    for key in (*facts["columns"], *(key for keys in CRITERIA.values() for key in keys)):
        _ = facts["columns"][key]["higher"], float(facts["columns"][key]["chance"] or 0)


def check_file_size(path: Path) -> Path:
    """Return ``path``; raise a ValueError if the file is too large for a board."""
    if path.is_file() and path.stat().st_size > LARGEST:
        raise ValueError(
            f"board: {path} is larger than 2 GB, so it was not written by xattn; give another board"
        )
    return path
