"""The top-k engine of SpAtten in NumPy: quick-select, the k largest in expected O(n).

A random pivot splits what is left into larger, equal and smaller numbers; one of the three parts holds
the k-th largest. Ties at the k-th value are kept in the order of their indices.
This is a reference, to compare with; mechanisms use ``torch.topk``. Wang et al., arXiv 2012.09852.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def quick_select(values: ArrayLike, k: int, seed: int = 0) -> NDArray[np.intp]:
    """Indices of the ``k`` largest of ``values`` (n,), rising.

    >>> quick_select([3, 9, 4, 9, 4], 3).tolist()
    [1, 2, 3]

    Raises:
        ValueError: ``values`` of other dimensions or with NaN, or ``k`` not in 0..n.
    """
    x = np.asarray(values)
    if x.ndim != 1 or np.isnan(x.astype(float)).any():
        raise ValueError("values: give a row of numbers, none of them NaN")
    if not 0 <= k <= len(x):
        raise ValueError(f"k: got {k}; give 0 to {len(x)}")
    generator = np.random.default_rng(seed)
    chosen: list[NDArray[np.intp]] = []
    left = np.arange(len(x))
    while k:
        pivot = x[generator.choice(left)]
        larger, equal = left[x[left] > pivot], left[x[left] == pivot]
        if k < len(larger):
            left = larger
            continue
        chosen += [larger, equal[: k - len(larger)]]
        k = max(0, k - len(larger) - len(equal))
        left = left[x[left] < pivot]
    return np.sort(np.concatenate(chosen)) if chosen else left[:0]
