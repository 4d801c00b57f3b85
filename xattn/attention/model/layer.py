"""An attention layer around a mechanism, with projections as in a timm ViT and optional rotations.

:func:`create_attention` creates one from the name of its mechanism:

    layer = create_attention("gna", dim=384, num_heads=6, kernel=7)
    y = layer(x, grid=(32, 32), prefix=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, create_mechanism, merge_heads
from xattn.attention.positions import Rotation, check_grid, create_rotation, positions

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Multi-head self-attention around a mechanism, with projections as in a timm ViT.

    Args:
        mechanism: the mechanism between the projections.
        qkv_bias, proj_bias: whether the projections have biases.
        qk_norm: whether to apply a layer norm to the queries and keys of each head.
        kv_heads: Hk, the number of heads of keys and values. It must divide the number of query heads,
            which is the default.
        rotate: how queries and keys are rotated by their positions. A rotation, or a name with options such
            as ``"comrope:form=ap"``, becomes part of the mechanism; see
            :func:`~xattn.attention.create_mechanism`. A function (q, k, positions) -> (q, k) is called by
            the layer; positions (N, n) are the coordinates on the grid, and 0 for prefix tokens. See
            :mod:`xattn.attention.positions`.

    Raises:
        ValueError: if ``kv_heads`` does not divide the number of heads, the rotation is not valid, or
            ``rotate`` is given for a mechanism that already has a rotation.

    Example:
        >>> import torch
        >>> from xattn.attention import Attention, create_mechanism
        >>> layer = Attention(create_mechanism("softmax", 32, 4))
        >>> layer(torch.rand(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        mechanism: Mechanism,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        kv_heads: int | None = None,
        rotate: Rotate | str | None = None,
    ) -> None:
        super().__init__()
        dim, self.num_heads = mechanism.dim, mechanism.num_heads
        self.kv_heads = self.num_heads if kv_heads is None else check_whole("kv_heads", kv_heads)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: got {kv_heads} for {self.num_heads} heads; give a divisor of {self.num_heads}"
            )
        width = dim // self.num_heads
        self.qkv = nn.Linear(dim, dim + 2 * self.kv_heads * width, bias=qkv_bias)
        self.q_norm: nn.Module = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(width) if qk_norm else nn.Identity()
        if rotate is not None and mechanism.rotate is not None:
            raise ValueError(
                f"rotate: the mechanism already has {type(mechanism.rotate).__name__}; leave "
                f"out rotate, or create the mechanism without it"
            )
        if isinstance(rotate, str):
            rotate = create_rotation(rotate, width, self.kv_heads)
        if isinstance(rotate, Rotation):
            mechanism.rotate, rotate = rotate, None
        self.rotate: Rotate | None = rotate
        self.mechanism = mechanism
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self,
        x: Tensor,
        grid: Sequence[int] | None = None,
        prefix: int = 0,
        causal: bool = False,
    ) -> Tensor:
        """Map x (B, N, C) to (B, N, C); the other arguments are those of :meth:`Mechanism.forward`."""
        if x.ndim != 3 or x.shape[2] != self.mechanism.dim:
            raise ValueError(f"x: got {tuple(x.shape)}; give (B, N, {self.mechanism.dim})")
        qkv = self.qkv(x).unflatten(2, (self.num_heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.kv_heads, self.kv_heads), 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotate is not None:
            if grid is None:
                raise ValueError("grid: rotated queries and keys need the grid of the tokens")
            check_grid("rotate", (0,), tuple(grid), prefix, x.shape[1])
            q, k = self.rotate(q, k, positions(grid, prefix, x))
        y = self.mechanism(q, k, v, grid, prefix, x=x, causal=causal)
        return self.proj(merge_heads(y))


def create_attention(
    name: str,
    dim: int,
    num_heads: int,
    *,
    qkv_bias: bool = True,
    proj_bias: bool = True,
    qk_norm: bool = False,
    kv_heads: int | None = None,
    rotate: Rotate | str | None = None,
    **options: Any,
) -> Attention:
    """Create an attention layer from the name of its mechanism; the other arguments are those of
    :class:`Attention`.

    Raises:
        ValueError: as in :func:`create_mechanism`.

    Example:
        >>> import torch
        >>> from xattn.attention import create_attention
        >>> layer = create_attention("gna", dim=32, num_heads=4, kernel=3)
        >>> layer(torch.rand(2, 26, 32), grid=(5, 5), prefix=1).shape
        torch.Size([2, 26, 32])
    """
    mechanism = create_mechanism(name, dim, num_heads, **options)
    return Attention(mechanism, qkv_bias, proj_bias, qk_norm, kv_heads, rotate)
