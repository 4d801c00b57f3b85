"""Ridge regression in the dual, in float64: from the kernel of the examples alone.

    alpha = (H K H + lambda I)^-1 H Y,    f(x) = b + sum_i alpha_i k(x_i, x),    H = I - 1 1^T / n

The intercept b is not shrunk. lambda is given relative to the mean of the eigenvalues of H K H, so it does
not depend on the scale of the features. All leave-one-out residuals follow from one decomposition,
lambda alpha_i / (lambda C_ii - 1/n) with C = (H K H + lambda I)^-1 (Allen 1974), which chooses lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Half decades of lambda, relative to the mean eigenvalue.
RIDGES = tuple(10 ** (k / 2) for k in range(-12, 7))
SINGULAR = 1e-12  # eigenvalues below this share of the largest are 0
TEMPERATURES = tuple(2 ** (k / 4) for k in range(0, 41))


class RidgeFit(NamedTuple):
    """``alpha`` (n, K), which sums to 0 over the examples where ``ridge`` > 0; ``intercept`` (K,);
    ``left_out`` (n, K): the prediction for each example by the fit to all others; ``ridge``: lambda over
    the mean eigenvalue."""

    alpha: Tensor
    intercept: Tensor
    left_out: Tensor
    ridge: float


def dual_ridge(kernel: Tensor, targets: Tensor, ridge: float | None = None) -> RidgeFit:
    """Fit ``targets`` (n, K) by the ``kernel`` (n, n) of the examples.

    Args:
        ridge: lambda over the mean eigenvalue of the centred kernel; None takes the one of
            :data:`RIDGES` with the least squared leave-one-out error.

    Raises:
        ValueError: a negative or infinite ridge, a kernel that is not finite or the same for all
            examples, or a ridge of 0 with a singular kernel.
    """
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge: got {ridge}; give 0 or more, or None to choose it")
    kernel, targets = kernel.double(), targets.double()
    n = len(kernel)
    if n < 2 or not kernel.isfinite().all():
        raise ValueError(
            f"features: got {n} examples{'' if n < 2 else ' and numbers that are not finite'}; give "
            f"two or more finite ones"
        )
    rows = kernel - kernel.mean(0)
    values, vectors = torch.linalg.eigh(rows - rows.mean(1, keepdim=True))
    values = values.clamp_min(0)
    largest = float(values[-1])
    if not largest > SINGULAR * float(kernel.diagonal().abs().max()):
        raise ValueError(
            "features: all examples are alike, so nothing can be learned from them; give photos that "
            "differ"
        )
    centred = targets - targets.mean(0)
    fits = [_fit(values, vectors, centred, r) for r in _ridges(ridge, values, n)]
    best = min(fits, key=lambda fit: float(fit.left_out.square().sum()))
    mean = targets.mean(0)
    intercept = mean - kernel.mean(0) @ best.alpha
    return best._replace(intercept=intercept, left_out=targets - best.left_out)


def _ridges(ridge: float | None, values: Tensor, n: int) -> Sequence[float]:
    """Those to choose from."""
    if ridge is None:
        return RIDGES
    rank = int((values > SINGULAR * values[-1]).sum())
    if ridge == 0 and rank < n - 1:
        raise ValueError(
            f"ridge: got 0, and the kernel of {n} examples is singular (rank {rank}); give a positive "
            f"ridge, or None to choose it"
        )
    return (ridge,)


def _fit(values: Tensor, vectors: Tensor, centred: Tensor, ridge: float) -> RidgeFit:
    """The fit with one ridge; ``left_out`` holds the residuals, ``intercept`` is still to come."""
    n = len(values)
    shrunk = float(ridge * values.mean())
    inverse = 1 / (values + shrunk) if shrunk else _pseudo_inverse(values)
    alpha = vectors @ (inverse[:, None] * (vectors.mT @ centred))
    gains = vectors.square() @ (shrunk * inverse) - 1 / n if shrunk else None
    if gains is None:  # the limit of both sides over lambda
        left_out = alpha / (vectors.square() @ inverse)[:, None]
    else:
        left_out = shrunk * alpha / gains[:, None]
    return RidgeFit(alpha, centred[0], left_out, ridge)


def _pseudo_inverse(values: Tensor) -> Tensor:
    """1 / value, and 0 for the constant direction, whose value is 0."""
    inverse = 1 / values.clamp_min(SINGULAR * float(values[-1]))
    return inverse.masked_fill(values <= SINGULAR * values[-1], 0.0)


def best_temperature(predictions: Tensor, labels: Tensor) -> float:
    """The factor of :data:`TEMPERATURES` by which ``predictions`` (n, K) have the least cross-entropy with
    ``labels`` (n,): of what was left out, it makes logits of a regression on class indicators."""
    losses = [
        torch.nn.functional.cross_entropy(t * predictions.double(), labels) for t in TEMPERATURES
    ]
    return TEMPERATURES[int(torch.stack(losses).argmin())]
