"""Rules of linear layers, z = W x + b: c_x = (dp/dx)^T (z / p c_z), with a denominator p.

With a = W+ x+ + W- x- + b+ and d = W- x+ + W+ x- + b-:

    zero  z        epsilon  z + eps        gamma  z + g (a where z > 0, else d)
    alpha-beta     alpha times the rule with a, less beta times that with d; alpha - beta = 1
    flat  sum 1    wsquare  sum W^2        box    W x - W+ l - W- h, pixels from l to h

Sources: see :mod:`xattn.explainers.relevance.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor


class KeptTensor:
    """A tensor needed by a backward pass; code that writes into its memory first calls
    :meth:`before_writing`."""

    _all: ClassVar[WeakValueDictionary[int, WeakSet[KeptTensor]]] = (
        WeakValueDictionary()
    )  # by memory

    def __init__(self, x: Tensor) -> None:
        self.x = x.data  # without a version counter: before_writing copies it first
        self._others = KeptTensor._all.setdefault(x.untyped_storage().data_ptr(), WeakSet())
        self._others.add(self)

    @staticmethod
    def has(x: Tensor) -> bool:
        """Whether a stored tensor shares the memory of ``x``."""
        return x.untyped_storage().data_ptr() in KeptTensor._all

    @staticmethod
    def before_writing(x: Tensor) -> None:
        """Copy the stored tensors that share the memory of ``x``."""
        for kept in KeptTensor._all.pop(x.untyped_storage().data_ptr(), ()):
            kept.x = kept.x.clone()


class Layer(NamedTuple):
    """z = linear(x, weight) + bias."""

    linear: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    """In a shape that broadcasts over z."""

    def signed(self, x: Tensor, up: bool) -> Tensor:
        """The sum of the positive contributions, or of the negative ones."""
        high, low = self.weight.clamp(min=0), self.weight.clamp(max=0)
        high, low = (high, low) if up else (low, high)
        if float(x.detach().amin()) >= 0:
            total = self.linear(x, high)
        else:
            above, below = _Halves.apply(x)
            total = self.linear(above, high) + self.linear(below, low)
        if self.bias is None:
            return total
        return total + (self.bias.clamp(min=0) if up else self.bias.clamp(max=0))


class _Halves(torch.autograd.Function):
    """The positive part of x, and the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        above = x.relu()
        ctx.save_for_backward(x > 0)
        return above, x - above

    @staticmethod
    def backward(ctx: Any, above: Tensor, below: Tensor) -> Tensor:  # type: ignore[override]
        return torch.lerp(below, above, ctx.saved_tensors[0].to(above.dtype))


Terms = Callable[[Layer, Tensor, Tensor, Tensor], Iterable[tuple[float, Tensor]]]


@dataclass(frozen=True)
class LinearRule:
    """A rule by which a linear layer distributes its relevance.

    Args:
        terms: a function of the layer, x, z, and the true z, whose signs it may use. It returns pairs of a
            factor and a denominator p for x; a p of None stands for z.
        epsilon: added to p with the sign of p, so that p moves away from 0; None means a millionth of z's
            root mean square on each image.
        conserves: whether the factors add up to 1 wherever z is not 0.
    """

    terms: Terms | None = None
    epsilon: float | None = None
    conserves: bool = True


def epsilon_rule(epsilon: float | None = None) -> LinearRule:
    return LinearRule(epsilon=epsilon, conserves=epsilon in (None, 0))


def gamma_rule(gamma: float = 0.25, epsilon: float | None = None) -> LinearRule:
    def terms(layer: Layer, x: Tensor, z: Tensor, true: Tensor) -> list[tuple[float, Tensor]]:
        return [(1.0, _Preferred.apply(z, layer.signed(x, True), true, gamma))]

    return replace(epsilon_rule(epsilon), terms=terms) if gamma else epsilon_rule(epsilon)


class _Preferred(torch.autograd.Function):
    """p = z + g (a where the true z > 0, else z - a) = (1 + g/2) z + g sign (a - z/2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, above: Tensor, true: Tensor, g: float) -> Tensor:
        ctx.true, ctx.g = KeptTensor(true), g
        p = torch.sub(above, z, alpha=0.5).mul_(true.sign())
        return p.mul_(g).add_(z, alpha=1 + g / 2)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:  # type: ignore[override]
        up = ctx.true.x.sign().mul_(c).mul_(ctx.g)
        return torch.mul(c, 1 + ctx.g / 2).sub_(up, alpha=0.5), up, None, None


def alpha_beta_rule(alpha: float = 2.0, epsilon: float | None = None) -> LinearRule:
    """Weights positive contributions by alpha and negative contributions by 1 - alpha; ``alpha=1`` is
    the plus rule."""

    def terms(layer: Layer, x: Tensor, z: Tensor, true: Tensor) -> list[tuple[float, Tensor]]:
        parts = ((alpha, True), (1 - alpha, False))
        return [(part, layer.signed(x, sign)) for part, sign in parts if part]

    return LinearRule(terms, epsilon, conserves=False)


def _ones(x: Tensor) -> Tensor:
    """Ones that receive the relevance of x."""
    return x * torch.where(x == 0, 0, 1 / x.detach())


def _flat(layer: Layer, x: Tensor, z: Tensor, true: Tensor) -> list[tuple[float, Tensor]]:
    return [(1.0, layer.linear(_ones(x), torch.ones_like(layer.weight)))]


def _wsquare(layer: Layer, x: Tensor, z: Tensor, true: Tensor) -> list[tuple[float, Tensor]]:
    p = layer.linear(_ones(x), layer.weight.square())
    return [(1.0, p if layer.bias is None else p + layer.bias.square())]


def _box(layer: Layer, x: Tensor, z: Tensor, true: Tensor) -> list[tuple[float, Tensor]]:
    low, high = (bound * _ones(x) for bound in x.relevance_bounds)  # type: ignore[attr-defined]
    p = layer.linear(x, layer.weight) - layer.linear(low, layer.weight.clamp(min=0))
    return [(1.0, p - layer.linear(high, layer.weight.clamp(max=0)))]


INPUT_RULES = {"flat": LinearRule(_flat), "wsquare": LinearRule(_wsquare), "box": LinearRule(_box)}


class SharedRelevance(torch.autograd.Function):
    """Returns z; its gradient c = R / z goes to the denominator p as c z / p, and as 0 where z or p is 0.

    ``z`` is None where p is z.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, z: Tensor | None, epsilon: float | None) -> Tensor:
        ctx.z, ctx.epsilon = KeptTensor(p if z is None else z), epsilon
        ctx.save_for_backward(*(() if z is None else (p,)))
        return ctx.z.x.data  # the same memory but not a view, because views forbid writing in place

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        p = ctx.saved_tensors[0] if ctx.saved_tensors else None
        return quotient_of(ctx.z.x, p, ctx.epsilon, c), None, None


def in_cache(x: Tensor) -> Iterator[Any]:
    """Parts of x that are computed together, so that intermediate results stay in a CPU's cache."""
    if not x.ndim or x.device.type != "cpu":
        return iter((...,))
    step = max(1, len(x) * (1 << 17) // max(1, x.numel()))
    return (slice(low, low + step) for low in range(0, len(x), step))


def quotient_of(z: Tensor, p: Tensor | None, epsilon: float | None, c: Tensor) -> Tensor:
    """c z / p, stabilised, see :class:`LinearRule`; ``p`` is None if it equals z."""
    if epsilon is None:
        wide = torch.promote_types(z.dtype, torch.float32)
        rms = torch.linalg.vector_norm(z, dim=tuple(range(1, z.ndim)), keepdim=True, dtype=wide)
        each = max(1, z.numel() // max(1, len(z)))
        small = (rms * (1e-6 * each**-0.5)).to(z.dtype)
    else:
        small = z.new_full([1] * z.ndim, epsilon).expand(len(z), *[1] * (z.ndim - 1))
    small = small.clamp_min(torch.finfo(z.dtype).tiny)
    out = torch.empty_like(z)
    for part in in_cache(z):
        x, e, to = z[part], small[part], out[part]
        if p is None:
            x = x.abs()
            torch.div(x, x + e, out=to)
        else:
            q = p[part]  # masks are slower than products
            torch.div(q.sign().abs_().mul_(x), torch.copysign(e, q).add_(q), out=to)
        to.mul_(c[part])
    return out
