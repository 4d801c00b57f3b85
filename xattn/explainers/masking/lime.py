"""LIME: argmin_b sum_z pi(z) (f_c(x_z) - b_0 - z . b)^2 + ridge |b|^2 over superpixels z in {0, 1}^M.

Ribeiro et al., KDD 2016, arXiv 1602.04938; pi(z) = exp(-d(z)^2 / width^2) with the cosine distance
d(z) = 1 - sqrt(|z| / M) of z and the vector of ones. The authors' package and Captum take the square
root of this weight. Captum's ``Lime`` is not used: it draws from the global generator, evaluates one
class per run, uses another shape for the last micro-batch, and fits in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.masked_passes import SuperpixelExplainer
from xattn.runtime.option_checks import Positive


@register_explainer("lime", title="LIME", cases=({"samples": 6},))
@dataclass(kw_only=True, eq=False, repr=False)
class Lime(SuperpixelExplainer):
    """LIME: a weighted ridge regression of the probability on the visibility of superpixels.

    The first sample is the clean image; all other samples keep each superpixel with probability 1/2.

    Args:
        samples: masked copies of an image, including the clean one.
        n_segments, compactness, fill: see
            :class:`~xattn.explainers.masking.masked_passes.SuperpixelExplainer`.
        width: width of the weighting kernel, in units of the cosine distance.
        ridge: penalty on the squared coefficients, above 0; the intercept is not penalised. It shrinks the
            coefficients by about ridge / (ridge + sum of weights / 4).

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("lime", net, samples=40)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    width: Positive = 0.25
    ridge: Positive = 1.0

    def _coalitions(self, segments: int) -> Tensor:
        kept = self._generator(segments).random((self.samples, segments)) < 0.5
        kept[0] = True
        return torch.from_numpy(kept)

    def _coefficients(self, kept: Tensor, scores: Tensor) -> Tensor:
        z = kept.double()
        distance = 1 - z.mean(1).sqrt()  # 1 for the empty z, which is the limit
        weights = torch.exp(-((distance / self.width) ** 2))[:, None]
        # A free intercept is the same as centring both sides at their weighted means.
        z, y = (v - (weights * v).sum(0) / weights.sum() for v in (z, scores))
        gram = z.T @ (weights * z) + self.ridge * torch.eye(z.shape[1], dtype=z.dtype, device="cpu")
        return torch.linalg.solve(gram, z.T @ (weights * y))
