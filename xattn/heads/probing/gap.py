"""Global average pooling: z = 1/N sum_n x_n, the pooling of most CNNs and many ViTs."""

from __future__ import annotations

from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attended import AttentionTerms, Tokens
from xattn.heads.attentive import AttentiveHead, SharedOptions
from xattn.heads.base import register_head


@register_head("gap")
class Gap(AttentiveHead):
    """The mean of the patches, followed by the classifier; its class maps are CAM (arXiv 1512.04150).

    Args:
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("gap", net, classes=5)
        >>> taps = net(torch.rand(2, 3, 32, 32))
        >>> head.logits(head.tokens(taps)).shape, head(taps).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 2, 2]))
    """

    learns_scores = False

    def __init__(self, backbone: Backbone, **shared: Unpack[SharedOptions]) -> None:
        super().__init__(backbone, {}, backbone.channels[-1], **shared)

    def scores_and_values(self, tokens: Tokens) -> AttentionTerms:
        x = tokens.patches[-1]
        return AttentionTerms(x.new_zeros(x.shape[0], 1, x.shape[1]), x[:, None])
