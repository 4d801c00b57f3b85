"""KernelSHAP: argmin_b sum_z k(z) (f_c(x_z) - f_c(x_0) - z . b)^2 with sum b = f_c(x) - f_c(x_0).

Lundberg and Lee, NeurIPS 2017, arXiv 1705.07874, over superpixels z in {0, 1}^M, where x_0 has all
of them removed and k(z) = (M - 1) / (binom(M, |z|) |z| (M - |z|)). With all 2^M coalitions, b are
the Shapley values. Otherwise coalitions are drawn from k, each together with its complement, which
lowers the variance (Covert and Lee, AISTATS 2021, arXiv 2012.01536). Captum's ``KernelShap`` is not
used: it draws from the global generator, represents the constraint by two samples of weight 10^6 in a
float32 fit, and does not pair coalitions.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from xattn.explainers.base import register_explainer
from xattn.explainers.masking.masked_passes import SuperpixelExplainer


@register_explainer("kernel_shap", title="KernelSHAP", cases=({"samples": 6},))
class KernelShap(SuperpixelExplainer):
    """KernelSHAP: estimated Shapley values of the superpixels for the probability of the class.

    The values of an image's superpixels add up to exactly f(x) - f(x_0). They are exact Shapley values if
    2^M <= ``samples``, otherwise estimates whose error falls as 1 / sqrt(samples).

    Args:
        samples: the largest number of masked copies of an image, including the complete and the empty
            image; at least twice the number of superpixels. Lundberg's package uses 2 M + 2048.
        n_segments, compactness, fill: see
            :class:`~xattn.explainers.masking.masked_passes.SuperpixelExplainer`.

    Raises:
        ValueError: an image has more than ``samples / 2`` superpixels.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("kernel_shap", net, samples=40)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    def _coalitions(self, segments: int) -> Tensor:
        if 2**segments <= self.samples:
            codes = torch.arange(2**segments, device="cpu")[:, None]
            return (codes >> torch.arange(segments, device="cpu")) % 2 == 1
        if self.samples < 2 * segments:
            raise ValueError(
                f"samples: got {self.samples} for {segments} superpixels; give at least "
                f"{2 * segments}, or a smaller n_segments"
            )
        generator, pairs = self._generator(segments), (self.samples - 2) // 2
        sizes = torch.arange(1, segments, device="cpu").double()
        likely = 1 / (sizes * (segments - sizes))  # k(z) times the binom(M, |z|) coalitions
        drawn = generator.choice(sizes.long().numpy(), pairs, p=(likely / likely.sum()).numpy())
        ranks = generator.random((pairs, segments)).argsort(1).argsort(1)
        kept = torch.from_numpy(ranks < drawn[:, None])
        ends = torch.ones(1, segments, dtype=torch.bool, device="cpu")
        return torch.cat([~ends, kept, ~kept, ends])  # the ends come first and last, as above

    def _coefficients(self, kept: Tensor, scores: Tensor) -> Tensor:
        segments = kept.shape[1]
        difference = scores[-1] - scores[0]
        share = difference.expand(segments, -1) / segments
        if segments == 1:
            return share
        z, y = kept[1:-1].double(), scores[1:-1] - scores[0]
        # b = difference / M + Q u with Q (M, M - 1) an orthonormal basis of {b: sum b = 0}: the
        # constraint holds for every u, and u solves an ordinary least squares problem.
        basis = torch.linalg.qr(
            torch.eye(segments, dtype=z.dtype, device="cpu")[:, 1:] - 1 / segments
        ).Q
        weights = self._weights(kept[1:-1]).sqrt()[:, None]
        rows, rest = weights * (z @ basis), weights * (y - z @ share)
        return share + basis @ (torch.linalg.pinv(rows) @ rest)

    def _weights(self, kept: Tensor) -> Tensor:
        """(T,): the Shapley kernel if all coalitions are used, or 1 if they were drawn from it."""
        segments = kept.shape[1]
        if 2**segments > self.samples:
            return torch.ones(len(kept), dtype=torch.float64, device="cpu")
        kernel = [
            (segments - 1) / (comb(segments, n) * n * (segments - n)) for n in range(1, segments)
        ]
        return torch.tensor(kernel, dtype=torch.float64, device="cpu")[kept.sum(1) - 1]
