"""Infidelity: does the map predict how the score changes when the image is perturbed?

    INFD = E_I (beta I . phi - (f(x) - f(x - I)))^2
    beta = 1, or E[(I . phi) df] / E[(I . phi)^2] with df = f(x) - f(x - I)

Yeh et al. 2019, arXiv 1901.09392. phi is the raw, signed map. With the optimal beta, the value does not
depend on the unit of the map. The authors' code uses this beta, although their definition does not.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xattn.eval.metrics.base import (
    Column,
    Finish,
    MetricGroup,
    MetricInfo,
    MetricInputs,
    PerturbationMetric,
    Request,
    Sample,
)
from xattn.eval.metrics.board.masks import Squares, corners_of
from xattn.eval.metrics.curves import check_count
from xattn.eval.metrics.mean_metric import MeanMetric

PERTURBATIONS = ("square", "occlusion", "noise")


def infidelity_values(products: Tensor, changes: Tensor, scale: bool = True) -> Tensor:
    """Compute infidelity (B,), float64, at least 0, in squared units of the score; lower is better.

    >>> infidelity_values(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 6.0]]), scale=False).item()
    5.0

    Args:
        products: I . phi, (B, S), one per perturbation.
        changes: f(x) - f(x - I), (B, S).
        scale: whether to multiply the products by the optimal beta. If all products are 0, any beta is
            optimal, and the value is the mean squared change.

    Raises:
        ValueError: if the arguments are not two tensors (B, S) of the same shape.
    """
    if products.ndim != 2 or products.shape != changes.shape or products.shape[1] == 0:
        raise ValueError(
            f"products, changes: got {tuple(products.shape)} and {tuple(changes.shape)}; give two "
            f"of (B, S)"
        )
    a, b = products.detach().double(), changes.detach().double()
    if scale:
        norm = a.square().sum(1, keepdim=True)
        a = a * ((a * b).sum(1, keepdim=True) / torch.where(norm == 0, 1.0, norm))
    value = (a - b).square().mean(1)
    return torch.where(value.isfinite(), value, torch.nan)


@dataclass(frozen=True)
class InfidelityMetric(PerturbationMetric):
    """Infidelity on ``samples`` perturbations that depend only on the image, not on the method.

    A pixel has one value in the map but three in the image. Each channel is assigned phi / 3, so that I .
    phi is the sum over the pixels of phi times the mean of I over the channels. For a linear score w . x
    whose map is the sum of w over the channels, infidelity is then 0 if I is the same in all channels. This
    always holds for ``"noise"``, and for ``"square"`` it holds on grey images.
    ``captum.metrics.infidelity`` returns the same numbers for ``attributions=phi.expand(-1, 3, -1, -1) /
    3``; its ``normalize`` is ``scale`` here.

    x - I is not clipped. As in the definition, it may leave [0, 1] under noise.

    Args:
        samples: the number of perturbations per image. Each takes one forward pass for all methods
            together.
        perturbation: with ``"square"``, I = x on a random square inside the image and 0 elsewhere, so that
            the square becomes black; this choice suits maps in units of score per pixel value, such as
            gradients. With ``"occlusion"``, the images are the same, but I . phi is the sum of phi over the
            square (I is binary, as in the authors' code for squares); this choice suits maps of
            contributions, such as input x gradient. With ``"noise"``, I ~ N(0, sigma^2) is drawn for each
            pixel; this choice requires a map that is correct pixel by pixel, which a coarse map is not.
        sigma: standard deviation of the noise, for pixel values in [0, 1].
        side: side of the square, as a fraction of the image's shorter side.
        scale: whether to use the optimal beta. If this is False, maps must be in units of the score.
    """

    samples: int = 50
    perturbation: str = "occlusion"
    sigma: float = 0.01
    side: float = 0.25
    scale: bool = True

    def __post_init__(self) -> None:
        check_count("samples", self.samples)
        if self.perturbation not in PERTURBATIONS:
            raise ValueError(
                f"perturbation: got {self.perturbation!r}; choose one of {', '.join(PERTURBATIONS)}"
            )
        if not self.sigma > 0:
            raise ValueError(f"sigma: got {self.sigma}; give a positive standard deviation")
        if not 0 < self.side <= 1:
            raise ValueError(
                f"side: got {self.side}; give a fraction of the image's side, in (0, 1]"
            )

    def column_options(self, column: Column) -> dict[str, Any]:
        own = "sigma" if self.perturbation == "noise" else "side"
        names = ("samples", "perturbation", own, "scale")
        return {name: getattr(self, name) for name in names}

    def measure(self, sample: Sample) -> Generator[Request, None, Finish]:
        products = []
        for perturbed, product in self._perturbed(sample.image, sample.raw, sample.seed):
            products.append(product)
            yield Request("infidelity", perturbed)

        def finish(scores: Mapping[str, Tensor]) -> dict[Column, float]:
            changes = sample.score - scores["infidelity"].double()[None]
            products_row = torch.stack(products).to(changes.device)[None]
            value = infidelity_values(products_row, changes, self.scale)
            return {Column("infidelity"): float(value)}

        return finish

    def _perturbed(self, image: Tensor, raw: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield x - I, (3, H, W), and I . phi, (), float64, for each perturbation."""
        height, width = image.shape[-2:]
        phi = raw[0].double()
        if self.perturbation == "noise":
            generator = torch.Generator().manual_seed(seed)
            for _ in range(self.samples):
                noise = self.sigma * torch.randn(
                    1, height, width, generator=generator, device="cpu"
                )
                noise = noise.to(image)
                yield image - noise, (phi * noise[0]).sum()
            return
        weighted = phi * image.double().mean(0) if self.perturbation == "square" else phi
        corners, side = corners_of(Squares(self.samples, self.side), (height, width), seed)
        for top, left in corners.tolist():
            square = (..., slice(top, top + side), slice(left, left + side))
            removed = image.clone()
            removed[square] = 0
            yield removed, weighted[square].sum()


class Infidelity(MeanMetric):
    """Mean infidelity. ``update(products, changes, valid=None)`` takes (B, S) each."""

    metric = "infidelity"
    higher_is_better = False

    def __init__(self, backbone: Any = None, scale: bool = True, **kwargs: Any) -> None:
        self.scale = scale
        super().__init__(backbone, **kwargs)

    def _default_metric(self) -> PerturbationMetric:
        return replace(super()._default_metric(), scale=self.scale)  # type: ignore[type-var]

    def _values(self, products: Tensor, changes: Tensor) -> Tensor:
        return infidelity_values(products, changes, self.scale)


GROUP = MetricGroup(
    "infidelity",
    InfidelityMetric,
    {
        "infidelity": MetricInfo(
            "E (I . phi - (f(x) - f(x - I)))^2",
            False,
            0,
            math.inf,
            reads=MetricInputs("class", "squares", "black"),
        ),
    },
    words={
        "infidelity": ("Infidelity", "How badly the map predicts the effect of changing the photo"),
    },
    classes=(Infidelity,),
    cases=({"samples": 5},),
)
