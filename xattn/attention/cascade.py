"""Tokens and heads that leave a converted model on the way: which are left, and what has been counted.

Between the blocks the whole grid goes on: a block computes on the tokens that are left, and its output
is put back among the others, which pass it by as they are.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.attention.base import Mechanism
from xattn.attention.inputs import Inputs
from xattn.attention.operator import Operator
from xattn.kernels.softmax.reference import widen


class Alive(NamedTuple):
    """What is left in a layer of a pass."""

    layer: int
    tokens: Tensor | None
    """LongTensor (B, n), rising; None is all."""
    heads: Tensor | None
    """Bool (B, H); None is all."""
    s: Tensor
    """(B, N), importance of the tokens before the layer, at last."""
    e: Tensor
    """(B, H), importance of the heads."""
    last: Tensor
    """(B, N), the last layer in which each token that is gone was there."""


class Cascade(Mechanism):
    """Base of mechanisms that prune tokens and heads by their importance in the layers before.

    Attributes: ``layer``, the number of the block; ``keep``, ``first``, ``last``, the share of the
    patches that is left in the end and the blocks from which it falls and until which; ``keep_heads``,
    ``first_head``, the same of heads.
    """

    layer: int
    keep: float
    first: int
    last: int
    keep_heads: float
    first_head: int

    def share(self, layer: int, heads: bool = False) -> float:
        """r or rho of a block."""
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
        given = carried.pop("spatten gives", None)  # whole grid, what was computed of it
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
        if not whole and not out.requires_grad:  # a graph would be kept beyond the pass
            carried["spatten gives"] = out, x
        return out

    def _before(self, x: Tensor, carried: dict[Any, Any]) -> Alive:
        """What the block before left, of those with this mechanism."""
        earlier = [
            key[1]
            for key in carried
            if isinstance(key, tuple) and key[0] == "spatten" and key[1] < self.layer
        ]
        if earlier and carried["spatten", max(earlier)].s.shape == x.shape[:2]:
            return carried["spatten", max(earlier)]  # type: ignore[no-any-return]
        none = widen(x.new_zeros(len(x), x.shape[1]))
        return Alive(self.layer, None, None, none, none.new_zeros(len(x), self.num_heads), none)

    @torch.no_grad()
    def _chosen(self, x: Tensor, prefix: int, before: Alive) -> Alive:
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
        """Whether any layer before has counted."""
        return torch.compiler.is_compiling() or bool((importance != 0).any())

    def _alive(self, inputs: Inputs) -> Alive | None:
        """What is left in this layer; None outside of a pass of a converted model."""
        alive: Alive | None = (inputs.carried or {}).get(("spatten", self.layer))
        if alive is None or len(alive.s) != len(inputs.q):
            return None
        n = alive.s.shape[1] if alive.tokens is None else alive.tokens.shape[1]
        return alive if inputs.q.shape[2] in (n, alive.s.shape[1]) else None

    def _survival(self, alive: Alive) -> Tensor:
        """The last layer so far in which each token was there, (B, N)."""
        if alive.tokens is None:
            return torch.full_like(alive.last, self.layer)
        return alive.last.scatter(1, alive.tokens, float(self.layer))

    def _prunes_later(self, alive: Alive | None) -> bool:
        """Whether patches are still to leave."""
        if alive is None or self.keep == 1:
            return False
        return alive.tokens is None or self.share(self.layer) > self.keep

    @torch.no_grad()
    def _count(
        self, alive: Alive | None, operator: Operator, v: Tensor, mass: Tensor | None
    ) -> Alive | None:
        """What is left, with the importance after this layer; None if nobody has counted."""
        if alive is None:
            if mass is None:
                return None
            none = mass.new_zeros(len(mass), mass.shape[2])
            alive = Alive(self.layer, None, None, none, none.new_zeros(mass.shape[:2]), none)
        s, e = alive.s, alive.e
        if mass is not None:
            own = mass.sum(1).to(s.dtype)
            s = s + own if alive.tokens is None else s.scatter_add(1, alive.tokens, own)
        if self.keep_heads < 1:
            e = e + widen(operator.detach().matvec(v.detach())).abs().sum((2, 3)).to(e.dtype)
        return alive._replace(s=s, e=e)


def _rows(tokens: Tensor, x: Tensor) -> Tensor:
    """Numbers of the rows ``tokens`` (B, n) in x (B, N, C) without its first dimension: (B n,)."""
    first = x.shape[1] * torch.arange(len(x), device=x.device)[:, None]
    return (first + tokens).flatten()
