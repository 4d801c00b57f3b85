"""Copy: a second ViT, begun as the frozen one, that is trained to explain it (ViT-Shapley).

    S_k(n) = row(k) . MLP(LayerNorm(Block(copy(x))))_n

The copy has the weights of the network's blocks, all of which are trained, one attention block more, whose
first norm is the identity, and an MLP for each token (Covert et al., ViT-Shapley, ICLR 2023). Two things
differ here: it begins after the first block, which both networks share with the patch embedding, and
its last layer reads the classifier's rows (:class:`~xattn.heads.fusion.ClassifierFusion`), so that classes
without photos have maps too, unless ``fusion="per_class"``. A map costs nearly two passes.
"""

from __future__ import annotations

import copy
from typing import Literal

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.heads.base import Head, register_head
from xattn.heads.cross_attention import head_count
from xattn.heads.fusion import create_fusion
from xattn.heads.maps.side import check_vit, on_grid, token_mlp, token_rows


@register_head("copy", recipe="outcomes", taps="block.0")
class CopyHead(Head):
    """The copy head of a timm ViT; it reads the output of the first block. It is as large as the network.

    Args:
        fusion: ``"classifier"`` (ours) or ``"per_class"``, as published.
        explain_with: show raw ``"scores"`` or the ``"mask"`` sigmoid(scores). Both rank pixels alike.
    """

    own_passes = 1

    def __init__(
        self,
        backbone: Backbone,
        fusion: Literal["classifier", "per_class"] = "classifier",
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        super().__init__(backbone, {"fusion": fusion, "explain_with": explain_with})
        model, width = check_vit("copy", backbone), backbone.channels[0]
        blocks = copy.deepcopy(list(model.blocks)[1:])
        last = Block(width, head_count(width, None), qkv_bias=True)
        last.norm1 = nn.Identity()
        self.network = nn.Sequential(*blocks, last, token_mlp(width)).requires_grad_(True)
        self.fusion = create_fusion(fusion, backbone, [width], None, raw_last=False)

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        maps = on_grid(self.network(token_rows(taps)[0]), taps)
        return self.fusion([maps], class_index, (int(maps.shape[2]), int(maps.shape[3])))
