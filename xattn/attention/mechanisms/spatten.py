"""SpAtten removes unimportant tokens and heads, block by block, for the rest of the network.

    s_j = sum of P_ij over layers, heads and queries i       importance of token j so far
    e_h = sum of |E_h|, the output of head h, over layers    importance of head h so far

Before block l, only the best ceil(r_l N) patches and the best ceil(rho_l H) heads are kept. In a converted
model, the other tokens are really removed: the whole block, including its MLP, computes only on the tokens
that remain. The others bypass it unchanged, so the output of a block is still the whole grid. Prefix tokens
are always kept. Within a layer, two options save more work:

    values    P diag(c): each head reads only the values of the keys that receive the most attention
    bits      P is computed from the high bits of q and k. A row whose largest weight is below
              ``refetch`` is too flat and is recomputed with all bits. (This is emulated: numbers are
              rounded, not packed.)

The method is from Wang, Zhang, Han, arXiv 2012.09852.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, register_attention
from xattn.attention.inputs import Inputs, may_read_values
from xattn.attention.operators.algebra import ColumnsOperator, GatedOperator, SumOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.subsets import SubsetsOperator
from xattn.attention.record import recording
from xattn.kernels.softmax.reference import widen


def truncate_bits(x: Tensor, high: int, low: int) -> tuple[Tensor, Tensor]:
    """Round x (B, H, N, D) to its high bits only, and to all ``high + low`` bits; return both results.

    All numbers of a head share one quantisation step. Gradients pass as if x were not rounded.
    """
    top = x.detach().abs().amax((2, 3), keepdim=True)
    step = (top / (2 ** (high + low - 1) - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    whole = (x.detach() / step).round()
    coarse = (whole / 2**low).floor() * 2**low
    return x + (coarse * step - x).detach(), x + (whole * step - x).detach()


class LayerState(NamedTuple):
    """What remains in a layer during a forward pass, and how important it is."""

    layer: int
    tokens: Tensor | None
    """Remaining tokens, LongTensor (B, n), ascending; None means all."""
    heads: Tensor | None
    """Remaining heads, bool (B, H); None means all."""
    s: Tensor
    """(B, N), the importance of each token before this layer or, if it was removed, at that time."""
    e: Tensor
    """(B, H), the importance of each head."""
    last: Tensor
    """(B, N), for each removed token, the last layer in which it was present."""


def _rows(tokens: Tensor, x: Tensor) -> Tensor:
    """Return the row numbers (B n,) of ``tokens`` (B, n) in x (B, N, C) after its first two dimensions have
    been flattened."""
    first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return (first + tokens).flatten()


@register_attention(
    "spatten",
    paper="arXiv 2012.09852",
    complexity="r^2 N^2 D",
    causal=True,
    training_free=True,
    cases=(
        {},
        {"first": 1, "last": 1},
        {"values": 0.5},
        {"first": 1, "keep_heads": 0.5, "first_head": 1},
    ),
    bench=({},),
    studies={"swap": ({}, {"options": {"last": 3}}), "attention-maps": {"depth": 1.0}},
)
class SpAtten(Mechanism):
    """Softmax attention, with cascade pruning between the layers of a converted model.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        keep: the share of the patches that remain in block ``last`` and later ones.
        first: the first block, counted from 0, before which patches are removed. From there to ``last``,
            the remaining share falls linearly. If ``first`` equals ``last``, all of these patches are
            removed at once.
        last: the block from which the share stays constant; 11 is the last block of a ViT with 12 blocks.
        keep_heads, first_head: the same as ``keep`` and ``first``, for heads.
        values: the share of the keys whose values a head reads, namely the keys with the largest sums of P.
            If it is below 1, the selection in a causal call also depends on later queries.
        bits: (high, low) bits of queries and keys, for example (6, 4); None does not round.
        refetch: a row is computed with all bits if its largest weight is below this.
        rank: "all" sums s over all queries; "class" uses only the first token.
        layer: the number of the block; :func:`~xattn.attention.convert` sets it.

    Raises:
        ValueError: if ``rank`` is unknown, or a number is out of range.
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
                raise ValueError(f"{name}: got {share}; give a share above 0 and up to 1")
        for name, block, share in (("first", first, 0), ("first_head", first_head, keep_heads)):
            if share < 1 and not 1 <= block <= last:
                raise ValueError(
                    f"{name}, last: got {block}, {last}; give block numbers of at least 1, in order"
                )
        if bits is not None and (len(bits) != 2 or bits[0] < 2 or bits[1] < 0 or sum(bits) > 16):
            raise ValueError(f"bits: got {bits}; give at least 2 high bits, and at most 16 in all")
        if rank not in ("all", "class"):
            raise ValueError(f"rank: got {rank!r}; give 'all' or 'class'")
        if layer < 0:
            raise ValueError(f"layer: got {layer}; give the number of the block: 0, 1, ...")
        self.keep, self.first, self.last, self.layer = keep, first, last, layer
        self.keep_heads, self.first_head, self.values = keep_heads, first_head, values
        self.bits, self.refetch, self.rank = None if bits is None else tuple(bits), refetch, rank

    def share(self, layer: int, heads: bool = False) -> float:
        """Return the share r of the patches that a block keeps; with ``heads``, the share rho of the
        heads."""
        first, keep = (self.first_head, self.keep_heads) if heads else (self.first, self.keep)
        if keep == 1:
            return 1.0
        done = (min(layer, self.last) - first + 1) / (self.last - first + 1)
        return 1 - (1 - keep) * max(0.0, done)

    def enter(self, x: Tensor, prefix: int, carried: dict[Any, Any], whole: bool) -> Tensor:
        before = self._before(x, carried)
        now = self._chosen(x, prefix, before)
        carried["spatten", self.layer] = now
        if now.tokens is None:
            return x
        given = carried.pop("spatten gives", None)  # the whole grid, and its remaining tokens
        carried["spatten passes by"] = x, now.tokens, whole
        if whole:
            return x
        if given is not None and given[0] is x and now.tokens is before.tokens:
            return given[1]  # type: ignore[no-any-return]
        return x.flatten(0, 1).index_select(0, _rows(now.tokens, x)).unflatten(0, now.tokens.shape)

    def leave(self, x: Tensor, carried: dict[Any, Any]) -> Tensor:
        passes_by = carried.pop("spatten passes by", None)
        if passes_by is None:
            return x
        before, tokens, whole = passes_by
        rows, y = _rows(tokens, before), x.flatten(0, 1)
        some = y.index_select(0, rows) if whole else y
        out: Tensor = before.flatten(0, 1).index_copy(0, rows, some).view_as(before)
        if not whole and not out.requires_grad:  # else the graph would outlive the pass
            carried["spatten gives"] = out, x
        return out

    def _before(self, x: Tensor, carried: dict[Any, Any]) -> LayerState:
        """Return what remained after the previous block with this mechanism."""
        earlier = [
            key[1]
            for key in carried
            if isinstance(key, tuple) and key[0] == "spatten" and key[1] < self.layer
        ]
        if earlier and carried["spatten", max(earlier)].s.shape == x.shape[:2]:
            return carried["spatten", max(earlier)]  # type: ignore[no-any-return]
        none = widen(x.new_zeros(len(x), x.shape[1]))
        return LayerState(
            self.layer, None, None, none, none.new_zeros(len(x), self.num_heads), none
        )

    @torch.no_grad()
    def _chosen(self, x: Tensor, prefix: int, before: LayerState) -> LayerState:
        tokens, heads, last, n = before.tokens, before.heads, before.last, x.shape[1] - prefix
        count = max(1, math.ceil(self.share(self.layer) * n - 1e-9)) if n else 0
        if count < (n if tokens is None else tokens.shape[1] - prefix) and self._seen(before.s):
            patches = torch.arange(n, device=x.device).expand(len(x), -1)
            patches = patches if tokens is None else tokens[:, prefix:] - prefix
            last = last.scatter(1, patches + prefix, float(before.layer))
            best = before.s[:, prefix:].gather(1, patches).topk(count).indices
            patches = patches.gather(1, best.sort(1).values) + prefix
            first = torch.arange(prefix, device=x.device).expand(len(x), -1)
            tokens = torch.cat([first, patches], 1)
        few = math.ceil(self.share(self.layer, heads=True) * self.num_heads - 1e-9)
        if few < self.num_heads and self._seen(before.e):
            e = before.e if heads is None else before.e.masked_fill(~heads, -1.0)
            heads = torch.zeros_like(e, dtype=torch.bool).scatter(1, e.topk(few).indices, True)
        return before._replace(layer=self.layer, tokens=tokens, heads=heads, last=last)

    @staticmethod
    def _seen(importance: Tensor) -> bool:
        """Return whether any earlier layer has counted importance."""
        return not may_read_values(importance) or bool((importance != 0).any())

    def _alive(self, inputs: Inputs) -> LayerState | None:
        """Return what remains in this layer; None outside a pass of a converted model."""
        alive: LayerState | None = (inputs.carried or {}).get(("spatten", self.layer))
        if alive is None or len(alive.s) != len(inputs.q):
            return None
        n = alive.s.shape[1] if alive.tokens is None else alive.tokens.shape[1]
        return alive if inputs.q.shape[2] in (n, alive.s.shape[1]) else None

    def _survival(self, alive: LayerState) -> Tensor:
        """Return the last layer so far in which each token was present, (B, N)."""
        if alive.tokens is None:
            return torch.full_like(alive.last, self.layer)
        return alive.last.scatter(1, alive.tokens, float(self.layer))

    def _prunes_later(self, alive: LayerState | None) -> bool:
        """Return whether later blocks will remove patches."""
        if alive is None or self.keep == 1:
            return False
        return alive.tokens is None or self.share(self.layer) > self.keep

    @torch.no_grad()
    def _count(
        self, alive: LayerState | None, operator: Operator, v: Tensor, mass: Tensor | None
    ) -> LayerState | None:
        """Return what remains, with the importance updated by this layer; None if nothing has been
        counted."""
        if alive is None:
            if mass is None:
                return None
            none = mass.new_zeros(len(mass), mass.shape[2])
            alive = LayerState(self.layer, None, None, none, none.new_zeros(mass.shape[:2]), none)
        s, e = alive.s, alive.e
        if mass is not None:
            own = mass.sum(1).to(s.dtype)
            s = s + own if alive.tokens is None else s.scatter_add(1, alive.tokens, own)
        if self.keep_heads < 1:
            e = e + widen(operator.detach().matvec(v.detach())).abs().sum((2, 3)).to(e.dtype)
        return alive._replace(s=s, e=e)

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
        """Compute P of the remaining tokens, from rounded queries and keys if ``bits`` is set."""

        def softmax(q: Tensor, k: Tensor) -> SoftmaxOperator:
            return SoftmaxOperator(q, k, inputs.scale, backend=self.backend, causal=inputs.causal)

        if self.bits is None:
            return softmax(q, k)
        (high_q, full_q), (high_k, full_k) = (truncate_bits(x, *self.bits) for x in (q, k))
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
        """Compute the sum of P over the queries that ``rank`` counts, (B, H, n)."""
        if self.rank == "class":
            return weights.rows(torch.zeros(1, dtype=torch.long, device=weights.device))[:, :, 0]
        ones = torch.ones(weights.shape[0], 1, weights.shape[2], device=weights.device)
        return weights.vecmat(ones)[:, :, 0]

    def _read(self, mass: Tensor, prefix: int) -> Tensor:
        """Return c, (B, H, n), which is 1 for the keys whose values are read and 0 for the others."""
        count = mass.shape[2] - prefix
        best = mass[..., prefix:].topk(math.ceil(self.values * count - 1e-9)).indices + prefix
        read = torch.zeros_like(mass).scatter(2, best, 1.0)
        read[..., :prefix] = 1.0
        return read

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``importance``, which is s after this layer or, for a removed patch, the value of s when
        it was removed; and ``survival``, the last layer so far in which each patch was present."""
        alive = operator.context
        if alive is None or inputs.grid is None or len(inputs.grid) != 2:
            return {}
        found = {"importance": alive.s, "survival": self._survival(alive)}
        return {
            name: x[:, None, inputs.prefix :].unflatten(-1, inputs.grid)
            for name, x in found.items()
        }
