"""Averages of gradients over perturbed images: sum_k w_k d f(x_k) / d x, f the class logit.

Integrated gradients: x_k on the line from a baseline b to x (Sundararajan et al., arXiv 1703.01365);
GradientSHAP: random points of lines from random baselines (Lundberg and Lee, arXiv 1705.07874; Erion
et al., arXiv 1906.10670); SmoothGrad: x plus Gaussian noise (Smilkov et al., arXiv 1706.03825).

The gradients are computed by Captum, but the sums are not. Captum draws noise for the whole batch from
the global generators, so that a map depends on the other images and on the micro-batch, and its loops
cannot continue with smaller micro-batches when memory runs out. Here each image's gradients are summed
separately, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from xattn.explainers.base import Explainer, register_explainer
from xattn.explainers.gradients import pixel_gradient
from xattn.runtime.option_checks import Condition, Count

# Indices (n,) of perturbed images -> these images (n, 3, H, W) and their weights, which broadcast.
NOISE = "the standard deviation as a fraction of the image's range, such as 0.15"
Points = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(kw_only=True, eq=False, repr=False)
class _GradientSum(Explainer):
    """Base class of sums over ``forwards`` perturbed copies of an image, ``max_forward_batch`` at a
    time."""

    one_by_one = True
    clips = True
    forwards: int = field(init=False, default=1)

    def _sum(self, points: Points, target: Tensor) -> Tensor:
        """sum_k w_k d f(x_k) / d x of one image, (3, H, W) in float64; target (1,)."""

        total: list[Tensor] = []

        def part(numbers: Tensor) -> None:
            images, weights = points(numbers)
            gradient = pixel_gradient(self.backbone, images, target.expand(len(images)))
            found = (gradient.double() * weights).sum(0)
            total[:] = [total[0] + found] if total else [found]

        self._batches.run(part, torch.arange(self.forwards, device="cpu"))
        return total[0]

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        pairs = zip(images, target.split(1), strict=True)
        return torch.stack([self._map(image, one) for image, one in pairs]).to(images.dtype)

    def _map(self, image: Tensor, target: Tensor) -> Tensor:
        """(1, H, W) for one image (3, H, W) and its class (1,)."""
        raise NotImplementedError


@register_explainer("integrated_gradients", title="Integrated gradients", cases=({"steps": 3},))
@dataclass(kw_only=True, eq=False, repr=False)
class IntegratedGradients(_GradientSum):
    """(x - b) * integral_0^1 df(b + a (x - b))/dx da, summed over the channels, (B, 1, H, W), signed.

    Completeness: the map sums to f(x) - f(b), up to quadrature error. ReLU networks are not smooth along
    the line: on two photos, EfficientNet-Lite0 missed the sum by 26 % with 32 steps and by 2 % with 128.

    Args:
        steps: nodes a_k of the Gauss-Legendre rule; each takes a forward and a backward pass.
        baseline: "black", pixels of 0 as in the paper, so that black pixels get no relevance; or "mean",
            the mean colour in the backbone's normalisation (zeros for its first layer).

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("integrated_gradients", net, steps=8)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    steps: Count = 32
    baseline: Literal["black", "mean"] = "black"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = self.steps

    def _map(self, image: Tensor, target: Tensor) -> Tensor:
        base = self.backbone.mean[0].to(image) if self.baseline == "mean" else image.new_zeros(())
        difference = image - base
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(self.steps))

        def points(k: Tensor) -> tuple[Tensor, Tensor]:
            ones = [1] * image.ndim
            a = ((nodes[k] + 1) / 2).to(image).view(-1, *ones)  # from [-1, 1] to [0, 1]
            return base + a * difference, (weights[k] / 2).to(image.device).view(-1, *ones)

        return (self._sum(points, target) * difference).sum(0, keepdim=True)


@register_explainer("gradient_shap", title="GradientSHAP", cases=({"samples": 3},))
@dataclass(kw_only=True, eq=False, repr=False)
class GradientShap(_GradientSum):
    """mean_k (x_k - b_k) * df(b_k + a_k (x_k - b_k))/dx, summed over the channels, (B, 1, H, W), signed.

    a_k is uniform in [0, 1), b_k is one of the baselines, x_k the image plus noise. Without noise, the
    expected sum of the map is f(x) minus the mean of f over the baselines.

    Args:
        samples: random draws per image; each takes a forward and a backward pass.
        baselines: images (n, 3, H, W) or colours (n, 3, 1, 1) in [0, 1], drawn uniformly; photos of the
            data set give expected gradients. By default black, white and the backbone's mean colour.
        noise: standard deviation of the Gaussian noise, as a fraction of the image's range of values.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("gradient_shap", net, samples=4, seed=0)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    samples: Count = 32
    baselines: Tensor | None = None
    noise: Annotated[float, Condition(lambda x: x >= 0, NOISE)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        mean = self.backbone.mean.detach().cpu()
        if self.baselines is None:
            self.baselines = torch.cat([torch.zeros_like(mean), torch.ones_like(mean), mean])
        self.forwards = self.samples
        self.baselines = _checked(self.baselines, mean)

    def _map(self, image: Tensor, target: Tensor) -> Tensor:
        assert self.baselines is not None
        one = (1,) * (image.ndim - 1)
        if self.baselines.shape[2:] not in (image.shape[1:], one):
            raise ValueError(
                f"baselines: got images of {tuple(self.baselines.shape[2:])} pixels for images of "
                f"{tuple(image.shape[1:])}; give the same size, or colours (n, 3, "
                f"{', '.join(map(str, one))})"
            )
        draw = _Draws(self.seed, image)
        spread = self.noise * _range(image)
        bases = self.baselines.to(image)

        def points(k: Tensor) -> tuple[Tensor, Tensor]:
            images, weights = [], []
            for generator in map(draw.generator, k.tolist()):
                base = bases[int(generator.integers(len(bases)))]
                a = float(generator.random())
                difference = image - base
                if spread:
                    difference = difference + spread * draw.normal(generator)
                images.append(base + a * difference)
                weights.append(difference)
            return torch.stack(images), torch.stack(weights).double() / self.samples

        return self._sum(points, target).sum(0, keepdim=True)


@register_explainer("smoothgrad", title="SmoothGrad", cases=({"samples": 3},))
@dataclass(kw_only=True, eq=False, repr=False)
class SmoothGrad(_GradientSum):
    """max over the channels of ``|mean_k df(x + e_k)/dx|``, (B, 1, H, W); saliency where e_k is 0.

    Args:
        samples: random draws per image; each takes a forward and a backward pass.
        noise: standard deviation of the Gaussian e_k, as a fraction of the image's range of values;
            the paper finds 0.1 to 0.2 best. Noisy pixels are not clipped to [0, 1].

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("smoothgrad", net, samples=4, noise=0.1)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    samples: Count = 32
    noise: Annotated[float, Condition(lambda x: x > 0, NOISE)] = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forwards = self.samples

    def _map(self, image: Tensor, target: Tensor) -> Tensor:
        draw = _Draws(self.seed, image)
        spread = self.noise * _range(image)
        weight = torch.tensor(1 / self.samples, dtype=torch.float64, device=image.device)

        def points(k: Tensor) -> tuple[Tensor, Tensor]:
            noise = torch.stack([draw.normal(g) for g in map(draw.generator, k.tolist())])
            return image + spread * noise, weight

        return self._sum(points, target).abs().amax(0, keepdim=True)


class _Draws:
    """Random numbers that depend only on the seed and the index of the draw.

    They do not depend on the pixels, so nearly identical images get nearly identical maps.
    """

    def __init__(self, seed: int, image: Tensor) -> None:
        self.seed, self.image = seed, image

    def generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, number])

    def normal(self, generator: np.random.Generator) -> Tensor:
        """Standard normal values of the image's shape, on its device; drawn on the CPU."""
        values = generator.standard_normal(tuple(self.image.shape), dtype=np.float32)
        return torch.from_numpy(values).to(self.image)


def _range(image: Tensor) -> float:
    low, high = image.float().aminmax()
    return float(high - low)


def _checked(baselines: Tensor, mean: Tensor) -> Tensor:
    given = isinstance(baselines, Tensor) and baselines.is_floating_point()
    channels, axes = mean.shape[1], mean.ndim
    if not given or baselines.ndim != axes or not len(baselines) or baselines.shape[1] != channels:
        got = tuple(baselines.shape) if isinstance(baselines, Tensor) else type(baselines)
        sides = "H, W" if axes == 4 else "T, H, W"
        raise ValueError(f"baselines: got {got}; give a float tensor (n, {channels}, {sides})")
    low, high = (float(v) for v in baselines.detach().aminmax())
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # NaN fails as well
        raise ValueError(
            f"baselines: got values in [{low:.3g}, {high:.3g}]; give raw pixels in [0, 1]"
        )
    return baselines.detach()
