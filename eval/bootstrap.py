"""Confidence intervals of means and paired differences: percentile bootstrap (Efron 1979) and Student's t.

Images are resampled with replacement, and all columns of a matrix share the resamples. NaN marks an
invalid image. An invalid image can be drawn like any other image, but it is left out of the mean, as in the
metric.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

N_RESAMPLES = 10_000
_BLOCK_ELEMENTS = 2_000_000


class Interval(NamedTuple):
    """A mean over ``n`` valid images with its interval [lo, hi]."""

    mean: float
    lo: float
    hi: float
    n: int

    def text(self, digits: int) -> str:
        """The interval as text, such as "0.52 [0.40, 0.63]"."""
        return f"{self.mean:.{digits}f} [{self.lo:.{digits}f}, {self.hi:.{digits}f}]"

    def percent(self) -> Interval:
        """The interval of a share, in percent."""
        return Interval(100 * self.mean, 100 * self.lo, 100 * self.hi, self.n)


def mean(values: ArrayLike) -> float:
    """The float64 mean of the values that are not NaN, from an exactly rounded sum.

    The result does not depend on the order of the values.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    good = array[~np.isnan(array)]
    return math.fsum(good) / len(good) if len(good) else math.nan


def mean_intervals(
    values: ArrayLike, *, n_resamples: int = N_RESAMPLES, level: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Per-image values (n, C) -> a list of C bootstrap intervals, one per column.

    With the same arguments, including ``seed``, the result is always the same.

    Raises:
        ValueError: ``values`` is not a matrix, or ``level`` or ``n_resamples`` is out of range.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"values: got shape {matrix.shape}; give (images, columns)")
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(
            f"level, n_resamples: got {level}, {n_resamples}; give a level in (0, 1) and at least one "
            f"resample"
        )
    means = [mean(column) for column in matrix.T]
    counts = (~np.isnan(matrix)).sum(0)
    if not len(matrix):
        return [Interval(m, math.nan, math.nan, 0) for m in means]
    tails = ((1 - level) / 2, (1 + level) / 2)
    samples = resampled_means(matrix, n_resamples, seed)
    intervals = []
    for column, m, n in zip(samples.T, means, counts, strict=True):
        drawn = column[~np.isnan(column)]
        lo, hi = np.quantile(drawn, tails) if len(drawn) else (math.nan, math.nan)
        intervals.append(Interval(m, float(lo), float(hi), int(n)))
    return intervals


def mean_interval(
    values: ArrayLike, *, n_resamples: int = N_RESAMPLES, level: float = 0.95, seed: int = 0
) -> Interval:
    """Per-image values (n,) -> their mean with its bootstrap interval.

    Example:
        >>> from xattn.eval import mean_interval
        >>> interval = mean_interval([0.2, 0.4, 0.6, 0.8])
        >>> round(interval.mean, 3), interval.lo < 0.5 < interval.hi
        (0.5, True)
    """
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    return mean_intervals(column, n_resamples=n_resamples, level=level, seed=seed)[0]


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    n_resamples: int = N_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """mean(a - b) with its bootstrap interval, over the images that are valid in both.

    ``a`` and ``b`` (n,) hold values of the same images in the same order.

    Example:
        >>> from xattn.eval import paired_difference
        >>> difference = paired_difference([0.9, 0.8, 0.7], [0.5, 0.5, 0.5])
        >>> round(difference.mean, 3), difference.lo > 0
        (0.3, True)
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ValueError(
            f"a, b: got shapes {left.shape} and {right.shape}; give (n,) values of the same images"
        )
    return mean_interval(left - right, n_resamples=n_resamples, level=level, seed=seed)


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent values with Student's t interval; for a single value, the bounds are NaN.

    >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484, 3]
    """
    from scipy.special import stdtrit

    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), n)
    half = float(stdtrit(n - 1, (1 + level) / 2) * array.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def resampled_means(matrix: NDArray[np.float64], count: int, seed: int) -> NDArray[np.float64]:
    """Means of per-image values (n, C) in ``count`` resamples, (count, C).

    A mean is NaN if its resample contains no valid image. The sums are computed as a matrix product: the
    numbers of times that each image was drawn, times the values. All columns therefore share the resamples.
    """
    n = len(matrix)
    valid = ~np.isnan(matrix)
    stacked = np.concatenate([np.where(valid, matrix, 0.0), valid.astype(np.float64)], axis=1)
    parts = [times @ stacked for times in _draws(n, count, seed)]
    sums, weights = np.split(np.concatenate(parts), 2, axis=1)
    return np.where(weights > 0, sums / np.maximum(weights, 1), np.nan)


def _draws(n: int, count: int, seed: int) -> Iterable[NDArray[np.float64]]:
    """Yield blocks (rows, n) that count how often each of n images is drawn in each resample.

    The blocks have ``count`` rows in total, one per resample.
    """
    block = max(1, _BLOCK_ELEMENTS // n)
    # The same draws are needed for every cell of a table, so they are cached if they fit in one block.
    return [_all_draws(n, count, seed)] if count <= block else _blocks(n, count, seed, block)


@functools.lru_cache(maxsize=2)
def _all_draws(n: int, count: int, seed: int) -> NDArray[np.float64]:
    return next(iter(_blocks(n, count, seed, count)))


def _blocks(n: int, count: int, seed: int, block: int) -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    for start in range(0, count, block):
        rows = min(block, count - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        yield times.astype(np.float64)
