"""Ranks the rows of a board: decides which rows are verified, and which ranks each of them may have.

    verified     the lower ends of photo-gain, class-contrast and network-contrast are above 0, and that of
                 gridpg is above chance, each at 1 - .05 / number of these columns; this shows that the maps
                 depend on the photo, the class and the network
    places       rank sets of z among the verified rows
    z            median over criteria of the mean over their columns of (mean - median) / IQR

Only columns that passed the report card on every network are used. For each row, columns that are close to
its training objective are left out. There is no verdict with fewer than 8 photos, and no rank with fewer
than 40. A row without values for a network, or for at least half of the photos in a column, is not ranked
either.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval import bootstrap
from xattn.eval.board.folder import CRITERIA, Board
from xattn.eval.evaluation.results import MIN_IMAGES
from xattn.eval.report.aggregate_ranks import standardise
from xattn.eval.report.rank_sets import ALPHA, MIN_RANKED, rank_sets, rank_sets_of_draws

GATES = ("photo-gain", "class-contrast", "network-contrast", "gridpg")
# A row is flagged if it is better in one criterion than in all others by this many IQRs.
APART = 2.0


class RowRank(NamedTuple):
    """The results of a row and its rank on the board.

    Attributes:
        means: the mean and interval of each column.
        columns: the rank set in each column.
        verified: whether the maps depend on photo, class and network; None if there are too few photos.
        class_blind: whether the class contrast is 0 for every photo.
        rank, places: the rank and its rank set; both are None if there are too few photos, if the row is
            not verified, or if the row lacks values in a column.
        z: the score by which rows are ranked; NaN without a rank.
        one_family: if the row is far better in one criterion than in all others, this criterion; else "".
        lacks: the first network of the board for which the row has no values; "" if there is none.
    """

    means: Mapping[str, bootstrap.Interval]
    columns: Mapping[str, tuple[int, int]]
    verified: bool | None
    class_blind: bool
    rank: int | None
    places: tuple[int, int] | None
    z: float
    one_family: str
    lacks: str


def board_ranks(board: Board) -> dict[str, RowRank]:
    """The ranks of all rows, in the order of the board's rows."""
    seed, values, facts = board.facts["seed"], board.values, {}
    for row in board.row_names:
        facts[row] = board.row(row)
    by_photo = {
        row: {key: _mean(table[key]) for key in board.columns} for row, table in values.items()
    }
    means = {
        row: {key: bootstrap.mean_interval(v, seed=seed) for key, v in table.items()}
        for row, table in by_photo.items()
    }
    gates = gates_of(board)
    verified = {row: _verified(board, gates, table, seed) for row, table in by_photo.items()}
    lacks = {row: _lacked(board, table) for row, table in values.items()}
    able = [r for r in board.row_names if verified[r] and not facts[r]["sanity"] and not lacks[r]]
    chosen = [k for keys in CRITERIA.values() for k in keys if k in board.admitted]
    least = len(board.photos) / 2  # fewest values on each network; not required of gridpg
    able = [
        r
        for r in able
        if len(board.photos) >= MIN_RANKED
        and all((~np.isnan(values[r][k])).sum(1).min() >= least for k in chosen if k != "gridpg")
    ]
    trained = {row: set(facts[row]["trained_on"]) for row in able}
    sets, scores, places, flags = _ranked(board, able, chosen, trained, seed)
    found = {}
    for row in board.row_names:
        z = scores.get(row, math.nan)
        found[row] = RowRank(
            means[row],
            {key: of[row] for key, of in sets.items() if row in of},
            verified[row],
            _class_blind(values[row]),
            None if math.isnan(z) else 1 + sum(other > z + 1e-9 for other in scores.values()),
            places.get(row),
            z,
            flags.get(row, ""),
            lacks[row],
        )
    return found


def gates_of(board: Board) -> list[str]:
    """The columns by which rows are verified: those in :data:`GATES` in which at least one row has a value.

    ``gridpg`` has no values if a network has fewer than four classes.
    """
    tables = board.values.values()
    return [key for key in GATES if any(not np.isnan(table[key]).all() for table in tables)]


def _lacked(board: Board, table: Mapping[str, NDArray[np.float64]]) -> str:
    measured = np.array((~np.isnan(np.stack(list(table.values())))).any((0, 2)))
    return next(
        (
            n["name"]
            for n, is_there in zip(board.networks, measured.tolist(), strict=True)
            if not is_there
        ),
        "",
    )


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(networks, photos) -> (photos,), the mean over the networks that have a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(values, 0))


def _verified(
    board: Board, gates: Sequence[str], table: Mapping[str, NDArray[np.float64]], seed: int
) -> bool | None:
    if len(board.photos) < MIN_IMAGES:
        return None
    ends = []
    for key in gates:
        found = bootstrap.mean_interval(table[key], level=1 - ALPHA / len(gates), seed=seed)
        chance = board.columns[key]["chance"] or 0.0
        if found.n == 0 and key != "gridpg":  # only for gridpg can it be that no photo has a value
            return False
        if found.n < MIN_IMAGES:
            return None
        ends.append(found.lo > chance)
    return bool(ends) and all(ends)


def _class_blind(table: Mapping[str, NDArray[np.float64]]) -> bool:
    values = table["class-contrast"][~np.isnan(table["class-contrast"])]
    return bool(len(values)) and bool((values == 0).all())


def _ranked(
    board: Board,
    able: Sequence[str],
    chosen: Sequence[str],
    trained: Mapping[str, set[str]],
    seed: int,
) -> tuple[
    dict[str, dict[str, tuple[int, int]]],
    dict[str, float],
    dict[str, tuple[int, int]],
    dict[str, str],
]:
    """For the rows that can be ranked: the rank sets by column and row, z, the places and the flags."""
    if len(able) < 2 or not chosen:
        return {}, {}, {}, {}
    values = np.array([[board.values[row][key] for key in chosen] for row in able])
    sets = {}
    for c, key in enumerate(chosen):
        ranks = rank_sets(
            values[:, c],
            higher=bool(board.columns[key]["higher"]),
            level=1 - ALPHA / len(chosen),
            seed=seed,
        )
        sets[key] = dict(zip(able, ranks, strict=True))
    signs = [1.0 if board.columns[key]["higher"] else -1.0 for key in chosen]
    z = standardise(signs, values.reshape(len(able), len(chosen), -1)).reshape(values.shape)
    z = np.stack([[_mean(cell) for cell in row] for row in z])  # (rows, columns, photos)
    drawn = bootstrap.resampled_means(z.reshape(-1, z.shape[2]).T, bootstrap.N_RESAMPLES, seed)
    drawn = drawn.reshape(-1, *z.shape[:2])
    for m, row in enumerate(able):
        for c, key in enumerate(chosen):
            if key in trained[row]:
                z[m, c], drawn[:, m, c] = np.nan, np.nan
    whole = np.array([[bootstrap.mean(cell) for cell in row] for row in z])
    families = {
        name: [c for c, key in enumerate(chosen) if key in keys] for name, keys in CRITERIA.items()
    }
    families = {name: places for name, places in families.items() if places}
    scores, of_families = _scores(whole[None], families)
    of_draws, _ = _scores(drawn, families)
    ends = rank_sets_of_draws(scores[0], np.nan_to_num(of_draws, nan=0.0))
    flags = {row: _alone(of_families[0, m], list(families)) for m, row in enumerate(able)}
    z_of = {row: float(scores[0, m]) for m, row in enumerate(able)}
    return sets, z_of, dict(zip(able, ends, strict=True)), flags


def _scores(
    means: NDArray[np.float64], families: Mapping[str, list[int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(R, rows, columns) -> medians over families (R, rows), and means by family (R, rows, families)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        each = np.stack([np.nanmean(means[..., at], axis=2) for at in families.values()], axis=2)
        return np.asarray(np.nanmedian(each, axis=2)), each


def _alone(families: NDArray[np.float64], names: Sequence[str]) -> str:
    """The family that is more than :data:`APART` interquartile ranges ahead of all others, or ""."""
    order = np.argsort(np.nan_to_num(families, nan=-np.inf))
    if len(order) < 2 or not np.isfinite(families).all():
        return ""
    return names[order[-1]] if families[order[-1]] - families[order[-2]] > APART else ""
