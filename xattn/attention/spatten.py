"""SpAtten: tokens and heads that matter little leave the network on the way, and stay away.

    s_j = sum of P_ij over layers, heads and queries i       importance of token j so far
    e_h = sum of |E_h|, the output of head h, over layers    importance of head h so far

Before block l only the best ceil(r_l N) patches stay, and the best ceil(rho_l H) heads. In a converted
model tokens really leave: the block, MLP and all, computes on those that are left, and the others pass
it by as they are, so that what comes after a block is the whole grid. Prefix tokens always stay.
Within a layer

    values    P diag(c): each head reads only the values of the keys that receive most
    bits      P from the high bits of q and k; a row whose largest weight is below ``refetch`` is flat,
              and is computed again with all bits (emulated: numbers are rounded, not packed)

Wang, Zhang, Han, arXiv 2012.09852.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xattn.attention.algebra import ColumnsOperator, GatedOperator, SumOperator
from xattn.attention.base import register_attention
from xattn.attention.cascade import Cascade
from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator, SoftmaxOperator
from xattn.attention.record import recording
from xattn.attention.rounding import rounded
from xattn.attention.subsets import SubsetsOperator


@register_attention(
    "spatten",
    paper="arXiv 2012.09852",
    complexity="r^2 N^2 D",
    causal=True,
    by_layer=True,
    around_block=True,
    training_free=True,
    cases=(
        {},
        {"first": 1, "last": 1},
        {"values": 0.5},
        {"first": 1, "keep_heads": 0.5, "first_head": 1},
    ),
    bench=({},),
)
class SpAtten(Cascade):
    """Softmax attention, with cascade pruning between the layers of a converted model.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        keep: share of the patches that are left in block ``last``.
        first: the first block, counted from 0, that patches leave before; from there on their share falls
            linearly until ``last``. ``first = last`` takes all at once.
        last: the block from which on the share stays; 11 is the end of a ViT with 12 blocks.
        keep_heads, first_head: the same for heads.
        values: share of the keys whose values a head reads, those with the largest sum of P.
        bits: (high, low) bits of queries and keys, for example (6, 4); None leaves numbers as they are.
        refetch: a row is computed with all bits if its largest weight is below this.
        rank: "all", s counts all queries; "class", only the first token.
        layer: number of the block; :func:`~xattn.attention.convert` gives it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        keep: float = 0.5,
        first: int = 3,
        last: int = 11,
        keep_heads: float = 1.0,
        first_head: int = 4,
        values: float = 1.0,
        bits: tuple[int, int] | None = None,
        refetch: float = 0.1,
        rank: str = "all",
        layer: int = 0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        for name, share in (("keep", keep), ("keep_heads", keep_heads), ("values", values)):
            if not 0 < share <= 1:
                raise ValueError(f"{name}: got {share}; give a share above 0, at most 1")
        for name, block, share in (("first", first, 0), ("first_head", first_head, keep_heads)):
            if share < 1 and not 1 <= block <= last:
                raise ValueError(
                    f"{name}, last: got {block}, {last}; give the numbers of blocks from 1 on, in order"
                )
        if bits is not None and (len(bits) != 2 or bits[0] < 2 or bits[1] < 0 or sum(bits) > 16):
            raise ValueError(f"bits: got {bits}; give at least 2 high bits, and 16 in all at most")
        if rank not in ("all", "class"):
            raise ValueError(f"rank: got {rank!r}; give 'all' or 'class'")
        if layer < 0:
            raise ValueError(f"layer: got {layer}; give the number of the block, from 0 on")
        self.keep, self.first, self.last, self.layer = keep, first, last, layer
        self.keep_heads, self.first_head, self.values = keep_heads, first_head, values
        self.bits, self.refetch, self.rank = None if bits is None else tuple(bits), refetch, rank

    def operator(self, inputs: Inputs) -> Operator:
        n, alive = inputs.q.shape[2], self._alive(inputs)
        tokens = None if alive is None else alive.tokens
        outside = tokens is not None and n > tokens.shape[1]
        q, k, v = inputs.q, inputs.k, inputs.v
        if outside:
            assert tokens is not None
            at = tokens[:, None, :, None]
            q, k, v = (x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3])) for x in (q, k, v))
        weights = self._weights(q, k, inputs)
        heads = None if alive is None else alive.heads
        if heads is not None:
            gate = heads.to(q.dtype)[..., None].expand(weights.shape[:3])
            weights = GatedOperator(weights, gate, signed=False, sparse=True)
        operator, mass = weights, None
        if recording() or self._prunes_later(alive) or self.values < 1:
            if isinstance(weights, SoftmaxOperator):
                weights.answer(v)
            with torch.no_grad():
                mass = self._mass(weights.detach())
        if self.values < 1:
            assert mass is not None
            operator = ColumnsOperator(weights, self._read(mass, inputs.prefix).to(q.dtype))
        operator.context = counted = self._count(alive, operator, v, mass)
        if counted is not None and inputs.carried is not None:
            inputs.carried["spatten", self.layer] = counted
        if not outside:
            return operator
        assert tokens is not None
        every = tokens[:, None, None].expand(-1, q.shape[1], -1, -1)
        whole = SubsetsOperator(operator, every, every, n, once=True, causal=inputs.causal)
        whole.context = counted
        return whole

    def _weights(self, q: Tensor, k: Tensor, inputs: Inputs) -> Operator:
        """P of the tokens that are left, with rounded numbers if ``bits`` asks for them."""

        def softmax(q: Tensor, k: Tensor) -> SoftmaxOperator:
            return SoftmaxOperator(q, k, inputs.scale, backend=self.backend, causal=inputs.causal)

        if self.bits is None:
            return softmax(q, k)
        (high_q, full_q), (high_k, full_k) = (rounded(x, *self.bits) for x in (q, k))
        if self.refetch > 1:
            return softmax(full_q, full_k)
        high = softmax(high_q, high_k)
        if self.refetch <= 0:
            return high
        with torch.no_grad():
            seen = high.detach()
            tops = [seen.tile(i, slice(None)).amax(-1) for i in seen.row_chunks()]
            again = (torch.cat(tops, 2) < self.refetch).to(q.dtype)
        terms = [
            GatedOperator(high, 1 - again, signed=False, sparse=True),
            GatedOperator(softmax(full_q, full_k), again, signed=False, sparse=True),
        ]
        return SumOperator(terms, stochastic=True)

    def _mass(self, weights: Operator) -> Tensor:
        """Sum of P over the queries that count, (B, H, n)."""
        if self.rank == "class":
            return weights.rows(torch.zeros(1, dtype=torch.long, device=weights.device))[:, :, 0]
        ones = torch.ones(weights.shape[0], 1, weights.shape[2], device=weights.device)
        return weights.vecmat(ones)[:, :, 0]

    def _read(self, mass: Tensor, prefix: int) -> Tensor:
        """c, (B, H, n): 1 for the keys whose values are read."""
        count = mass.shape[2] - prefix
        best = mass[..., prefix:].topk(math.ceil(self.values * count - 1e-9)).indices + prefix
        read = torch.zeros_like(mass).scatter(2, best, 1.0)
        read[..., :prefix] = 1.0
        return read

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """``importance``: s after this layer; of a patch that has left, what it was then.
        ``survival``: the last layer so far in which each patch was there."""
        alive = operator.context
        if alive is None or inputs.grid is None or len(inputs.grid) != 2:
            return {}
        found = {"importance": alive.s, "survival": self._survival(alive)}
        return {
            name: x[:, None, inputs.prefix :].unflatten(-1, inputs.grid)
            for name, x in found.items()
        }
