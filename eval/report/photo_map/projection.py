"""Projects rows of numbers to points in a plane with PCA or UMAP (arXiv 1802.03426).

The result depends only on the rows and a seed. UMAP needs the package ``umap-learn`` and takes longer; it
is applied to the first 50 principal components.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
from numpy.typing import NDArray

METHODS = {"umap": "UMAP", "pca": "PCA"}
FEWEST, PREFERRED = 16, 100  # UMAP needs at least 16 rows, and is the default from 100 rows on
COMPONENTS, EPOCHS = 50, 200  # principal components to which UMAP is applied, and its epochs


def available_methods(rows: int) -> list[str]:
    """The methods that can be used for this number of rows, the default first."""
    if rows < FEWEST or importlib.util.find_spec("umap") is None:
        return ["pca"]
    return ["umap", "pca"] if rows >= PREFERRED else ["pca", "umap"]


def project(values: NDArray[np.floating], method: str, seed: int = 0) -> NDArray[np.float32]:
    """Project rows (n, d) to points (n, 2), float32.

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
        raise ValueError(
            f"method: got umap for {len(values)} photos, but it needs at least {FEWEST}; give pca"
        )
    try:
        import umap
    except ModuleNotFoundError:
        raise ValueError(
            'method: umap needs umap-learn, which is not installed; run: pip install "xattn[umap]"'
        ) from None
    start = principal(values, min(COMPONENTS, values.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about isolated photos and the number of threads
        made = umap.UMAP(n_epochs=EPOCHS, random_state=seed, n_jobs=1, init="pca")
        return np.asarray(made.fit_transform(start), np.float32)


def principal(values: NDArray[np.floating], count: int) -> NDArray[np.float32]:
    """(n, d) -> (n, count) float32, the first principal components, in descending order of variance.

    The sign of each component is chosen so that the largest entry of its direction, by magnitude, is
    positive. If there are fewer than ``count`` components, the remaining columns are 0.
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
