"""The pre-norm transformer block around any attention mechanism (arXiv 2010.11929).

    x <- x + Attention(LN(x)),    x <- x + W_2 GELU(W_1 LN(x) + b_1) + b_2

Parameters have the same names as in timm's ViT blocks, so timm's weights can be loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from xattn.attention.model.layer import Rotate, create_attention
from xattn.attention.operators.base import Operator
from xattn.attention.record import Call, record
from xattn.blocks.base import Block, register_block


@register_block(
    "attention",
    paper="arXiv 2010.11929",
    complexity="12 N C^2 and the mechanism's",
    cases=(
        {"num_heads": 2},
        {"num_heads": 4, "mechanism": "agent", "options": {"agents": 4, "window": (3, 3)}},
        {"num_heads": 2, "mlp_ratio": 0.0, "qk_norm": True},
    ),
)
class TransformerBlock(Block):
    """Attention and an MLP, each after a layer norm and with a residual.

    Args:
        mechanism: the name of the attention mechanism, see :func:`xattn.attention.list_attention`.
        num_heads: H, which must divide ``dim``.
        options: options of the mechanism.
        mlp_ratio: hidden width of the MLP divided by ``dim``; 0 omits the MLP.
        qkv_bias, proj_bias, qk_norm, kv_heads, rotate: as in :class:`xattn.attention.Attention`.
    """

    def __init__(
        self,
        dim: int,
        mechanism: str = "softmax",
        num_heads: int = 8,
        options: Mapping[str, Any] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        kv_heads: int | None = None,
        rotate: Rotate | str | None = None,
    ) -> None:
        super().__init__(dim)
        if not 0 <= mlp_ratio < float("inf"):
            raise ValueError(f"mlp_ratio: got {mlp_ratio}; give 0 for none, or a ratio such as 4")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = create_attention(
            mechanism,
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            qk_norm=qk_norm,
            kv_heads=kv_heads,
            rotate=rotate,
            **(options or {}),
        )
        hidden = round(mlp_ratio * dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6) if hidden else None
        self.mlp = Mlp(dim, hidden) if hidden else None

    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        x = x + self.attn(self.norm1(x), grid, prefix)
        if self.norm2 is None or self.mlp is None:
            return x
        return x + self.mlp(self.norm2(x))

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Operator:
        """The mechanism's."""
        return self._call(x, grid, prefix).operator

    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """The mechanism's."""
        return self._call(x, grid, prefix).maps

    def _call(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Call:
        with record(alone=True) as calls:
            self.attn(self.norm1(x), grid, prefix)
        return calls[0]
