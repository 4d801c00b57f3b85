"""Ridge regression in the dual, in float64: from the kernel of the examples alone.

    alpha = (H K H + lambda I)^-1 H Y,    f(x) = b + sum_i alpha_i k(x_i, x),    H = I - 1 1^T / n

The intercept b is not shrunk. lambda is given relative to the mean of the eigenvalues of H K H, so it does
not depend on the scale of the features. All leave-one-out residuals follow from one decomposition,
alpha_i / (H C H)_ii with C = (H K H + lambda I)^-1 (Allen 1974), and they choose lambda.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


class DualRidge:
    """The decomposed ``kernel`` (n, n) of n examples, to fit any targets by.

    Raises:
        ValueError: fewer than two examples, or a kernel that is not finite or the same for all of them.
    """

    def __init__(self, kernel: Tensor) -> None:
        kernel = kernel.double()
        n = len(kernel)
        if n < 2:
            raise ValueError(f"features: got {n} examples; give two or more")
        if not kernel.isfinite().all():
            raise ValueError("features: got numbers that are not finite; check the tokens")
        self.means = kernel.mean(0)
        rows = kernel - self.means
        centred = rows - rows.mean(1, keepdim=True)
        # The constant direction, made the largest, so that it can be told from the others and left out.
        apart = float(centred.diagonal().abs().sum()) or 1.0
        values, vectors = torch.linalg.eigh(centred + 2 * apart / n)
        self.values, self.vectors = values[:-1].clamp_min(0), vectors[:, :-1]
        if not float(self.values[-1]) > SINGULAR * float(kernel.diagonal().abs().max()):
            raise ValueError(
                "features: all examples are alike, so nothing can be learned from them; give photos "
                "that differ"
            )

    @property
    def rank(self) -> int:
        """Of the centred kernel, which is singular where this is less than n - 1."""
        return int((self.values > SINGULAR * self.values[-1]).sum())

    def fit(self, targets: Tensor, ridge: float | None = None) -> RidgeFit:
        """Fit ``targets`` (n, K).

        Args:
            ridge: lambda over the mean eigenvalue of the centred kernel; None takes the one of
                :data:`RIDGES` with the least squared leave-one-out error.

        Raises:
            ValueError: a negative or infinite ridge, or one of 0 with a singular kernel.
        """
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge: got {ridge}; give 0 or more, or None to choose it")
        if ridge == 0 and self.rank < len(self.values):
            raise ValueError(
                f"ridge: got 0, and the kernel of {len(self.means)} examples is singular (rank "
                f"{self.rank}); give a positive ridge, or None to choose it"
            )
        targets = targets.double()
        mean = targets.mean(0)
        turned = self.vectors.mT @ (targets - mean)
        fits = [self._fit(turned, r) for r in (RIDGES if ridge is None else (ridge,))]
        alpha, residuals, chosen = min(fits, key=lambda fit: float(fit[1].square().sum()))
        return RidgeFit(alpha, mean - self.means @ alpha, targets - residuals, chosen)

    def _fit(self, turned: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
        """alpha, the leave-one-out residuals, and the ridge."""
        inverse = 1 / (self.values + ridge * float(self.values.sum()) / len(self.means))
        alpha = self.vectors @ (inverse[:, None] * turned)
        return alpha, alpha / (self.vectors.square() @ inverse)[:, None], ridge


def best_temperature(predictions: Tensor, labels: Tensor) -> float:
    """The factor of :data:`TEMPERATURES` by which ``predictions`` (n, K) have the least cross-entropy with
    ``labels`` (n,): of what was left out, it makes logits of a regression on class indicators."""
    losses = [F.cross_entropy(t * predictions.double(), labels) for t in TEMPERATURES]
    return TEMPERATURES[int(torch.stack(losses).argmin())]
