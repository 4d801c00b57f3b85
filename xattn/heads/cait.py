"""CaiT's class attention (arXiv 2103.17239): only the class token attends, with LayerScale.

y = c + g_1 o CA(LN([c; X])),   z = LN(y + g_2 o MLP(LN(y)))
"""

from __future__ import annotations

from typing_extensions import Unpack

from xattn.backbone import Backbone
from xattn.heads.attentive import Shared
from xattn.heads.base import register_head
from xattn.heads.class_attention import ClassAttention
from xattn.runtime.option_checks import Count, Positive


@register_head("cait")
class Cait(ClassAttention):
    """One class-attention layer on the backbone's class token, or a learned one where there is none.

    Registers are not read.

    Args:
        heads: of the attention; None: see :func:`~xattn.heads.cross_attention.head_count`.
        mlp_ratio: hidden width over D.
        layer_scale: where both gains g start.
        shared: see :class:`~xattn.heads.attentive.AttentiveHead`.
    """

    registers = False

    def __init__(
        self,
        backbone: Backbone,
        heads: Count | None = None,
        mlp_ratio: Positive = 4.0,
        layer_scale: float = 1e-5,
        **shared: Unpack[Shared],
    ) -> None:
        options = {"heads": heads, "mlp_ratio": mlp_ratio, "layer_scale": layer_scale}
        super().__init__(backbone, options, heads, mlp_ratio, layer_scale, True, **shared)
