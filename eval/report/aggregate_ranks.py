"""Computes aggregate ranks: one rank for each method over all judged metrics, and how stable it is.

For method m, image i and column c, with s_c = 1 where higher is better and -1 where lower is:

    z_mc = s_c (mean_i x_mic - median_c) / IQR_c      median and interquartile range of all x_mic of c
    z_m  = median over metrics of the mean of z_mc over the metric's levels
    rank = 1 + number of methods with a larger z_m

Images are resampled with replacement, while median_c and IQR_c are not changed. The resamples give the rank
sets (:mod:`xattn.eval.report.rank_sets`) and the share of resamples in which a method is first. LATEC
(Klein et al., NeurIPS 2024, arXiv 2409.16756) averages ranks separately for each criterion, whereas
faithfulness and localisation are combined here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xattn.eval import bootstrap
from xattn.eval.evaluation.results import MIN_IMAGES, TOO_FEW, Results
from xattn.eval.metrics.base import Column
from xattn.eval.report.rank_sets import MIN_RANKED, rank_sets_of_draws

MIN_METRICS = 3
_SAME = 1e-9  # differences of z up to this size may be rounding errors


class AggregateRank(NamedTuple):
    """The aggregate rank of a method.

    Attributes:
        rank: the rank, where 1 is the best.
        lo, hi: the ends of its rank set, at 95 % for all methods together. With fewer than 40 photos, the
            set contains all ranks.
        first: the share of resamples in which the method is first.
        score: z_m.
    """

    method: str
    rank: int
    lo: int
    hi: int
    first: float
    score: float


class Ranking(NamedTuple):
    """The aggregate ranks of a run.

    Attributes:
        ranks: one entry for each method, in the order of the methods.
        metrics: the metrics that were used.
        trained_on: the metrics that were left out because they are close to a head's training objective.
        reason: the reason why there are no ranks; "" if there are ranks.
    """

    ranks: tuple[AggregateRank, ...]
    metrics: tuple[str, ...]
    trained_on: tuple[str, ...]
    reason: str = ""

    @property
    def notes(self) -> list[str]:
        """Notes that a reader of the ranks needs, each as one string."""
        if self.reason:
            return [f"aggregate rank: {self.reason}"]
        notes = [
            f"aggregate rank: median over {', '.join(self.metrics)} of how many interquartile ranges "
            f"a mean is better than the metric's median; metrics that agree by construction are each "
            f"counted"
        ]
        if self.trained_on:
            left = ", ".join(self.trained_on)
            notes.append(f"aggregate rank: {left} left out as close to a head's training")
        return notes


def aggregate_ranks(results: Results) -> Ranking | None:
    """Rank the methods under test over all metrics; sanity rows and masks are not ranked.

    A metric is used if, for each method, the number of images with a value is at least half of the largest
    such number.

    Returns:
        The ranking, or None if there are fewer than two methods with values or fewer than three judged
        metrics.

    Example:
        >>> import torch, xattn
        >>> from xattn.eval import aggregate_ranks
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> methods = {"gradcam": "gradcam", "saliency": "saliency"}
        >>> images = torch.rand(3, 3, 64, 64)
        >>> results = xattn.evaluate(net, methods, images, progress=False)
        >>> aggregate_ranks(results) is not None
        True
    """
    names = [
        name
        for name in results.judged_methods
        if any(np.isfinite(results.methods[name].values[c]).any() for c in results.ranked)
    ]
    methods = [results.methods[name] for name in names]
    judged = list(dict.fromkeys(c.metric for c in results.ranked))
    if len(names) < 2 or len(judged) < MIN_METRICS:
        return None
    close = {c.metric for c in results.ranked if any(results.trained_on(m, c) for m in names)}
    trained = tuple(metric for metric in judged if metric in close)
    columns = [c for c in results.ranked if c.metric not in trained]
    # (methods, columns, images)
    values = np.array([[m.values[c] for c in columns] for m in methods], dtype=np.float64)
    values = values.reshape(len(methods), len(columns), len(results.images))
    counts = (~np.isnan(values)).sum(2)
    fits = (2 * counts >= counts.max(0)).all(0) & (counts > 0).all(0)
    columns = [c for c, good in zip(columns, fits, strict=True) if good]
    metrics = tuple(dict.fromkeys(c.metric for c in columns))
    if len(metrics) < MIN_METRICS:
        few = (
            f"needs {MIN_METRICS} metrics that were measured for every method and are not close to a "
            "head's training"
        )
        return Ranking((), metrics, trained, f"{few}; there are {len(metrics)}")
    fewest = int(counts[:, fits].min())
    if fewest < MIN_IMAGES:
        return Ranking(
            (), metrics, trained, f"{TOO_FEW}: {fewest}; at least {MIN_IMAGES} are needed"
        )
    ranks = _ranks(names, columns, values[:, fits], results)
    if fewest < MIN_RANKED:  # too few for joint confidence over all methods
        ranks = tuple(rank._replace(lo=1, hi=len(ranks)) for rank in ranks)
    return Ranking(ranks, metrics, trained)


def _ranks(
    names: Sequence[str], columns: Sequence[Column], values: NDArray[np.float64], results: Results
) -> tuple[AggregateRank, ...]:
    signs = [1.0 if results.info(c.metric).higher_is_better else -1.0 for c in columns]
    z = standardise(signs, values)
    flat = z.reshape(-1, z.shape[2]).T  # (images, methods x columns)
    means = np.array([[bootstrap.mean(cell) for cell in row] for row in z])
    samples = bootstrap.resampled_means(flat, results.n_resamples, results.protocol.seed)
    scores = _scores(columns, means[None])[0]
    drawn = _scores(columns, samples.reshape(-1, *means.shape))
    ranks, places = _places(scores[None])[0], _places(drawn)
    sets = rank_sets_of_draws(scores, drawn)
    first = (places == 1).mean(0)
    return tuple(
        AggregateRank(
            name, int(ranks[m]), sets[m][0], sets[m][1], float(first[m]), float(scores[m])
        )
        for m, name in enumerate(names)
    )


def standardise(signs: Sequence[float], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale values (methods, columns, images) to median 0 and interquartile range 1 in each column.

    The sign is changed where smaller is better, so in the result, larger is always better. If the
    interquartile range is 0, as it can be for IC, the standard deviation is used instead; if all values are
    equal, the result is 0.
    """
    low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=(0, 2), keepdims=True)
    spread = np.where(high > low, high - low, np.nanstd(values, axis=(0, 2), keepdims=True))
    scale = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0.0)
    return np.array(signs)[None, :, None] * (values - middle) * scale


def _scores(columns: Sequence[Column], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R, methods, columns) -> (R, methods), the median over metrics of the mean over a metric's levels."""
    metrics = list(dict.fromkeys(c.metric for c in columns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns if all values are NaN
        levels = [
            np.nanmean(means[..., [c.metric == metric for c in columns]], axis=2)
            for metric in metrics
        ]
        return np.nanmedian(np.stack(levels, axis=2), axis=2)


def _places(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ranks (R, methods) of scores (R, methods); methods with equal scores get the same, better rank."""
    above = [(scores > scores[:, m, None] + _SAME).sum(1) for m in range(scores.shape[1])]
    return 1 + np.stack(above, axis=1)
