"""The transformer block, any of whose parts can be left out (arXiv 2410.13732).

    s_ij = q_i . k_j / sqrt(d),   Y = softmax(s) V,   x <- x + Y or (x + Y) / 2 or Y,   x <- x + MLP(LN(x))

    separate    q = n W_Q, k = n W_K            collapsed   q = n W, k = n
    symmetric   q = k = n W_Q                   cholesky    q = k = n T,  T lower triangular

with n = LN(x) or x. Without W_V and W_O, each head mixes the tokens in its own channels, which no weights
change. If the MLP is also left out and there is no norm before V, a stack of blocks is linear in V given
its A, and rollout is exact for each head's chain (:func:`contributions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from xattn.attention.base import check_whole, merge_heads, split_heads
from xattn.attention.operators.base import SoftmaxOperator
from xattn.blocks.base import Block, received_attention, register_block
from xattn.kernels.softmax.reference import widen

RESIDUALS = {"plain": (1.0, 1.0), "average": (0.5, 0.5), "none": (0.0, 1.0)}
"""a and b of x <- a x + b Y."""


@register_block(
    "minimal",
    paper="arXiv 2410.13732",
    complexity="N C^2 for each matrix left, N^2 C",
    cases=(
        {"mlp": False, "qk": "symmetric", "vo": False, "heads": 4, "norm": "qk"},
        {"qk": "separate", "heads": 2, "residual": "average"},
        {"mlp": False, "qk": "collapsed", "vo": False, "norm": "none", "residual": "none"},
        {"mlp": False, "qk": "cholesky", "norm": "qk", "residual": "average"},
    ),
)
class MinimalBlock(Block):
    """Attention whose parts are optional. It has C^2 to 12 C^2 parameters, and only the MLP has biases.

    Args:
        mlp: whether the MLP, 4 C wide, follows, with a residual and, unless ``norm`` is "none", a norm.
        qk: "separate", "collapsed", "symmetric" or "cholesky", see the module. In "collapsed" and
            "cholesky", one matrix W or T joins all channels, so there is only one head.
        vo: whether V = n W_V and Y = A V W_O; otherwise V = n, with the unchanged channels of each head.
        heads: H, which must divide ``dim``.
        norm: "pre": n = LN(x); "qk": only q and k are computed from LN(x), V from x; "none".
        residual: "plain", x + Y; "average", (x + Y) / 2; "none", Y.

    Raises:
        ValueError: an invalid value, or several heads with one matrix for all channels.
    """

    def __init__(
        self,
        dim: int,
        mlp: bool = True,
        qk: Literal["separate", "collapsed", "symmetric", "cholesky"] = "separate",
        vo: bool = True,
        heads: int = 1,
        norm: Literal["pre", "qk", "none"] = "pre",
        residual: Literal["plain", "average", "none"] = "plain",
    ) -> None:
        super().__init__(dim)
        self.heads, self.qk, self.norm, self.residual = (
            check_whole("heads", heads),
            qk,
            norm,
            residual,
        )
        if dim % heads:
            raise ValueError(f"heads: got {heads}; give a divisor of dim, {dim}")
        if heads > 1 and qk in ("collapsed", "cholesky"):
            raise ValueError(f"heads: got {heads}; qk={qk!r} has one matrix for all, give 1")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6) if norm != "none" else None
        if qk == "cholesky":
            whole_matrix = nn.Linear(dim, dim, bias=False).weight.detach()
            self.triangle = nn.Parameter(whole_matrix[_lower(dim)])
        else:
            self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False) if qk == "separate" else None
        self.v = nn.Linear(dim, dim, bias=False) if vo else None
        self.proj = nn.Linear(dim, dim, bias=False) if vo else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6) if mlp and norm != "none" else None
        self.mlp = Mlp(dim, 4 * dim) if mlp else None

    @property
    def linear(self) -> bool:
        """Whether the output is linear in V = x for a given A, that is, whether there is no MLP, no W_V and
        W_O, and no norm before V."""
        return self.mlp is None and self.v is None and self.norm != "pre"

    def run(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> Tensor:
        n = x if self.norm1 is None else self.norm1(x)
        v = n if self.norm == "pre" else x
        v = v if self.v is None else self.v(v)
        operator = self._operator(n)
        seen = operator.detach()

        def maps() -> dict[str, Tensor]:
            return self._maps(seen, grid, prefix)

        y = merge_heads(self.mix(operator, split_heads(v, self.heads), maps))
        y = y if self.proj is None else self.proj(y)
        kept, added = RESIDUALS[self.residual]
        x = kept * x + added * y
        if self.mlp is None:
            return x
        return x + self.mlp(x if self.norm2 is None else self.norm2(x))

    def operator(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> SoftmaxOperator:
        """A = softmax(s)."""
        return self._operator(x if self.norm1 is None else self.norm1(x))

    def maps(self, x: Tensor, grid: tuple[int, ...] | None, prefix: int) -> dict[str, Tensor]:
        """``received``, the mean of A over its rows, and, if A comes from a kernel (q = k), ``component``,
        the first principal component of q over the grid. Both are per head, (B, H, h, w)."""
        return self._maps(self.operator(x, grid, prefix), grid, prefix)

    def logits(self, x: Tensor) -> Tensor:
        """The scores s (B, H, N, N) of tokens (B, N, C)."""
        operator = self._operator(x if self.norm1 is None else self.norm1(x))
        return operator.scale * operator.q @ operator.k.transpose(-2, -1)

    @torch.no_grad()
    def _maps(
        self, operator: SoftmaxOperator, grid: tuple[int, ...] | None, prefix: int
    ) -> dict[str, Tensor]:
        if grid is None:
            return {}
        maps = {"received": received_attention(operator)[..., prefix:].unflatten(-1, grid)}
        if self.qk in ("symmetric", "cholesky"):
            q = widen(operator.q[:, :, prefix:])
            u, s, _ = torch.linalg.svd(q - q.mean(2, keepdim=True), full_matrices=False)
            first = u[..., 0] * s[..., :1]
            largest = first.gather(-1, first.abs().argmax(-1, keepdim=True))
            maps["component"] = (first * torch.where(largest < 0, -1.0, 1.0)).unflatten(-1, grid)
        return maps

    def _operator(self, n: Tensor) -> SoftmaxOperator:
        if self.qk == "collapsed":
            return SoftmaxOperator(self.q(n)[:, None], n[:, None])
        if self.qk == "cholesky":
            t = n.new_zeros(self.dim, self.dim, dtype=self.triangle.dtype)
            q = (n @ t.masked_scatter(_lower(self.dim, n.device), self.triangle))[:, None]
            return SoftmaxOperator(q, q)
        q = split_heads(self.q(n), self.heads)
        return SoftmaxOperator(q, q if self.k is None else split_heads(self.k(n), self.heads))


def contributions(
    blocks: Sequence[Block],
    x: Tensor,
    weight: Tensor,
    grid: tuple[int, ...] | None = None,
    prefix: int = 0,
    start: Tensor | None = None,
) -> Tensor:
    """The exact contribution of every token to the logits of a linear readout of a stack of blocks:
    (B, K, N).

        c_kj = sum_h r_hj (w_kh . x_jh),    r_h = start M_1h M_2h ...,    M = a I + b A, last block first

    The contributions sum to the logits without the readout's bias. A is held fixed: c is what flows from a
    token on the paths that attention has chosen, not the effect of removing the token.

    Args:
        blocks: minimal blocks that are linear given A, all with the same number of heads.
        x: (B, N, C), the input of the first block; ``weight``: (K, C) of the readout.
        start: (B or 1, N), how the readout weights tokens; by default their mean.

    Raises:
        ValueError: unsuitable blocks, or blocks with different numbers of heads.
    """
    operators, steps = [], []
    tokens = x
    for i, block in enumerate(blocks):
        if not isinstance(block, MinimalBlock) or not block.linear:
            raise ValueError(
                f"blocks: block {i} is not linear given A; give minimal blocks with mlp=False, "
                f"vo=False and norm='qk' or 'none'"
            )
        operators.append(block.operator(tokens, grid, prefix))
        steps.append(RESIDUALS[block.residual])
        tokens = block(tokens, grid, prefix)
    heads = {operator.shape[1] for operator in operators} or {1}
    if len(heads) > 1:
        raise ValueError(f"blocks: got {sorted(heads)} heads; give blocks with as many heads each")
    count, batch = x.shape[1], x.shape[0]
    r = x.new_full((1, count), 1 / count) if start is None else start
    r = r[:, None, None].expand(batch, *heads, 1, count)
    for operator, (kept, added) in zip(reversed(operators), reversed(steps), strict=True):
        r = kept * r + added * operator.vecmat(r)
    values = split_heads(x, *heads) @ split_heads(weight[None], *heads).transpose(-2, -1)
    return (r.transpose(-2, -1) * values).sum(1).transpose(1, 2)


def _lower(dim: int, device: torch.device | None = None) -> Tensor:
    return torch.ones(dim, dim, dtype=torch.bool, device=device).tril()
