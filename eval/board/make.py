"""Makes a board, and adds a network or rows to an existing one.

Each network scores the masked photos once; the scores are stored in its table. The values of every row are
then computed from the table and the maps, except in columns whose images depend on the map. A command that
was stopped can be resumed from the state of each network in ``state/``. If a state is missing, as in a copy
of a board, it starts from the network's table.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from xattn.eval.board.folder import (
    CRITERIA,
    FORMAT,
    SCHEMA,
    VALUE_TITLES,
    Board,
    check_name,
    csv_of,
    format_number,
    network_name,
    write_maps,
    write_tensors,
)
from xattn.eval.board.page import write_page
from xattn.eval.evaluation.engine import create_metrics, evaluate
from xattn.eval.evaluation.facts import BoardState, describe
from xattn.eval.evaluation.results import Results, is_baseline
from xattn.eval.evaluation.store import (
    delete_stale_results,
    iterate_maps,
    kept_outcomes,
    seed_outcomes,
)
from xattn.eval.evaluation.stream import ImageStream
from xattn.eval.interfaces import ExplainerFacts
from xattn.eval.leaderboard import (
    Comparison,
    Methods,
    ladder_rows,
    methods_of,
    print_plan,
    randomized_of,
)
from xattn.eval.metrics.registry import BOARD
from xattn.eval.protocol import Protocol, score_of
from xattn.eval.report.report_card import report_card
from xattn.eval.sanity import first_photos
from xattn.eval.sanity.cheats import CHEATS
from xattn.eval.sanity.ladders import ignore_stage
from xattn.explainers.adapters import as_explainers
from xattn.explainers.base import method_title
from xattn.photos.sources import Files, limit_photos
from xattn.runtime.files import file_sha256, folder_lock, write_json, write_text
from xattn.runtime.version import __version__

Say = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class NewRow:
    """The origin of a new row.

    Attributes:
        author: the person who added it.
        sources: the sha256 of each file that was loaded with ``--import``, by file name.
        kind: ``"code"``, or ``"maps"`` if the row was made from existing maps.
    """

    author: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    kind: str = "code"


def make_board(
    folder: Path,
    job: Comparison,
    photos: Any,
    *,
    limit: int | None = None,
    name: str = "",
    card_photos: int = 60,
    groups: Sequence[str] = BOARD,
    about: NewRow | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Board:
    """Make a board from the methods and the network of ``job``.

    If the board already exists, add the network to it, or finish an earlier command that was stopped.

    Args:
        photos: photo files. If there are more than ``limit``, a sample is drawn with the job's seed.
        limit: the largest number of photos.
        name: the board's name; by default, the name of its folder.
        card_photos: the number of photos for the report card, counted from the first.
        groups: the metric groups to measure, from those that ``--metrics board`` includes.
        about: the origin of the rows.

    Raises:
        ValueError: a group is unknown or not available for boards; a photo is not a file or cannot be read;
            or the existing board has different photos or settings.
    """
    for group in groups:
        if group not in BOARD:
            raise ValueError(f"groups: got {group!r:.80}; choose among {', '.join(BOARD)}")
    groups = [group for group in BOARD if group in groups]
    files = _files(limit_photos(photos, limit, job.seed)[0])
    with lock_folder(folder):
        if (folder / "board.json").is_file():
            board = Board.open(folder)
            files = check_photos(board, files)
            _check_settings(board, job, card_photos, groups)
        else:
            board = Board(
                folder, _new_facts(files, job, name or folder.resolve().name, card_photos, groups)
            )
        network = _network(board, job, files)
        methods = methods_of(job, first_photos(files, job.backbone, job.view))
        for row, reason in methods.refused.items():
            say(f"left out {row}: {reason}")
        randomized = _on_random(board, job, methods)
        _add_rows(
            board,
            job,
            network,
            files,
            methods.explainers,
            randomized,
            about or NewRow(),
            progress,
            say,
        )
        _finish(board)  # if the report card is interrupted, the board is complete except for ranks
        tests = _card(board, job, network, files, card_photos, progress, say)
        _admit(board, network["name"], tests)
        _finish(board)
    return board


def join_board(
    folder: Path,
    job: Comparison,
    photos: Any,
    methods: Mapping[str, Any] | None = None,
    *,
    about: NewRow | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> Board:
    """Add rows to a board: the methods of ``job``, or, if given, ``methods`` (by row name).

    Raises:
        ValueError: the photos, the network or the settings differ from those of the board, or it already
            has a row with such a name.
    """
    Board.open(folder)
    with lock_folder(folder):
        board = Board.open(folder)
        files = check_photos(board, _files(limit_photos(photos, None)[0]))
        settings = {"seed": board.facts["seed"], "max_forward_batch": board.facts["batch"]}
        job = replace(job, **settings)
        if network_name(job.backbone.name) not in [n["name"] for n in board.networks]:
            raise ValueError(
                f"backbone: {job.backbone.name} is not a network of {folder}; give one of its "
                "networks, or add this one with xattn board make"
            )
        network = _network(board, job, files)
        if methods is None:
            made = methods_of(job, first_photos(files, job.backbone, job.view))
            named = [*made.recipes, *(r for r in made.explainers if not is_sanity(r))]
            explainers = {r: made.explainers[r] for r in dict.fromkeys(named)}
            randomized = {r: f for r, f in _on_random(board, job, made).items() if r in explainers}
        else:
            explainers, randomized = as_explainers(methods, job.backbone, job.max_forward_batch), {}
        for row in filter(is_sanity, explainers):
            raise ValueError(
                f"row: {row} is the name of a sanity row; give another name with --row"
            )
        there = [r for r in explainers if r in board.row_names and board.has(r, network["name"])]
        if there:
            raise ValueError(
                f"row: {', '.join(there)} is already a row of {folder}; give another name with --row"
            )
        _add_rows(
            board, job, network, files, explainers, randomized, about or NewRow(), progress, say
        )
        _finish(board)
    return board


def is_sanity(row: str) -> bool:
    """Whether a row is a sanity row, which explains nothing or explains a network with random weights."""
    return is_baseline(row) or row in CHEATS


def board_metrics(board: Board, backbone: Any) -> tuple[Protocol, list[Any]]:
    """The protocol and the metrics of a board for one of its networks."""
    protocol = Protocol(score_of(backbone), seed=board.facts["seed"], invalid="chance")
    mean = tuple(backbone.preprocessing.mean)
    return protocol, create_metrics(board.groups, protocol, mean, backbone)


# ---------------------------------------------------------------- photos, networks, settings


def _files(photos: Any) -> Files:
    if not isinstance(photos, Files) or not all(isinstance(p, Path) for p in photos.paths):
        raise ValueError("photos: a board needs files on disk; give photos or folders of photos")
    return photos


def check_photos(board: Board, files: Files) -> Files:
    """Find the board's photos among ``files``, and return them in the order of the board.

    Raises:
        ValueError: a photo is missing, or its file has changed.
    """
    places = {name: i for i, name in enumerate(files.ids)}
    for photo in board.photos:
        if photo["id"] not in places:
            raise ValueError(f"photos: {photo['id']} is missing; give the photos of {board.folder}")
        found = file_sha256(files.paths[places[photo["id"]]])
        if found != photo["sha256"]:
            raise ValueError(
                f"photos: {photo['id']} has sha256 {found}, but the board has {photo['sha256']}; give "
                f"the same file"
            )
    return files.part([places[photo["id"]] for photo in board.photos])


def _new_facts(
    files: Files, job: Comparison, name: str, card_photos: int, groups: Sequence[str]
) -> dict[str, Any]:
    versions = {
        "xattn": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    photos = [
        {"id": i, "sha256": file_sha256(path)}
        for i, path in zip(files.ids, files.paths, strict=True)
    ]
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "name": name,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "seed": job.seed,
        "batch": job.max_forward_batch,
        "whole_maps": job.maps,
        "card_photos": card_photos,
        "groups": [*groups],
        "photos": photos,
        "networks": [],
        "columns": {},
        "rows": [],
        "admitted": [],
        "audits": [],
        "files": {},
    }


def _check_settings(board: Board, job: Comparison, card_photos: int, groups: Sequence[str]) -> None:
    given = {
        "seed": job.seed,
        "batch": job.max_forward_batch,
        "whole_maps": job.maps,
        "card_photos": card_photos,
        "groups": [*groups],
    }
    for key, value in given.items():
        if board.facts[key] != value:
            raise ValueError(
                f"{key}: got {value}, but {board.folder} has {board.facts[key]}; give the same value"
            )


def _network(board: Board, job: Comparison, files: Files) -> dict[str, Any]:
    """The board's entry for the job's network, which is added if the board does not have it.

    Raises:
        ValueError: the board has a different network with this name, or a photo cannot be read.
    """
    backbone, name = job.backbone, network_name(job.backbone.name)
    protocol, metrics = board_metrics(board, backbone)
    columns = {}
    for metric in metrics:
        for c in metric.columns:
            info = metric.info[c.metric]
            options = metric.column_options(c)
            columns[c.key] = {
                "protocol": protocol.metric_id(*c, options, info.formula),
                "options": options,
                "group": type(metric).__name__,
            }
    stream = ImageStream(files, backbone.preprocessing, "crop", job.max_pixels)
    views, size = [], (0, 0)
    for block in stream.blocks(job.max_forward_batch):
        views += [digest(item.image) for item in block]
        size = (block[0].image.shape[-2], block[0].image.shape[-1]) if block else size
    if stream.skipped:
        skipped = next(iter(stream.skipped.values()))
        raise ValueError(f"photos: {skipped.id} cannot be read ({skipped.reason}); leave it out")
    grid = [*backbone.grid(*size)] if backbone.has_grid else None
    made = {
        "name": name,
        "sha256": backbone.fingerprint,
        "task": backbone.task,
        "classes": backbone.num_classes,
        "preprocessing": repr(backbone.preprocessing),
        "size": [*size],
        "grid": grid,
        "protocol": protocol.id,
        "columns": columns,
        "views": views,
    }
    known = next((n for n in board.networks if n["name"] == name), None)
    for key, value in made.items() if known else ():
        if known[key] != value:  # type: ignore[index]
            got, wanted = _differing(value, known[key])  # type: ignore[index]
            raise ValueError(
                f"{key}: got {got}, but {board.folder} has {wanted} for {name}; use the same network, "
                f"settings and version"
            )
    if known is None:
        board.networks.append(made)
        board.columns.update(infos_of(metrics_of()))
    return known or made


def metrics_of(groups: Sequence[str] = BOARD) -> list[Any]:
    """The metrics of some groups; by default, of all groups that a board can have."""
    return create_metrics(groups, Protocol(invalid="chance"), (0.5,) * 3)


def infos_of(metrics: list[Any]) -> dict[str, dict[str, Any]]:
    """The direction and the chance level of each column, by key."""
    return {
        c.key: {"higher": metric.info[c.metric].higher_is_better, "chance": metric.chance(c)}
        for metric in metrics
        for c in metric.columns
    }


def _differing(got: Any, wanted: Any) -> tuple[str, str]:
    """The values of two settings at the first place where they differ, as short texts."""
    if isinstance(got, dict) and isinstance(wanted, dict):
        key = next(k for k in {**wanted, **got} if got.get(k) != wanted.get(k))
        return f"{key} {got.get(key)!s:.200}", f"{wanted.get(key)!s:.200}"
    if isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        i = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
        return f"{got[i]!s:.80} at {i}", f"{wanted[i]!s:.80}"
    return f"{got!s:.200}", f"{wanted!s:.200}"


def digest(image: Tensor) -> str:
    """A hash of a preprocessed photo (3, H, W) in [0, 1], computed after rounding it to 8 bits."""
    import hashlib

    pixels = (image * 255).round().to(torch.uint8).contiguous().numpy()
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Context manager that locks the folder of a board, so that only one command works in it.

    Raises:
        ValueError: another command holds the lock, or the state in the folder was copied from elsewhere.
    """
    state = folder / "state"
    if state.is_symlink():
        raise ValueError(f"board: {state} is a link; delete it")
    state.mkdir(parents=True, exist_ok=True)
    with folder_lock(state) as alone:
        if alone is False:
            raise ValueError(
                f"board: another command is working in {folder}; wait until it has finished"
            )
        _check_owned(state)
        yield


def _check_owned(state: Path) -> None:
    """Raise a ValueError if the folder ``state`` was copied together with the board.

    The contents of a state are trusted, so only a state that was made in this place may be used.
    """
    owner = state / "owner"
    if not any(state.iterdir()):
        mark_state(state)
    there = owner.is_file() and not owner.is_symlink() and owner.read_text(encoding="utf-8")
    if not (state / "mark").is_file() or there != _mark_of(state):
        raise ValueError(
            f"board: {state} was copied from elsewhere; delete it, and it will be made again"
        )


def mark_state(state: Path) -> None:
    """Mark a folder of states as made in this place, so that a copy of the folder is recognised."""
    (state / "mark").touch()
    write_text(state / "owner", _mark_of(state))


def _mark_of(state: Path) -> str:
    """Properties of the file ``mark`` that change when it is copied or unpacked and cannot be forged."""
    mark = (state / "mark").lstat()
    return f"{mark.st_ino} {mark.st_ctime_ns}"


# ---------------------------------------------------------------- measuring


def _on_random(board: Board, job: Comparison, methods: Methods) -> dict[str, Any]:
    """Functions that run the method of each row on randomised networks.

    Methods that do not use a network give the same maps as without randomisation.
    """
    metrics = board_metrics(board, job.backbone)[1]
    found = {
        row: on_random
        for row, on_random in randomized_of(job, methods.recipes, metrics).items()
        if row in methods.explainers
    }
    readless = {row: methods.explainers[row].attribute for row in ("random", "centre")}
    return {**found, **{row: ignore_stage(f) for row, f in {**CHEATS, **readless}.items()}}


def _add_rows(
    board: Board,
    job: Comparison,
    network: Mapping[str, Any],
    files: Files,
    explainers: Mapping[str, Any],
    randomized: Mapping[str, Any],
    about: NewRow,
    progress: bool,
    say: Say,
) -> None:
    """Measure rows on one network, and write the network's table and the rows' files."""
    rows = dict(explainers)
    if any(map(is_sanity, rows)):  # the command makes a board and does not just add rows
        rows = {**rows, **as_explainers(CHEATS, job.backbone, job.max_forward_batch), **rows}
    for row in rows:
        check_name("row", row)
    state = _state(board, network["name"])
    fresh = [r for r in rows if r not in board.row_names or not board.has(r, network["name"])]
    delete_stale_results(state, {r: [describe(rows[r]), dict(about.sources)] for r in fresh})
    protocol, metrics = board_metrics(board, job.backbone)
    tabled = board.path(f"tables/{network['name']}.safetensors").is_file()
    print_plan(job, rows, metrics, files, None, 1, say, tabled)
    results = evaluate(
        job.backbone,
        rows,
        files,
        metrics=metrics,
        protocol=protocol,
        max_forward_batch=job.max_forward_batch,
        max_pixels=job.max_pixels,
        progress=progress,
        randomized={row: f for row, f in randomized.items() if row in rows},
        again_limit=None,
        state=state,
        kept_maps=BoardState(board.facts["whole_maps"]),
    )
    _write_table(board, network["name"], results, state)
    for row in rows:
        if about.kind == "maps":
            _check_constant(row, results)
        _write_row(board, network["name"], row, rows[row], results, state, about)
        if row not in board.row_names:
            board.facts["rows"].append(row)


def _check_constant(row: str, results: Results) -> None:
    """Raise a ValueError if more than 5 % of the existing maps of a row are invalid."""
    method = results.methods[row]
    bad = int((~method.valid).sum())
    if bad > 0.05 * len(method.valid):
        why = next(iter(method.reasons.values()), "constant")
        raise ValueError(
            f"row: {bad} of {len(method.valid)} maps of {row} are invalid ({why}); at most 5 % may be "
            f"invalid"
        )


def _state(board: Board, network: str, card: bool = False) -> Path:
    """The path of a network's state. A new state starts with the contents of the network's table."""
    path = board.folder / "state" / f"{'card-' if card else ''}{network}.sqlite"
    table = board.folder / "tables" / f"{network}.safetensors"
    if not path.is_file() and table.is_file():
        seed_outcomes(path, _drops_of(board, network))
    return path


def _drops_of(board: Board, network: str) -> Iterator[tuple[int, str, Tensor]]:
    table = board.table(network)
    classes = table.pop("classes").tolist()
    for key, values in table.items():
        base, slot = key.rsplit(" ", 1)
        for position, row in enumerate(values):
            if bool(row.isfinite().all()):
                yield position, f"{base} {classes[position]['ab'.index(slot)]}", row


def _write_table(board: Board, network: str, results: Results, state: Path) -> None:
    """Write the score drops in a state as a table, unless the table exists.

    The table contains the drops of the explained class (a) and of the second class (b).
    """
    path = board.path(f"tables/{network}.safetensors")
    if path.is_file():
        return
    count = len(results.images)
    found: dict[str, dict[int, dict[int, Tensor]]] = {}
    for position, key, drops in kept_outcomes(state):
        base, target = key.rsplit(" ", 1)
        if position < count:
            found.setdefault(base, {}).setdefault(position, {})[int(target)] = drops
    classes = torch.tensor([[image.target, -1] for image in results.images])
    for of_list in found.values():
        for position, by_class in of_list.items():
            for target in by_class:
                if target != classes[position, 0]:
                    classes[position, 1] = target
    tensors = {"classes": classes}
    for base, of_list in found.items():
        length = len(next(iter(next(iter(of_list.values())).values())))
        for slot in (0, 1):
            rows = [of_list.get(i, {}).get(int(classes[i, slot])) for i in range(count)]
            if any(row is not None for row in rows):
                nothing = torch.full((length,), torch.nan)
                stacked = [nothing if row is None else row for row in rows]
                tensors[f"{base} {'ab'[slot]}"] = torch.stack(stacked)
    write_tensors(path, tensors)


def _write_row(
    board: Board,
    network: str,
    row: str,
    explainer: Any,
    results: Results,
    state: Path,
    about: NewRow,
) -> None:
    """Write ``values.csv``, the maps and ``row.json`` of one row; values for other networks are kept."""
    method = results.methods[row]
    path = board.path(f"rows/{row}/values.csv")
    others = [tuple(line.values()) for line in board.lines(row)] if path.is_file() else []
    fresh = [
        (row, network, image.id, str(image.target), column.key, format_number(float(values[i])))
        for i, image in enumerate(results.images)
        for column, values in method.values.items()
        if method.measured[column][i]
    ]
    order = {n["name"]: i for i, n in enumerate(board.networks)}
    lines = [line for line in others if line[1] != network and line[1] in order] + fresh
    lines.sort(key=lambda line: order[line[1]])
    write_text(path, csv_of([VALUE_TITLES, *lines]))
    maps = board.path(f"rows/{row}/maps-{network}.safetensors")
    count = len(results.images)
    kept = (found for found in iterate_maps(state, row) if found[0] < count)
    write_maps(maps, kept, board.facts["whole_maps"])
    facts = ExplainerFacts.of(explainer)
    trained = [c.key for c in results.columns if results.trained_on(row, c)]
    file = board.path(f"rows/{row}/row.json")
    seconds = method.seconds / max(1, count)
    known = board.row(row) if file.is_file() else {"seconds": {}, "sha256": {}}
    hashes = {maps.name: file_sha256(maps), path.name: file_sha256(path)}
    record = {
        "row": row,
        "kind": about.kind,
        "sanity": is_sanity(row),
        "author": about.author,
        "title": method_title(row),
        "explainer": describe(explainer),
        "xattn": __version__,
        "sources": dict(about.sources),
        "objective": method.objective,
        "trained_on": trained,
        "passes": facts.forwards,
        "seconds": {**known["seconds"], network: float(f"{seconds:.3g}")},
        "invalid": int((~method.valid).sum()),
        "failed": "; ".join(dict.fromkeys(method.failed.values()))[:500],
        "sha256": {**known["sha256"], **hashes},
    }
    write_json(file, record)


# ---------------------------------------------------------------- report card


def _card(
    board: Board,
    job: Comparison,
    network: Mapping[str, Any],
    files: Files,
    count: int,
    progress: bool,
    say: Say,
) -> list[list[object]]:
    """Make the report card of one network on the first ``count`` photos, and return its lines."""
    if count == 0:
        return []
    photos = files.part(range(min(count, len(files))))
    seed = board.facts["seed"]
    made, anchors = ladder_rows(job.backbone, photos, "crop", seed, job.max_forward_batch)
    protocol, metrics = board_metrics(board, job.backbone)
    say(f"report card: {len(made.methods)} degraded or unchanged methods on {len(photos)} photos")
    print_plan(job, made.methods, metrics, photos, None, 1, say, tabled=True)
    found = evaluate(
        job.backbone,
        made.methods,
        photos,
        metrics=metrics,
        protocol=protocol,
        max_forward_batch=job.max_forward_batch,
        max_pixels=job.max_pixels,
        progress=progress,
        randomized=made.randomized,
        again_limit=None,
        state=_state(board, network["name"], card=True),
        kept_maps=BoardState(0),
    )
    card = report_card(found, anchors)
    network_of: list[list[object]] = [[network["name"], *line] for line in card.csv_lines()[1:]]
    return network_of


def _admit(board: Board, network: str, lines: list[list[object]]) -> None:
    """Write the report card, and record which columns pass on all networks.

    ``lines`` are the new lines of one network; those of other networks are kept.
    """
    titles = ("network", "metric", "test", "value", "lo", "hi", "passed")
    known = [[*line.values()] for line in board.card() if line["network"] != network]
    every = [*known, *([*line] for line in lines)]
    if not every:
        return
    rows = [
        [format_number(cell) if isinstance(cell, float) else cell for cell in line]
        for line in every
    ]
    write_text(board.path("report-card.csv"), csv_of([titles, *rows]))
    board.facts["admitted"] = admitted_columns(board, board.card())


def admitted_columns(board: Board, card: list[dict[str, str]]) -> list[str]:
    """The keys of the columns that pass on both ladders of a report card for every network."""
    passed = {(x["network"], x["metric"], x["test"]) for x in card if x["passed"] == "1"}
    wanted = [(n["name"], x) for n in board.networks for x in ("ladder cells", "ladder photo")]
    ranked = [key for keys in CRITERIA.values() for key in keys]
    return [key for key in ranked if all((n, key, ladder) in passed for n, ladder in wanted)]


def _finish(board: Board) -> None:
    """Write the files that are derived from all rows, and finally ``board.json``."""
    fresh = Board(board.folder, board.facts)  # does not use cached values
    write_page(fresh)
    fresh.save()
