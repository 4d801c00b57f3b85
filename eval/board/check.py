"""Checking a board: hashes, and values recomputed from maps and tables; auditing it: other masks.

A board is refused with the place named where a file is missing, is not the one that was hashed, or holds a
value that its maps and tables do not give. What the map shapes (ROAD, thinned), noise (monotonicity, and so
photo-gain) and half-blind networks need passes, and is vouched for by hashes alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xattn.eval import bootstrap, functional
from xattn.eval.board.folder import SMALL, Board, csv_of, number
from xattn.eval.board.make import board_metrics, check_photos, digest
from xattn.eval.board.page import write_page
from xattn.eval.evaluation.facts import WHOLE_SIDE
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.evaluation.stream import ImageStream
from xattn.eval.metrics.board.class_contrast import ContrastMetric
from xattn.eval.metrics.board.correlation import CorrelationMetric
from xattn.eval.metrics.board.gridpg import GridPGMetric, gridpg_values
from xattn.eval.metrics.board.table import OutcomeTable
from xattn.eval.metrics.measure import sample_seed
from xattn.eval.metrics.registry import REGISTRY
from xattn.eval.metrics.scorer import MaskedScorer
from xattn.photos.sources import limited
from xattn.runtime.files import file_sha256, write_text

RECOMPUTED = (
    *("squares", "subsets", "single-deletion"),
    *("class-contrast", "network-contrast", "gridpg"),
)
CELLS = 20  # values that are recomputed
EXACT, ROUGH = 1e-6, 1e-3  # differences that are allowed of float32 and of float16 maps
AUDITED = ("squares", "subsets")  # whose masks are drawn


def check_board(board: Board, cells: int = CELLS, seed: int | None = None) -> list[str]:
    """What was checked, a line each.

    Args:
        cells: how many values are recomputed, drawn by ``seed`` (None: at random).

    Raises:
        ValueError: the first fault, with its place.
    """
    lines = [_check_files(board), _check_rows(board)]
    rng = random.Random(seed)
    places = list(_recomputable(board))
    chosen = rng.sample(places, min(cells, len(places)))
    for row, network, photo, column in chosen:
        _check_value(board, row, network, photo, column)
    lines.append(f"{len(chosen)} of {len(places)} values recomputed from maps and tables")
    return lines


def _check_files(board: Board) -> str:
    for name, digest_there in board.facts["files"].items():
        path = board.path(name)
        if not path.is_file():
            raise ValueError(f"board: {name} is missing")
        found = file_sha256(path)
        if found != digest_there:
            raise ValueError(
                f"board: {name} was changed: sha256 {found}, and {digest_there} in board.json"
            )
    wanted = {f"tables/{n['name']}.safetensors" for n in board.networks}
    wanted |= {f"rows/{r}/{f}" for r in board.row_names for f in ("row.json", "values.csv")}
    missing = sorted(wanted - set(board.facts["files"]))
    if missing:
        raise ValueError(f"board: board.json has no hash of {missing[0]}")
    return f"{len(board.facts['files'])} files have their hashes"


def _check_rows(board: Board) -> str:
    for row in board.row_names:
        for name, there in board.row(row)["sha256"].items():
            found = file_sha256(board.path(f"rows/{row}/{name}"))
            if found != there:
                raise ValueError(
                    f"board: rows/{row}/{name} was changed: sha256 {found}, and {there} in row.json"
                )
    values = board.values
    folder = board.folder / "rows"
    others = sorted(p.name for p in folder.iterdir() if p.name not in values)
    if others:
        raise ValueError(f"board: rows/{others[0]} is not a row of board.json")
    return f"{len(values)} rows of {len(board.photos)} photos on {len(board.networks)} networks"


def _recomputable(board: Board) -> Iterator[tuple[str, str, int, str]]:
    """Row, network, photo and column of the values that whole maps and tables give."""
    for row, table in board.values.items():
        for n, network in enumerate(board.networks):
            if not board.has(row, network["name"]):
                continue
            with board.open_maps(row, network["name"]) as maps:
                for i in range(len(board.photos)):
                    own = maps.of(i)
                    thin = own is not None and max(own.shape[-2:]) >= WHOLE_SIDE
                    if thin and i >= board.facts["whole_maps"]:
                        continue
                    for key in RECOMPUTED:
                        if not math.isnan(table[key][n, i]):
                            yield row, network["name"], i, key


class _Network:
    """What a table needs of a network that is not there."""

    task: str
    max_forward_batch, score = 1, "probability"

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.task, self._grid = str(facts["task"]), facts["grid"]
        self.backbone: Any = self

    def grid(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self._grid
        return rows, columns

    def logits(self, images: Tensor) -> Tensor:
        raise ValueError("board: the table lacks what this value is made of")

    def probabilities(self, logits: Tensor) -> Tensor:
        return self.logits(logits)

    def answers(self, inputs: Tensor, function: Any = None) -> Tensor:
        return self.logits(inputs)


@dataclass(eq=False)
class _Offline:
    """The tables of one network of a board, without the network."""

    board: Board
    name: str

    def __post_init__(self) -> None:
        self.facts = self.board.network(self.name)
        self._table = self.board.table(self.name)
        self.classes: list[list[int]] = self._table.pop("classes").tolist()
        self._scorer = _Network(self.facts)

    def table(self, photo: int) -> OutcomeTable:
        """What the network answered to the masks of a photo."""
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


def recomputed(board: Board, row: str, network: str, photo: int, column: str) -> float:
    """The value of a column from the maps and the table."""
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
            times = 1 if metric.halved else metric.n
            whole = (times * size[0], times * size[1])
            return float(
                gridpg_values(functional.upsample(mosaic[:, None], whole, "bilinear")[None])
            )
        own = sized("own")
        if own is None:
            return 0.0  # what invalid maps score
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
    with board.open_maps(row, network) as maps:
        own = maps.of(photo)
        exact = own is None or own[0].numel() <= SMALL
    found = recomputed(board, row, network, photo, column)
    if not abs(found - there) <= (EXACT if exact else ROUGH):
        raise ValueError(
            f"board: {row}, {network}, {board.photos[photo]['id']}, {column}: values.csv has {there:.9g}, "
            f"its map and table give {found:.9g}"
        )


# ---------------------------------------------------------------- audit


def audit_board(
    board: Board,
    backbone: Any,
    photos: Any,
    seed: int,
    say: Callable[[str], Any] = lambda line: None,
) -> list[list[str]]:
    """Score the maps of all rows on masks of another seed: the lines of ``audit-<seed>.csv``.

    A row that is worse than on the board's masks "overfits the masks": its paired t interval, of all rows
    and columns together at 95 %, lies below 0. Both are computed from the maps that are kept.

    Raises:
        ValueError: the board's own seed, other photos or another network.
    """
    if seed == board.facts["seed"]:
        raise ValueError(f"seed: {seed} is the board's own; give another")
    files = check_photos(board, limited(photos, None)[0])
    facts = next((n for n in board.networks if n["sha256"] == backbone.fingerprint), None)
    if facts is None:
        raise ValueError(
            f"backbone: {backbone.name} is no network of {board.folder}; give one that is"
        )
    offline = _Offline(board, facts["name"])
    protocol, _ = board_metrics(board.facts["seed"], backbone)
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
                raise ValueError(f"photos: {item.id} looks otherwise than when the board was made")
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
            diff = bootstrap.t_interval(change.tolist(), level)  # of few photos: no resampling
            verdict = "overfits the masks" if diff.hi < 0 and diff.n >= MIN_IMAGES else ""
            means = [bootstrap.mean(before), bootstrap.mean(after), diff.mean, diff.lo, diff.hi]
            shown = [number(float(f"{x:.6g}")) for x in means]
            lines.append([row, network, key, *shown, verdict])
    write_text(board.folder / f"audit-{seed}.csv", csv_of(lines))
    board.facts["audits"] = sorted({*board.facts["audits"], seed})
    fresh = Board(board.folder, board.facts)
    write_page(fresh)
    fresh.save()
    return lines
