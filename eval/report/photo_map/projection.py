"""Projects rows of numbers to points in a plane, by principal components or UMAP (arXiv 1802.03426).

Both depend only on the rows and a seed. UMAP needs ``umap-learn`` and takes longer; it starts from the
first 50 principal components.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
from numpy.typing import NDArray

METHODS = {"umap": "UMAP", "pca": "PCA"}
FEWEST, PREFERRED = 16, 100  # fewest rows for which UMAP works, and for which it is the default
COMPONENTS, EPOCHS = 50, 200  # components that UMAP starts from, and its passes over the photos


def available_methods(rows: int) -> list[str]:
    """The methods that can be used for this many rows, the preferred one first."""
    if rows < FEWEST or importlib.util.find_spec("umap") is None:
        return ["pca"]
    return ["umap", "pca"] if rows >= PREFERRED else ["pca", "umap"]


def project(values: NDArray[np.floating], method: str, seed: int = 0) -> NDArray[np.float32]:
    """(n, d) -> (n, 2) float32.

    Args:
        values: finite rows.
        method: one of ``METHODS``.

    Raises:
        ValueError: the method is unknown, there are too few rows for it, or ``umap-learn`` is missing.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; give one of {', '.join(METHODS)}")
    if method == "pca":
        return principal(values, 2)
    if len(values) < FEWEST:
        raise ValueError(f"method: got umap for {len(values)} photos; give pca below {FEWEST}")
    try:
        import umap
    except ModuleNotFoundError:
        raise ValueError(
            'method: umap needs umap-learn, which is not installed; run: pip install "xattn[umap]"'
        ) from None
    start = principal(values, min(COMPONENTS, values.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # warnings about photos far from all others, and about threads
        made = umap.UMAP(n_epochs=EPOCHS, random_state=seed, n_jobs=1, init="pca")
        return np.asarray(made.fit_transform(start), np.float32)


def principal(values: NDArray[np.floating], count: int) -> NDArray[np.float32]:
    """(n, d) -> (n, count) float32: the first principal components, in descending order of variance.

    The sign of each is chosen so that the entry of its direction with the largest magnitude is positive.
    Components beyond the rank of the rows are 0.
    """
    from scipy.linalg import eigh

    rows = np.asarray(values, np.float64)
    rows = rows - rows.mean(0)
    n, d = rows.shape
    found = np.zeros((n, count), np.float32)
    kept = min(count, d, n)
    wide = d > n
    square = rows @ rows.T if wide else rows.T @ rows
    size = len(square)
    lengths, vectors = eigh(square, subset_by_index=[size - kept, size - 1])
    if wide:
        vectors = rows.T @ vectors / np.sqrt(np.maximum(lengths, 1e-30))
    vectors = vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(kept)]
    found[:, :kept] = rows @ (vectors * np.where(largest < 0, -1, 1))
    return found
