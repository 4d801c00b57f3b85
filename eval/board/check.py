"""Checks the hashes of a board's files, recomputes values from maps and tables, and audits with new masks.

A check fails if a file is missing or does not match its hash, or if a value differs from the one computed
from the board's maps and tables; the error names the place. Some values cannot be recomputed without
forward
passes: those whose images depend on the map (ROAD, thinned) or on noise (monotonicity, and therefore
photo-gain), and those of half-blind networks. Only the hashes protect these values, the values of maps that
are stored as area means, the report card and the audits.
"""

from __future__ import annotations

import base64
import io
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.eval import bootstrap, functional
from xattn.eval.board.folder import Board, csv_of, format_number
from xattn.eval.board.make import (
    admitted_columns,
    board_metrics,
    check_photos,
    digest,
    infos_of,
    is_sanity,
    lock_folder,
    metrics_of,
)
from xattn.eval.board.page import render_pages, write_page
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.evaluation.stream import ImageStream
from xattn.eval.metrics.board.class_contrast import ContrastMetric
from xattn.eval.metrics.board.correlation import CorrelationMetric
from xattn.eval.metrics.board.gridpg import GridPGMetric, gridpg_values
from xattn.eval.metrics.board.table import OutcomeTable
from xattn.eval.metrics.measure import sample_seed
from xattn.eval.metrics.registry import REGISTRY
from xattn.eval.metrics.scorer import MaskedScorer
from xattn.photos.sources import limit_photos
from xattn.runtime.files import file_sha256, write_text

RECOMPUTED = (
    *("squares", "subsets", "single-deletion"),
    *("class-contrast", "network-contrast", "gridpg"),
)
KINDS = {
    "class-contrast": ("own", "class"),
    "network-contrast": ("own", "network"),
    "gridpg": ("mosaic",),
}
CELLS = 20  # default number of values to recompute
EXACT = 1e-6  # largest allowed difference between a stored and a recomputed value
# Need other suitable photos, which do not exist for every photo.
COMPARING = ("gridpg", "photo-gain")
RANDOMIZED = ("network-contrast", "blind")  # only for methods that also run on randomised networks
SHOWN = {
    "board.csv": 1e-6,
    "index.html": 1.01e-3,
}  # largest allowed difference of numbers in the text
DECIMAL = re.compile(r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
PICTURE = re.compile(r'base64,([^"]*)"')
AUDITED = ("squares", "subsets")  # columns whose masks are drawn at random


def check_board(board: Board, cells: int = CELLS, seed: int | None = None) -> list[str]:
    """Check a board, and return a report with one line per check.

    Args:
        cells: the number of values to recompute.
        seed: seed for choosing these values; with None, they differ from call to call.

    Raises:
        ValueError: a check failed; the message names the first place that is wrong.
    """
    try:
        return _checked(board, cells, random.Random(seed))
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"board: {board.folder} is damaged ({what:.200})") from error


def _checked(board: Board, cells: int, rng: random.Random) -> list[str]:
    lines = [_check_files(board)]
    there = {row: _places(board, row) for row in board.row_names}
    lines += [_check_rows(board, there), _check_complete(board, there)]
    places, thin = _recomputable(board, there)
    chosen = rng.sample(places, min(cells, len(places)))
    for place in chosen:
        _check_value(board, *place)
    others = sum(map(len, there.values())) - len(places) - thin
    return [
        *lines,
        _check_derived(board),
        f"not recomputed: {others} values that need forward passes, and {thin} values of maps that are "
        f"stored as area means",
        f"{len(chosen)} of {len(places)} values recomputed from maps and tables",
    ]


Place = tuple[str, int, str]  # network, photo, column


def _places(board: Board, row: str) -> set[Place]:
    """The places of all values of a row.

    Raises:
        ValueError: ``values.csv`` contains two values for the same place.
    """
    photos = {photo["id"]: i for i, photo in enumerate(board.photos)}
    found: set[Place] = set()
    for line in board.lines(row):
        place = line["network"], photos[line["photo"]], line["column"]
        if place in found:
            raise ValueError(
                f"board: rows/{row}/values.csv has two lines for {place[0]}, {line['photo']}, {place[2]}"
            )
        found.add(place)
    return found


def _check_files(board: Board) -> str:
    wanted = {f"tables/{n['name']}.safetensors" for n in board.networks}
    wanted |= {f"rows/{r}/{f}" for r in board.row_names for f in ("row.json", "values.csv")}
    wanted |= {"board.csv", "index.html", *(f"audit-{seed}.csv" for seed in board.facts["audits"])}
    if board.path("report-card.csv").is_file():
        wanted.add("report-card.csv")
    files = board.facts["files"]
    for name in sorted(wanted | set(files)):
        path = board.path(name)
        if not path.is_file():
            raise ValueError(f"board: {name} is missing")
        if name not in files:
            raise ValueError(f"board: board.json has no hash of {name}")
        found = file_sha256(path)
        if found != files[name]:
            raise ValueError(
                f"board: {name} was changed: its sha256 is {found}, but board.json has {files[name]}"
            )
    return f"{len(files)} files match their hashes"


def _check_rows(board: Board, there: Mapping[str, set[Place]]) -> str:
    for row, places in there.items():
        facts = board.row(row)
        maps = {f"maps-{network}.safetensors" for network, _, _ in places}
        for name in sorted(maps | set(facts["sha256"])):
            path = board.path(f"rows/{row}/{name}")
            if not path.is_file():
                raise ValueError(f"board: rows/{row}/{name} is missing")
            if name not in facts["sha256"] or f"rows/{row}/{name}" not in board.facts["files"]:
                raise ValueError(f"board: board.json or rows/{row}/row.json has no hash of {name}")
            found, wanted = file_sha256(path), facts["sha256"][name]
            if found != wanted:
                raise ValueError(
                    f"board: rows/{row}/{name} was changed: its sha256 is {found}, but row.json has "
                    f"{wanted}"
                )
        if facts["sanity"] != is_sanity(row):
            raise ValueError(
                f"board: rows/{row}/row.json has sanity {facts['sanity']}, which does not fit its name"
            )
    values = board.values
    folder = board.path("rows")
    others = sorted(p.name for p in folder.iterdir() if p.name not in values)
    if others:
        raise ValueError(f"board: rows/{others[0]} is not a row of board.json")
    return f"{len(values)} rows of {len(board.photos)} photos on {len(board.networks)} networks"


def _check_complete(board: Board, there: Mapping[str, set[Place]]) -> str:
    """Check that no row benefits from leaving out a value.

    Each row must have a line for every column and photo. For a column that compares photos, lines are
    needed only for the photos for which some row has one. In columns with a chance level, no value may be
    blank.
    """
    photos, columns = range(len(board.photos)), infos_of(metrics_of(board.groups))
    for n, network in enumerate(x["name"] for x in board.networks):
        rows = [row for row in board.row_names if board.has(row, network)]
        some: dict[str, set[int]] = {}
        for row in rows:
            for net, photo, key in there[row]:
                if net == network:
                    some.setdefault(key, set()).add(photo)
        for row in rows:
            with board.open_maps(row, network) as maps:
                some.setdefault("gridpg", set()).update(
                    i for i in photos if f"{i}/mosaic" in maps.keys
                )
        for row in rows:
            for key, info in columns.items():
                has = {p for net, p, column in there[row] if (net, column) == (network, key)}
                wanted = some.get(key, set()) if key in COMPARING else set(photos)
                optional = key in RANDOMIZED
                blank = {p for p in has if math.isnan(board.values[row][key][n, p])}
                if info["chance"] is None:
                    valid = key != "monotonicity"
                    blank = {p for p in blank if valid and _is_valid(board, row, network, p)}
                missing = blank | (wanted - has if has or not optional else set())
                if missing:
                    photo = board.photos[min(missing)]["id"]
                    raise ValueError(
                        f"board: {row}, {network}, {photo}, {key}: values.csv has no value"
                    )
    return "no row lacks a value"


def _is_valid(board: Board, row: str, network: str, photo: int) -> bool:
    with board.open_maps(row, network) as maps:
        own = maps.of(photo)
    return own is not None and bool(functional.minmax(own[None])[1])


def _check_derived(board: Board) -> str:
    """Check that everything that is derived from the rows and the report card agrees with them."""
    if board.columns != infos_of(metrics_of()):
        raise ValueError(
            "board: the directions or chance levels of columns differ from those of their metrics"
        )
    if board.admitted != admitted_columns(board, board.card()):
        raise ValueError(
            f"board: admitted is {', '.join(board.admitted) or 'none'}, which does not match "
            f"report-card.csv"
        )
    for name, text in render_pages(board).items():
        if not _alike(board.path(name).read_text(encoding="utf-8"), text, SHOWN[name]):
            raise ValueError(
                f"board: {name} differs from the file that this version makes from the rows"
            )
    return "board.csv, index.html and the columns used for ranks agree with the rows"


def _alike(there: str, made: str, most: float) -> bool:
    """Whether two texts are equal apart from the last digits of numbers and the encoding of pictures, which
    depend on the machine."""
    pictures = [[_pixels(data) for data in PICTURE.findall(text)] for text in (there, made)]
    (a, b) = (DECIMAL.split(PICTURE.sub("", text)) for text in (there, made))
    if a[::2] != b[::2] or len(pictures[0]) != len(pictures[1]):
        return False
    if any(x.shape != y.shape or np.abs(x - y).max() > 1 for x, y in zip(*pictures, strict=True)):
        return False
    pairs = zip(a[1::2], b[1::2], strict=True)
    return all(x == y or abs(float(x) - float(y)) <= most for x, y in pairs)


def _pixels(data: str) -> Any:
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) as image:
        return np.asarray(image).astype(int)


def _recomputable(
    board: Board, there: Mapping[str, set[Place]]
) -> tuple[list[tuple[str, str, int, str]], int]:
    """The values that can be recomputed from tables and full maps, and the number of values that cannot
    because their maps may be stored as area means.

    A value is identified by its row, network, photo and column.
    """
    found, thin = [], 0
    for row, places in there.items():
        for network in board.networks:
            name = network["name"]
            if not board.has(row, name):
                continue
            with board.open_maps(row, name) as maps:
                for net, photo, key in sorted(places):
                    if net != name or key not in RECOMPUTED:
                        continue
                    if any([maps.thin(photo, kind) for kind in KINDS.get(key, ("own",))]):
                        thin += 1
                    else:
                        found.append((row, name, photo, key))
    return found, thin


class _Network:
    """A placeholder for a network that is not available, with the attributes that a table needs."""

    task: str
    max_forward_batch, score = 1, "probability"

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.task, self._grid = str(facts["task"]), facts["grid"]
        self.backbone: Any = self

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._grid
        return rows, columns

    def logits(self, images: Tensor) -> Tensor:
        raise ValueError("board: a table does not contain the masks that a value depends on")

    def probabilities(self, logits: Tensor) -> Tensor:
        return self.logits(logits)

    def score_logits(self, inputs: Tensor, function: Any = None) -> Tensor:
        return self.logits(inputs)


@dataclass(eq=False)
class _Offline:
    """The table of one network of a board, for use without the network itself."""

    board: Board
    name: str

    def __post_init__(self) -> None:
        self.facts = self.board.network(self.name)
        self._table = self.board.table(self.name)
        self.classes: list[list[int]] = self._table.pop("classes").tolist()
        shape = [len(pair) for pair in self.classes]
        if shape != [2] * len(self.board.photos) or not all(
            0 <= a < self.facts["classes"] and -1 <= b < self.facts["classes"]
            for a, b in self.classes
        ):
            raise ValueError(
                f"board: tables/{self.name}.safetensors contains classes that do not exist"
            )
        self._scorer = _Network(self.facts)

    def table(self, photo: int) -> OutcomeTable:
        """The table of the network's scores on masked versions of a photo."""
        a, b = self.classes[photo]
        drops = {}
        for key, values in self._table.items():
            base, slot = key.rsplit(" ", 1)
            drops[f"{base} {(a, b)['ab'.index(slot)]}"] = values[photo]
        clean = torch.zeros(max(a, b) + 1)
        clean[a], clean[b] = 2.0, 1.0
        image = torch.zeros(1).expand(3, *self.facts["size"])
        return OutcomeTable(
            self._scorer, image, sample_seed(self.board.facts["seed"], photo), clean, kept=drops
        )

    def metric(self, key: str) -> Any:
        """The metric of a column, with the board's options."""
        options = self.facts["columns"][key]["options"]
        made = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return REGISTRY.get(key)(**made)


def recompute(board: Board, row: str, network: str, photo: int, column: str) -> float:
    """Recompute one value of a board from the row's maps and the network's table."""
    offline = _Offline(board, network)
    metric, size = offline.metric(column), offline.facts["size"]
    with board.open_maps(row, network) as maps:

        def sized(kind: str) -> Tensor | None:
            values = maps.of(photo, kind)
            if values is None or not bool(functional.minmax(values[None])[1]):
                return None
            return functional.upsample(values[None], (size[0], size[1]), "bilinear")[0]

        if isinstance(metric, GridPGMetric):
            mosaic = maps.of(photo, "mosaic")
            if mosaic is None:
                return metric.chance(metric.columns[0]) or 0.0
            if metric.n > 4 or len(mosaic) != metric.n**2:
                raise ValueError(f"board: {row}, {network}: gridpg has n {metric.n!s:.20}")
            times = 1 if metric.halved else metric.n
            whole = (times * size[0], times * size[1])
            return float(
                gridpg_values(functional.upsample(mosaic[:, None], whole, "bilinear")[None])
            )
        own = sized("own")
        if own is None:
            return 0.0  # the value of an invalid map
        table, (a, b) = offline.table(photo), offline.classes[photo]
        if isinstance(metric, CorrelationMetric):
            value = metric.agreement(table, own, a)
            return value if math.isfinite(value) else 0.0
        assert isinstance(metric, ContrastMetric)
        if column == "class-contrast":
            return metric.of_classes(table, (own, sized("class")), (a, b))
        other = sized("network")
        return metric.agreement(table, own, a) - metric.agreement(table, other, a)


def _check_value(board: Board, row: str, network: str, photo: int, column: str) -> None:
    n = [x["name"] for x in board.networks].index(network)
    there = float(board.values[row][column][n, photo])
    found = recompute(board, row, network, photo, column)
    if not abs(found - there) <= EXACT:
        raise ValueError(
            f"board: {row}, {network}, {board.photos[photo]['id']}, {column}: values.csv has {there:.9g}, "
            f"but the value computed from map and table is {found:.9g}"
        )


# ---------------------------------------------------------------- audit


def audit_board(
    board: Board,
    backbone: Any,
    photos: Any,
    seed: int,
    say: Callable[[str], Any] = lambda line: None,
) -> list[list[str]]:
    """Score the maps of all rows on masks that are drawn with another seed.

    The result is written to ``audit-<seed>.csv`` and returned as a list of lines. A row "overfits the
    masks" if its scores on the new masks are worse than those on the board's masks, that is, if the paired
    t interval of the difference is below 0. The intervals of all rows and columns together have a level of
    95 %. Both scores are computed from the stored maps.

    Raises:
        ValueError: the seed is the board's own, or the photos or the network are not those of the board.
    """
    with lock_folder(board.folder):
        return _audited(Board.open(board.folder), backbone, photos, seed, say)


def _audited(
    board: Board, backbone: Any, photos: Any, seed: int, say: Callable[[str], Any]
) -> list[list[str]]:
    if seed == board.facts["seed"]:
        raise ValueError(f"seed: {seed} is the board's own seed; give another")
    files = check_photos(board, limit_photos(photos, None)[0])
    facts = next((n for n in board.networks if n["sha256"] == backbone.fingerprint), None)
    if facts is None:
        raise ValueError(
            f"backbone: {backbone.name} is not a network of {board.folder}; give one of its networks"
        )
    offline = _Offline(board, facts["name"])
    protocol, _ = board_metrics(board, backbone)
    scorer = MaskedScorer(backbone, board.facts["batch"], protocol.score)
    rows = [
        r
        for r in board.row_names
        if board.path(f"rows/{r}/maps-{facts['name']}.safetensors").is_file()
    ]
    shape = len(AUDITED), len(files), 2
    found = {row: np.full(shape, np.nan) for row in rows}
    stream = ImageStream(files, backbone.preprocessing, "crop")
    metrics = [offline.metric(key) for key in AUDITED]
    for block in stream.blocks(board.facts["batch"]):
        for item in block:
            i = item.position
            if digest(item.image) != facts["views"][i]:
                raise ValueError(
                    f"photos: the pixels of {item.id} have changed since the board was made"
                )
            target = offline.classes[i][0]
            image = item.image.to(backbone.device)
            new = OutcomeTable(scorer, image, sample_seed(seed, i), wanted=(target,))
            tables = offline.table(i), new
            for row in rows:
                with board.open_maps(row, facts["name"]) as maps:
                    own = maps.of(i)
                if own is None or not bool(functional.minmax(own[None])[1]):
                    continue
                sized = functional.upsample(own[None], image.shape[-2:], "bilinear")[0]
                for m, metric in enumerate(metrics):
                    found[row][m, i] = [metric.agreement(t, sized, target) for t in tables]
        say(f"audit: {block[-1].position + 1 if block else 0} of {len(files)} photos")
    return _written(board, facts["name"], seed, found)


def _written(board: Board, network: str, seed: int, found: Mapping[str, Any]) -> list[list[str]]:
    lines = [["row", "network", "column", "board", "audit", "difference", "lo", "hi", "verdict"]]
    for row, values in found.items():
        for m, key in enumerate(AUDITED):
            before, after = values[m].T
            level = 1 - 0.05 / (len(found) * len(AUDITED))
            change = (after - before)[~np.isnan(after - before)]
            if not len(change):
                continue
            diff = bootstrap.t_interval(change.tolist(), level)  # more reliable for few photos
            verdict = "overfits the masks" if diff.hi < 0 and diff.n >= MIN_IMAGES else ""
            means = [bootstrap.mean(before), bootstrap.mean(after), diff.mean, diff.lo, diff.hi]
            shown = [format_number(float(f"{x:.6g}")) for x in means]
            lines.append([row, network, key, *shown, verdict])
    write_text(board.path(f"audit-{seed}.csv"), csv_of(lines))
    board.facts["audits"] = sorted({*board.facts["audits"], seed})
    fresh = Board(board.folder, board.facts)
    write_page(fresh)
    fresh.save()
    return lines
