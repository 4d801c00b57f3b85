"""One more encoder block on frozen tokens, then its class token, as DINO's ViTs are built (2104.14294).

y = c + MHSA(LN([c; registers; X]))_c,   z = y + MLP(LN(y))
"""

from __future__ import annotations

from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attentive import Shared
from xattn.heads.base import register_head
from xattn.heads.class_attention import ClassAttention
from xattn.heads.options import Count, Positive


@register_head("dino_block")
class DinoBlock(ClassAttention):
    """A pre-norm ViT block; a learned class token where the backbone has none.

    Args:
        heads: of the attention; None: see :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: hidden width over D.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.
    """

    registers = True

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        mlp_ratio: Positive = 4.0,
        **shared: Unpack[Shared],
    ) -> None:
        options = {"heads": heads, "mlp_ratio": mlp_ratio}
        super().__init__(backbone, options, heads, mlp_ratio, None, False, **shared)
