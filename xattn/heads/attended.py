"""Scores and values of an attentive head, and softmax pooling with them in the attention core.

    s_qt = scale q_q . k_t  (or s given by the head),   o_q = sum_t softmax_t(s)_qt v_qt

If scores are products of queries and keys, the op computes them together with the weights, unless
something else needs them: class maps, or attention training, which adds its perturbation to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xattn.kernels.pooling import softmax_pooling
from xattn.kernels.softmax.reference import widen

FEW = 2**22  # with fewer value entries, calling the op costs more on a CPU than it saves


class Tokens(NamedTuple):
    """The tokens that an attentive head reads: ``patches``, (B, N, C_i) for every tap in use, in
    row-major order of ``grid`` (h, w), and ``prefix`` (B, P, C), the last layer's class and register
    tokens; P may be 0.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("gap", net, classes=5)
        >>> tokens = head.tokens(net(torch.rand(2, 3, 32, 32)))
        >>> tokens.patches[-1].shape, tokens.prefix.shape, tokens.grid
        (torch.Size([2, 4, 64]), torch.Size([2, 1, 64]), (2, 2))
    """

    patches: tuple[Tensor, ...]
    prefix: Tensor
    grid: tuple[int, int]


class Queries(NamedTuple):
    """Scores as products: ``q`` (B or 1, Q, D) and ``k`` (B, T, D) for few queries, or both
    (B, H, N, D) if every token is a query in each of H heads, so that Q = H N."""

    q: Tensor
    k: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class AttentionTerms:
    """``source``: the scores (B, Q, T) before the softmax, or the :class:`Queries` that they are computed
    from; ``values`` (B, G, T, V), each for Q / G consecutive queries; and whatever else the head's
    :meth:`~xattn.heads.attentive.AttentiveHead.finish` reads."""

    source: Tensor | Queries
    values: Tensor
    context: Any = None

    @cached_property
    def scores(self) -> Tensor:
        """(B, Q, T), computed on first access."""
        if isinstance(self.source, Tensor):
            return self.source
        q, k, scale = self.source
        scores = (q * scale) @ k.transpose(-2, -1)
        return scores.flatten(1, 2) if scores.ndim == 4 else scores

    def with_scores(self, scores: Tensor) -> AttentionTerms:
        """A copy with different ``scores`` (B, Q, T), such as perturbed ones."""
        return replace(self, source=scores)

    def pool(self) -> Tensor:
        """Compute softmax(s) v, (B, Q, V), with the op. The computation is written out in exported graphs,
        which have no custom operators, and for few tokens on a CPU, unless every image has its own
        queries."""
        v = self.values
        keyed = isinstance(self.source, Queries) and self.source.q.ndim == 3
        if torch.compiler.is_compiling() or self._few(keyed):
            return pool_by(softmax(self.scores), v)
        kind = v.dtype
        if kind != torch.float64 and torch.is_autocast_enabled(v.device.type):
            kind = torch.get_autocast_dtype(v.device.type)
        if keyed:
            q, k, scale = self.source
            return softmax_pooling(q.to(kind), k.to(kind), v.to(kind), scale=scale)[0]
        return softmax_pooling(None, None, v.to(kind), self.scores)[0]

    def _few(self, keyed: bool) -> bool:
        """Whether written-out pooling is faster; a traced graph must not ask for sizes."""
        if self.values.device.type != "cpu" or self.values.numel() > FEW:
            return False
        return not (keyed and self.source[0].shape[0] > 1)


def softmax(scores: Tensor) -> Tensor:
    """Attention weights A (B, Q, T) of ``scores``, computed in float32 at least. A row that is all -inf
    gives zeros, with zero gradient."""
    wide = widen(scores)
    empty = wide.detach().amax(-1, keepdim=True) == -torch.inf
    weights = wide.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights.to(scores.dtype)


def pool_by(weights: Tensor, values: Tensor) -> Tensor:
    """sum_t A_qt v_qt: (B, Q, T), (B, G, T, V) -> (B, Q, V)."""
    if values.shape[1] == 1:
        return weights @ values[:, 0]
    return (weights.unflatten(1, (values.shape[1], -1)) @ values).flatten(1, 2)
