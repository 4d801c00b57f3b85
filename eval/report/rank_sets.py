"""Computes rank sets: the ranks that a method may have in a column, with joint confidence for all methods.

    m is better than n  if  d_mn > c se_mn,    d_mn = mean over photos of v_m - v_n
    c = quantile over resamples of  max_{m != n} |d*_mn - d_mn| / se_mn
    rank set of m = [1 + #{n better than m}, M - #{n worse than m}]

Photos are resampled; * marks a resample. se_mn is the standard deviation of the paired differences divided
by the square root of the number of photos. If c is the .95 quantile, then in 95 % of repetitions, the sets
of all methods contain their true ranks at the same time, as in Mogstad et al. 2024, Review of Economic
Studies. If there are several columns, each is judged at the level 1 - .05 / number of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xattn.eval import bootstrap
from xattn.eval.evaluation.results import Results
from xattn.eval.metrics.base import Column

MIN_RANKED = 40
"""If there are fewer photos, methods are not ranked."""
ALPHA = 0.05
_PAIRS = 500  # pairs of methods that are compared at a time

Ranks = list[tuple[int, int]]


def rank_sets(
    values: ArrayLike,
    *,
    higher: bool = True,
    level: float = 1 - ALPHA,
    n_resamples: int = bootstrap.N_RESAMPLES,
    seed: int = 0,
) -> Ranks:
    """The best and the worst rank that each of M methods may have, where 1 is the best.

    >>> rng = np.random.default_rng(0)
    >>> good, bad = 1 + rng.normal(size=50), rng.normal(size=50)
    >>> rank_sets([bad, good, good])
    [(3, 3), (1, 2), (1, 2)]

    Args:
        values: (M, photos), or (M, networks, photos), where the values of all networks on a photo are
            resampled together. NaN means that a method has no value. Two methods are compared on the photos
            and networks for which both have a value.
        higher: whether larger values are better.
        level: joint confidence of all sets. With fewer than about 40 photos, the sets are too narrow for
            this level.

    Raises:
        ValueError: ``values`` has another number of dimensions, or is empty.
    """
    units = np.asarray(values, dtype=np.float64)
    if units.ndim not in (2, 3) or not units.size:
        raise ValueError(f"values: got {units.shape}; give (methods, photos)")
    units = (1 if higher else -1) * units.reshape(len(units), -1, units.shape[-1])
    first, second = np.triu_indices(len(units), 1)
    diffs, errors = np.zeros(len(first)), np.full(len(first), np.inf)
    largest = np.zeros(n_resamples)
    alike = bool((np.isnan(units) == np.isnan(units[:1])).all())
    whole = bootstrap.resampled_means(_mean(units), n_resamples, seed) if alike else None
    for start in range(0, len(first), _PAIRS):
        part = slice(start, start + _PAIRS)
        a, b = first[part], second[part]
        by_photo = _mean(units[a] - units[b])  # (photos, pairs)
        if whole is not None:
            drawn = whole[:, a] - whole[:, b]
        else:
            drawn = bootstrap.resampled_means(by_photo, n_resamples, seed)
        count = (~np.isnan(by_photo)).sum(0)
        diffs[part] = [bootstrap.mean(pair) for pair in by_photo.T]
        centred = np.where(count, by_photo - diffs[part], 0.0)
        spread = np.sqrt(np.nansum(centred**2, 0) / np.maximum(count - 1, 1))
        errors[part] = np.where(count > 1, spread / np.sqrt(np.maximum(count, 1)), np.inf)
        largest = np.maximum(largest, _largest(drawn, diffs[part], errors[part]))
    return _places(len(units), diffs, errors, float(np.quantile(largest, level)))


def rank_sets_of_draws(
    values: NDArray[np.float64], drawn: NDArray[np.float64], level: float = 1 - ALPHA
) -> Ranks:
    """Rank sets of M numbers, where larger is better, from their values ``drawn`` (R, M) in R resamples.

    Here, se is the standard deviation over the resamples.
    """
    first, second = np.triu_indices(len(values), 1)
    if not len(first):
        return [(1, 1)] * len(values)
    diffs, pairs = values[first] - values[second], drawn[:, first] - drawn[:, second]
    errors = np.nanstd(pairs, 0)
    critical = float(np.quantile(_largest(pairs, diffs, errors), level))
    return _places(len(values), diffs, errors, critical)


def ranked_columns(
    results: Results, columns: Sequence[Column], methods: Sequence[str]
) -> Mapping[Column, Mapping[str, tuple[int, int]]]:
    """Rank sets of ``methods`` in each column, with a joint confidence of 95 % for all columns.

    A method is ranked in a column if it has values on at least 40 photos, and on at least half as many
    photos as the method with the most values. A column is left out if fewer than two methods can be ranked.
    """
    found: dict[Column, Mapping[str, tuple[int, int]]] = {}
    chosen = {}
    for column in columns:
        counts = {m: results.images_of_both(m, m, column) for m in methods}
        most = max(counts.values(), default=0)
        names = [m for m, n in counts.items() if n >= MIN_RANKED and 2 * n >= most]
        if len(names) > 1:
            chosen[column] = names
    for column, names in chosen.items():
        sets = rank_sets(
            [results.methods[name].values[column] for name in names],
            higher=results.info(column.metric).higher_is_better,
            level=1 - ALPHA / len(chosen),
            n_resamples=results.n_resamples,
            seed=results.protocol.seed,
        )
        found[column] = dict(zip(names, sets, strict=True))
    return found


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(pairs, networks, photos) -> (photos, pairs), the mean over the networks that have a value."""
    valid = ~np.isnan(values)
    count = valid.sum(1)
    total = np.where(valid, values, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).T


def _largest(
    drawn: NDArray[np.float64], diffs: NDArray[np.float64], errors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(R, pairs) -> (R,), the largest |d* - d| / se; pairs with an se of zero are left out."""
    usable = (errors > 0) & np.isfinite(errors)
    far = np.abs(drawn[:, usable] - diffs[usable]) / errors[usable]
    return np.nan_to_num(far).max(1, initial=0.0)


def _places(
    count: int, diffs: NDArray[np.float64], errors: NDArray[np.float64], critical: float
) -> Ranks:
    first, second = np.triu_indices(count, 1)
    apart = np.abs(diffs) > np.nan_to_num(critical * errors, nan=np.inf) + 1e-12
    better = np.zeros((count, count), dtype=bool)
    better[first, second] = apart & (diffs > 0)
    better[second, first] = apart & (diffs < 0)
    above, below = better.sum(0), better.sum(1)
    return [(1 + int(above[m]), count - int(below[m])) for m in range(count)]
