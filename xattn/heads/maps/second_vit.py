"""Copy: a second ViT, initialised from the frozen one, that is trained to explain it (ViT-Shapley).

    S_k(n) = row(k) . MLP(LayerNorm(Block(norm(copy(x)))))_n

The copy starts with the weights of the network's blocks and of its last norm, all of which are trained. It
adds an attention block without a first norm, and an MLP for each token (Covert et al., ViT-Shapley, ICLR
2023). Two things differ from the paper: the copy begins after the first block, because both networks share
this block and the patch embedding, and the copy's last layer uses the classifier's rows
(:class:`~xattn.heads.fusion.ClassifierFusion`), so that classes without photos have maps too, unless
``fusion="per_class"``. A map takes nearly as long as two passes.
"""

from __future__ import annotations

import copy
from typing import Literal

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.fusion import create_fusion
from xattn.heads.maps.side import token_mlp, tokens_of


@register_head("copy", recipe="outcomes", taps=lambda depth: ["block.0"])
class CopyHead(Head):
    """The copy head of a timm ``VisionTransformer``; it reads the output of the first block and is as large
    as the network.

    Args:
        fusion: ``"classifier"`` (ours) or ``"per_class"``, as published.
        explain_with: show raw ``"scores"`` or the ``"mask"`` sigmoid(scores). Both rank cells in the
            same order.

    Raises:
        ValueError: the network is not a timm ``VisionTransformer``, or it has no single linear
            classifier and ``fusion`` is ``"classifier"``.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("copy", net)
        >>> head(head.tapped(net)(torch.rand(2, 3, 32, 32)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
    """

    own_passes = 1

    def __init__(
        self,
        backbone: Backbone,
        fusion: Literal["classifier", "per_class"] = "classifier",
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        super().__init__(backbone, {"fusion": fusion, "explain_with": explain_with})
        model, width = backbone.model, backbone.channels[0]
        if not isinstance(model, VisionTransformer):
            raise ValueError(
                f"head: 'copy' copies the blocks of timm's VisionTransformer, but {backbone.name} is "
                f"not one; train 'side', 'evidence' or 'ttame'"
            )
        with backbone.alone():  # otherwise a copy could contain the hooks of another thread
            begun = copy.deepcopy([*list(model.blocks)[1:], model.norm])
        last = Block(width, head_count(width, None), qkv_bias=True)
        last.norm1 = nn.Identity()
        network = nn.Sequential(*begun, last, token_mlp(width))
        self.network = network.float().requires_grad_(True)
        self.fusion = create_fusion(fusion, backbone, [width], None, raw_last=False)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        """Scores (B, M or K, h, w) on the grid of patches."""
        self.check_taps(taps)
        size = int(taps.maps[0].shape[2]), int(taps.maps[0].shape[3])
        maps = Backbone.tokens_to_map(self.network(tokens_of(taps)[0]), size)
        return self.fusion([maps], class_index, size)
