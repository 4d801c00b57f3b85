"""Rules for attention Y = A V of :mod:`xattn.attention`, by the type of operator A.

A and V share the relevance of Y like the factors of a product (the uniform rule of Achtibat et al.,
arXiv 2402.05602): half goes to V, and A's half goes to the tensors that A is computed from:

    softmax, also of segments   to q and k in equal parts, undivided to a bias, by softmax's own gradient;
                                landmarks of key blocks count as keys
    softplus with l1 norms,     to q and k in equal parts, by their own gradients
      Taylor series of exp
    L R, causal or not          to L and R in equal parts
    p o e, local linear         to p as softmax; the factors e are held constant
    A_1 A_2 ...                 to the factors in equal parts
    A_1 + A_2 + ...             each term and V share A_t V
    diag(g) A, A diag(c)        to A; g and c are gates, held constant
    pooling, stored A, A = I    none: their weights are not activations, so V gets everything
    one row for all queries     to the row
    attention within subsets    as the attention within them; membership of tokens is constant
    any other                   none: A is held constant, V gets everything, and this is reported

A factor that depends on no activation gets no relevance; its part goes to the other factor. The sum of
relevance is conserved, apart from the parts that softmax and the features in L and R absorb. For three
factors the uniform rule depends on the order of the products (You et al. 2025, arXiv 2510.18810); here A
always counts as one of two factors, so that V always gets half.
"""

from __future__ import annotations

from functools import singledispatch
from typing import NamedTuple

from torch import Tensor

from xattn.attention.operators.algebra import (
    ColumnsOperator,
    GatedOperator,
    LowRankOperator,
    PoolOperator,
    ProductOperator,
    SumOperator,
    sum_terms,
)
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.attention.operators.causal_low_rank import CausalLowRankOperator
from xattn.attention.operators.fixed import (
    IdentityOperator,
    SharedRowOperator,
    StoredOperator,
)
from xattn.attention.operators.local_linear import LocalLinearOperator
from xattn.attention.operators.pyramid import PyramidOperator
from xattn.attention.operators.segments import SegmentsOperator
from xattn.attention.operators.softplus import SoftplusOperator
from xattn.attention.operators.subsets import SubsetsOperator
from xattn.attention.operators.taylor import TaylorOperator
from xattn.explainers.relevance.rules import depends_on_input, scale_relevance

Held = dict[str, None]  # types of operator that were held constant, in order


class NoRule(ValueError):
    """Raised if a mechanism computes its operator with ``what``, for which there is no rule."""

    def __init__(self, what: str) -> None:
        super().__init__(f"there is no rule for {what}")
        self.what = what


@singledispatch
def multiply(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    """Compute A X with a gradient that gives ``part`` of the relevance to A and the rest to X.

    Args:
        operator: A, made of tensors with their graph. Register a rule for another type of operator here
            and in :func:`receives_relevance`.
        x: (B, H or Hk, S, m).
        held: set that collects the names of operator types with no rule; their A is treated as constant.
    """
    held[type(operator).__name__] = None
    return operator.detach().matvec(x)


@singledispatch
def receives_relevance(operator: Operator) -> bool:
    """Whether A receives relevance, that is, whether there is a rule for A and A depends on activations."""
    return False


# ---------------------------------------------------------------------- products of two, and softmax


class _Parts(NamedTuple):
    """A as a function of products of ``first`` and ``second``, plus ``added``."""

    first: list[Tensor]
    second: list[Tensor]
    added: list[Tensor]


@singledispatch
def _parts(operator: Operator) -> _Parts:
    raise NotImplementedError(type(operator).__name__)


_parts.register(SoftmaxOperator, lambda a: _Parts([a.q], [a.k], [] if a.bias is None else [a.bias]))
_parts.register(SoftplusOperator, lambda a: _Parts([a.q], [a.k], []))
_parts.register(TaylorOperator, lambda a: _Parts([a.q], [a.k], []))
_parts.register(LowRankOperator, lambda a: _Parts([a.left], [a.right], []))
_parts.register(CausalLowRankOperator, lambda a: _Parts([a.left], [a.right], []))
_parts.register(SharedRowOperator, lambda a: _Parts([a.row], [], []))


@_parts.register
def _(operator: SegmentsOperator) -> _Parts:
    segments = [s for piece in operator.pieces for s in piece.segments]
    added = [t for s in segments for t in (s.bias, s.offset) if t is not None]
    keys = [t for s in segments for t in (s.k, s.marks) if t is not None]
    return _Parts([piece.q for piece in operator.pieces], keys, added)


@multiply.register(SoftmaxOperator)
@multiply.register(SegmentsOperator)
@multiply.register(SoftplusOperator)
@multiply.register(TaylorOperator)
@multiply.register(LowRankOperator)
@multiply.register(CausalLowRankOperator)
@multiply.register(SharedRowOperator)
def _(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    first, second, added = _parts(operator)
    if not receives_relevance(operator):
        return operator.detach().matvec(x)
    half = part / 2 if _any_live(first) and _any_live(second) else part
    own = {id(t): half for t in (*first, *second)} | {id(t): part for t in added}
    shared = operator.apply(lambda t: scale_relevance(t, own.get(id(t), 1.0)))
    return shared.matvec(scale_relevance(x, 1 - part))


@receives_relevance.register(SoftmaxOperator)
@receives_relevance.register(SegmentsOperator)
@receives_relevance.register(SoftplusOperator)
@receives_relevance.register(TaylorOperator)
@receives_relevance.register(LowRankOperator)
@receives_relevance.register(CausalLowRankOperator)
@receives_relevance.register(SharedRowOperator)
def _(operator: Operator) -> bool:
    return any(_any_live(tensors) for tensors in _parts(operator))


def _any_live(tensors: list[Tensor]) -> bool:
    return any(map(depends_on_input, tensors))


@multiply.register
def _(operator: LocalLinearOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    if not receives_relevance(operator):
        return operator.detach().matvec(x)
    both = operator.q.requires_grad and operator.k.requires_grad
    q, k = (scale_relevance(t, part / 2 if both else part) for t in (operator.q, operator.k))
    return operator.with_constant_factors(q, k).matvec(scale_relevance(x, 1 - part))


receives_relevance.register(
    LocalLinearOperator, lambda a: depends_on_input(a.q) or depends_on_input(a.k)
)


# ---------------------------------------------------------------------- compound operators


@multiply.register
def _(operator: ProductOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    # Each of the m factors gets own = part / m of the whole; relevance for factor i has passed the
    # factors before it, which left 1 - i own.
    live = [receives_relevance(factor) for factor in operator.factors]
    own = part / max(1, sum(live))
    before = [sum(live[:i]) for i in range(len(live))]
    for factor, i in reversed(list(zip(operator.factors, before, strict=True))):
        x = multiply(factor, x, held, own / (1 - i * own))
    return x


receives_relevance.register(ProductOperator, lambda a: any(map(receives_relevance, a.factors)))


@multiply.register
def _(operator: SumOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return sum_terms(multiply(term, x, held, part) for term in operator.terms)


receives_relevance.register(SumOperator, lambda a: any(map(receives_relevance, a.terms)))


@multiply.register
def _(operator: GatedOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    y = multiply(operator.operator, x, held, part)
    return operator.factor.detach()[..., None].to(y.dtype) * y


receives_relevance.register(GatedOperator, lambda a: receives_relevance(a.operator))


@multiply.register
def _(operator: ColumnsOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return multiply(operator.operator, operator.detach().scaled(x), held, part).to(x.dtype)


receives_relevance.register(ColumnsOperator, lambda a: receives_relevance(a.operator))


@multiply.register(PoolOperator)
@multiply.register(PyramidOperator)
@multiply.register(IdentityOperator)
@multiply.register(StoredOperator)
def _(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return operator.detach().matvec(x)


@multiply.register
def _(operator: SubsetsOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    y = operator.scatter(multiply(operator.inner, operator.gather(x), held, part))
    if operator.first is None:
        return y
    return operator.with_first(multiply(operator.first, x, held, part), y)


receives_relevance.register(
    SubsetsOperator,
    lambda a: receives_relevance(a.inner) or (a.first is not None and receives_relevance(a.first)),
)
