"""Hyper-kernels instead of attention: a kernel that is a function of position, and products of maps.

    p = W x,   c = p o K,   u = std(c std(p)) + std(c o p),   s = 2 sigmoid(mean_channels(u) (y o k) o y)
    z = 1/N sum_n s_n o x_n

x (C, h, w) is the map, y its mean over positions, and p (m, h, w) are planes. The hyper-kernels K (m, h, w)
and k (C,) are those of :mod:`xattn.blocks.hyper_kernel`, which also defines std; c std(p) multiplies planes
as matrices. The parts come from github.com/hyperevolnet/Terminator; their combination is ours. With k = 0
the head equals ``gap``.
"""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.blocks.hyper_kernel import HyperKernel, hyper_interact, plane_product, standardise
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head
from xattn.runtime.option_checks import Count


@register_head(
    "hyperzzw", cases=({"planes": 4, "hidden": 8}, {"planes": 4, "hidden": 8, "layers": 1})
)
class HyperZZW(AttentiveHead):
    """A score in (0, 2) for every position and channel, followed by the mean.

    Class maps are CAM over the scored features, which is exact if the scores are held constant. Kernels are
    functions of position, so a head accepts grids of any size; the order of the patches matters. There are
    about m (C + hidden) + 3 hidden^2 parameters.

    Args:
        planes: m, the number of planes.
        hidden, layers: the size of the kernel over positions; the kernel over channels is half as wide.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("hyperzzw", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    learns_scores = False
    permutes = False

    def __init__(
        self,
        backbone: Backbone,
        planes: Count = 32,
        hidden: Count = 32,
        layers: Count = 2,
        **shared: Unpack[SharedOptions],
    ) -> None:
        width = backbone.channels[-1]
        options = {"planes": planes, "hidden": hidden, "layers": layers}
        super().__init__(backbone, options, width, **shared)
        self.planes = nn.Linear(width, planes, bias=False)
        self.kernel = HyperKernel(planes, 2, hidden, layers)
        self.channel_kernel = HyperKernel(1, 1, max(1, hidden // 2), layers)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        planes = self.planes(x).transpose(1, 2).unflatten(2, tokens.grid)
        context = planes * self.kernel(tokens.grid)
        u = standardise(plane_product(context, standardise(planes)))
        u = u + standardise(context * planes)
        y = x.mean(1)
        score = hyper_interact(u, y * self.channel_kernel(y.shape[1:])[0] * y)
        values = 2 * score.flatten(2).transpose(1, 2) * x
        return AttentionTerms(x.new_zeros(x.shape[0], 1, x.shape[1]), values[:, None])
