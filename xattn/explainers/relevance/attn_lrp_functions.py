"""AttnLRP's rules for PyTorch's functions: which gradient each passes on, so that x * grad is relevance.

Achtibat et al., arXiv 2402.05602: a product of activations gives each an equal share (the uniform
rule), an activation passes f(x)/x on (the identity rule), a normaliser is a constant; linear functions
and softmax keep their own gradient. A gate of a sigmoid is a constant, too: it scales what it multiplies,
and that takes all relevance (Arras et al. 2019, arXiv 1909.12114).

In attention of :mod:`xattn.attention`, these rules hold where a mechanism makes its operator of queries,
keys and tokens; there, functions with a value at 0, such as exp in feature maps, keep their own gradient,
as softmax does. The rules of operators follow.

With ``constant_attention`` all of A, softmax and pooling weights are constants, and relevance passes
through the values alone. Then every function is affine where it stands, and the rules are those of
LibraGrad (Mehri et al., arXiv 2411.16760).

AttnLRP's rules for attention Y = A V, by the kind of operator that A is.

A and V share the relevance of Y as the factors of a product do (the uniform rule of Achtibat et al.,
arXiv 2402.05602): half goes to V, and A's half to what A is made of:

    softmax, also of segments   to q and k in equal parts, whole to a bias, by softmax's own gradient;
                                landmarks of key blocks count as keys
    softplus with l1 norms,     to q and k in equal parts, by their own gradients
      Taylor series of exp
    L R, causal or not          to L and R in equal parts
    p o e, local linear         to p as softmax; the factors e are held constant
    A_1 A_2 ...                 to the factors in equal parts
    A_1 + A_2 + ...             each term and V share A_t V
    diag(g) A, A diag(c)        to A; g and c are gates, held constant
    pooling, stored A, A = I    none: their weights are no activations, so V gets all
    one row for all queries     to the row
    attention within subsets    as the attention within them; which tokens they hold is constant
    any other                   none: A is held constant, so V gets all, and that is reported

What depends on no activation gets nothing, and the other factor has its part. The sum of relevance is
conserved, but for what softmax and the features that make L and R absorb. For three factors the uniform
rule depends on the order of the products (You et al. 2025, arXiv 2510.18810); here A is always one of
two, so that V has its half whatever A is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xattn.attention.base import Mechanism
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import (
    ColumnsOperator,
    GatedOperator,
    LowRankOperator,
    PoolOperator,
    ProductOperator,
    SumOperator,
    total,
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
from xattn.attention.record import attending_by
from xattn.backbone.norm_gradients import batch_norm_scale_and_shift
from xattn.explainers.relevance.attention import layers_text

Held = dict[str, None]  # kinds of operators that were held constant, in order


class _Share(torch.autograd.Function):
    """The identity; its gradient is multiplied by ``part``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: float) -> Tensor:
        ctx.part = part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.part, None


def share(x: Tensor, part: float) -> Tensor:
    """``x``, which gets ``part`` of the relevance that its own gradient would give it."""
    return _Share.apply(x, part)  # type: ignore[no-any-return]


@singledispatch
def times(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    """A X, whose gradient gives ``part`` of its relevance to A and the rest to X.

    Args:
        operator: A, of tensors with their graph. Register a rule for another kind of operator here,
            and in :func:`depends`.
        x: (B, H or Hk, S, m).
        held: gets the kinds of operator without a rule, whose A was held constant.
    """
    held[type(operator).__name__] = None
    return operator.detach().matvec(x)


@singledispatch
def depends(operator: Operator) -> bool:
    """Whether A gets a part: there is a rule for it, and it depends on activations."""
    return False


# ---------------------------------------------------------------------- products of two, and softmax


class _Parts(NamedTuple):
    """A is a function of products of ``first`` with ``second``, to which ``added`` is added."""

    first: list[Tensor]
    second: list[Tensor]
    added: list[Tensor]


@singledispatch
def _parts(operator: Operator) -> _Parts:
    raise NotImplementedError(type(operator).__name__)


@_parts.register
def _(operator: SoftmaxOperator) -> _Parts:
    return _Parts([operator.q], [operator.k], [] if operator.bias is None else [operator.bias])


@_parts.register
def _(operator: SegmentsOperator) -> _Parts:
    segments = [s for piece in operator.pieces for s in piece.segments]
    added = [t for s in segments for t in (s.bias, s.offset) if t is not None]
    keys = [t for s in segments for t in (s.k, s.marks) if t is not None]
    return _Parts([piece.q for piece in operator.pieces], keys, added)


@_parts.register(SoftplusOperator)
@_parts.register(TaylorOperator)
def _(operator: SoftplusOperator | TaylorOperator) -> _Parts:
    return _Parts([operator.q], [operator.k], [])


@_parts.register(LowRankOperator)
@_parts.register(CausalLowRankOperator)
def _(operator: LowRankOperator | CausalLowRankOperator) -> _Parts:
    return _Parts([operator.left], [operator.right], [])


@_parts.register
def _(operator: SharedRowOperator) -> _Parts:
    return _Parts([operator.row], [], [])


@times.register(SoftmaxOperator)
@times.register(SegmentsOperator)
@times.register(SoftplusOperator)
@times.register(TaylorOperator)
@times.register(LowRankOperator)
@times.register(CausalLowRankOperator)
@times.register(SharedRowOperator)
def _(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    first, second, added = _parts(operator)
    if not depends(operator):
        return operator.detach().matvec(x)
    half = part / 2 if _any_live(first) and _any_live(second) else part
    own = {id(t): half for t in (*first, *second)} | {id(t): part for t in added}

    def shared(t: Tensor) -> Tensor:
        return share(t, own[id(t)]) if t.requires_grad and id(t) in own else t

    return operator.apply(shared).matvec(share(x, 1 - part))


@depends.register(SoftmaxOperator)
@depends.register(SegmentsOperator)
@depends.register(SoftplusOperator)
@depends.register(TaylorOperator)
@depends.register(LowRankOperator)
@depends.register(CausalLowRankOperator)
@depends.register(SharedRowOperator)
def _(operator: Operator) -> bool:
    return any(_any_live(tensors) for tensors in _parts(operator))


def _any_live(tensors: list[Tensor]) -> bool:
    return any(t.requires_grad for t in tensors)


@times.register
def _(operator: LocalLinearOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    if not depends(operator):
        return operator.detach().matvec(x)
    both = operator.q.requires_grad and operator.k.requires_grad
    q, k = (share(t, part / 2 if both else part) for t in (operator.q, operator.k))
    return operator.with_constant_factors(q, k).matvec(share(x, 1 - part))


@depends.register
def _(operator: LocalLinearOperator) -> bool:
    return operator.q.requires_grad or operator.k.requires_grad


# ---------------------------------------------------------------------- operators made of others


@times.register
def _(operator: ProductOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    # Each of the m factors gets own = part / m of the whole; what comes to factor i has passed those
    # before it, which left 1 - i own.
    live = [depends(factor) for factor in operator.factors]
    own = part / max(1, sum(live))
    before = [sum(live[:i]) for i in range(len(live))]
    for factor, i in reversed(list(zip(operator.factors, before, strict=True))):
        x = times(factor, x, held, own / (1 - i * own))
    return x


@depends.register
def _(operator: ProductOperator) -> bool:
    return any(depends(factor) for factor in operator.factors)


@times.register
def _(operator: SumOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return total(times(term, x, held, part) for term in operator.terms)


@depends.register
def _(operator: SumOperator) -> bool:
    return any(depends(term) for term in operator.terms)


@times.register
def _(operator: GatedOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    y = times(operator.operator, x, held, part)
    return operator.factor.detach()[..., None].to(y.dtype) * y


@depends.register
def _(operator: GatedOperator) -> bool:
    return depends(operator.operator)


@times.register
def _(operator: ColumnsOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return times(operator.operator, operator.detach().scaled(x), held, part).to(x.dtype)


@depends.register
def _(operator: ColumnsOperator) -> bool:
    return depends(operator.operator)


@times.register(PoolOperator)
@times.register(PyramidOperator)
@times.register(IdentityOperator)
@times.register(StoredOperator)
def _(operator: Operator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    return operator.detach().matvec(x)


@times.register
def _(operator: SubsetsOperator, x: Tensor, held: Held, part: float = 0.5) -> Tensor:
    y = operator.scatter(times(operator.inner, operator.gather(x), held, part))
    if operator.first is None:
        return y
    return operator.with_first(times(operator.first, x, held, part), y)


@depends.register
def _(operator: SubsetsOperator) -> bool:
    return depends(operator.inner) or (operator.first is not None and depends(operator.first))


class _NoRule(ValueError):
    """There is no rule for ``what``, which is done with activations."""

    def __init__(self, what: str, message: str = "") -> None:
        super().__init__(message or f"there is no rule for {what}")
        self.what = what


def _attention(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
) -> Any:
    q, k = (share(x, 0.25) for x in (query, key))
    return function(q, k, share(value, 0.5), *args, **kw)


def _pooling(function: Callable[..., Any], *given: Any) -> Any:
    return function(*_attended(*given[:4]), *given[4:])


def _causal_product(function: Callable[..., Any], *given: Any) -> Any:
    return function(*_attended(*given[:3])[:3], *given[3:])


def _by_values(
    function: Callable[..., Any], query: Any, key: Any, value: Tensor, *args: Any, **kw: Any
) -> Any:
    """Attention or pooling whose weights are constants."""
    other = [x.detach() if isinstance(x, Tensor) else x for x in args]
    kw = {name: x.detach() if isinstance(x, Tensor) else x for name, x in kw.items()}
    query, key = (None if x is None else x.detach() for x in (query, key))
    return function(query, key, value, *other, **kw)


def _attended(
    query: Tensor | None, key: Tensor | None, value: Tensor, bias: Tensor | None = None
) -> list[Tensor | None]:
    """Factors of A V as the products written out would share them: what is learned gets nothing."""
    read = [x is not None and x.requires_grad for x in (query, key)]
    scored = any(read) or (bias is not None and bias.requires_grad)
    part = 0.5 if scored and value.requires_grad else 1.0
    own = part / max(1, sum(read))
    tensors = (query, key, value, bias)
    parts = (own, own, part, part)
    return [None if x is None else share(x, p) for x, p in zip(tensors, parts, strict=True)]


def _product(function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """A product of activations gives each an equal share; factors without gradient are weights."""
    if any(isinstance(x, Tensor | list | tuple) for x in kw.values()):
        raise _NoRule(f"{function.__name__} with tensors by keyword")
    if len(args) == 2 and isinstance(args[1], list | tuple):  # einsum(equation, [a, b])
        args = (args[0], *args[1])
    live = sum(isinstance(x, Tensor) and x.requires_grad for x in args)
    if live < 2:
        return function(*args, **kw)
    shared = (share(x, 1 / live) if isinstance(x, Tensor) else x for x in args)
    return function(*shared, **kw)


def _added_product(function: Callable[..., Any], x: Any, *args: Any, **kw: Any) -> Any:
    return _product(lambda *factors, **kw: function(x, *factors, **kw), *args, **kw)


def _power(function: Callable[..., Any], x: Any, exponent: Any = 2, **kw: Any) -> Any:
    live = any(isinstance(t, Tensor) and t.requires_grad for t in (x, exponent))
    if live and not isinstance(exponent, int | float):
        raise _NoRule("powers whose exponent is a tensor")
    x = share(x, 1 / exponent) if live and exponent else x
    return function(x, **kw) if function.__name__ == "square" else function(x, exponent, **kw)


def _quotient(function: Callable[..., Any], x: Any, y: Any, **kw: Any) -> Any:
    if function.__name__ == "__rdiv__":  # y / x
        return function(x.detach(), y, **kw)
    return function(x, y.detach() if isinstance(y, Tensor) else y, **kw)


def _activation(function: Callable[..., Any], x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """x (f(x)/x) with the quotient held constant; at 0 its limit f'(0), 1/2 or (tanh) 1."""
    if kw.get("inplace"):
        kw = {**kw, "inplace": False}
    with torch.no_grad():
        limit = 1.0 if function.__name__ == "tanh" else 0.5
        gate = torch.where(x == 0, limit, function(x, *args, **kw) / x)
    return x * gate


def _constant(function: Callable[..., Any], *args: Any, **kw: Any) -> Tensor:
    """Gates and inverse standard deviations scale what they multiply and get no relevance."""
    return function(*args, **kw).detach()


def _layer_norm(
    function: Callable[..., Any],
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *other: Any,
) -> Tensor:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    return _scaled(x - x.mean(dims, keepdim=True), dims, weight, bias, eps)


def _rms_norm(
    function: Callable[..., Any],
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    return _scaled(x, dims, weight, None, torch.finfo(x.dtype).eps if eps is None else eps)


def _scaled(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    y = (wide / (wide.detach().square().mean(dims, keepdim=True) + eps).sqrt()).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _normalize(
    function: Callable[..., Any],
    x: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    out: None = None,
) -> Tensor:
    return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


_FUSED = F.scaled_dot_product_attention
_ATTENTION = ("scaled_dot_product_attention", "softmax_forward", "block_sparse_forward")
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_ATTENTION, _attention),  # the last two are ops of xattn.kernels,
    "pooling_forward": _pooling,  # as are these
    "causal_product_forward": _causal_product,
    **dict.fromkeys(
        "mul multiply matmul bmm mm mv einsum inner outer dot tensordot __rmatmul__".split(),
        _product,
    ),
    **dict.fromkeys(("addcmul", "baddbmm", "addmm"), _added_product),
    **dict.fromkeys(("pow", "square"), _power),
    **dict.fromkeys(("div", "true_divide", "__rdiv__"), _quotient),
    **dict.fromkeys(("gelu", "silu", "hardswish", "tanh"), _activation),
    **dict.fromkeys(("sigmoid", "hardsigmoid", "rsqrt"), _constant),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
}
_CONSTANT_ATTENTION: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((*_ATTENTION, "pooling_forward", "causal_product_forward"), _by_values),
    "softmax": _constant,
}


def _over_places(bias: Tensor | None, dims: int) -> Tensor | None:
    return None if bias is None else bias.unflatten(0, (-1, *dims * [1]))


def _shift(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """What BatchNorm in eval mode adds to its scaled input."""
    if not (training or mean is None or var is None):
        bias = batch_norm_scale_and_shift(mean, var, weight, bias, eps)[1]
    return _over_places(bias, input.ndim - 2)


# Where the bias of a layer stands among the arguments.
_BIASED: dict[str, Callable[..., Tensor | None]] = {
    "linear": lambda input, weight, bias=None: bias,
    "layer_norm": lambda input, shape, weight=None, bias=None, *a, **kw: bias,
    "conv1d": lambda input, weight, bias=None, *a, **kw: _over_places(bias, 1),
    "conv2d": lambda input, weight, bias=None, *a, **kw: _over_places(bias, 2),
    "conv_transpose2d": lambda input, weight, bias=None, *a, **kw: _over_places(bias, 2),
    "group_norm": lambda input, n, weight=None, bias=None, *a, **kw: _over_places(
        bias, input.ndim - 2
    ),
    "batch_norm": _shift,
}


def added_bias(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The constant that a call of a layer's function adds to its output, as it broadcasts there."""
    found = _BIASED.get(getattr(function, "__name__", ""))
    return None if found is None else found(*args, **kwargs)


_FEATURES = frozenset(  # of one activation, with a value at 0 or without f(x)/x at hand
    "exp exp2 expm1 log softplus mish elu selu celu erf sin cos __rpow__ relu6 logsigmoid log_sigmoid "
    "hardtanh".split()
)
_REFUSED = frozenset(
    "addcdiv addbmm mul_ div_ tanh_ sigmoid_ group_norm instance_norm cosine_similarity reciprocal prod "
    "bilinear linalg_matmul linalg_multi_dot multi_dot chain_matmul cumprod glu pow_ lstm gru rnn_tanh "
    "rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split()
)


class Rules(TorchFunctionMode):
    """Replaces the PyTorch functions that have a rule; all others keep their own gradient.

    Args:
        model: its name, for messages.
        method: the explainer's name, for messages.
        constant_attention: whether attention's weights are constants, see the module.
        keep_biases: whether to collect ``biased``.

    Attributes: ``attended``, how many calls of attention there were; ``notes``, where attention was
    held constant for lack of a rule; ``biased``, outputs of layers beside the biases that these added.
    """

    def __init__(
        self,
        model: str,
        method: str = "attn_lrp",
        constant_attention: bool = False,
        keep_biases: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.method = model, method
        self.constant_attention, self.keep_biases = constant_attention, keep_biases
        self.attended = 0
        self.biased: list[tuple[Tensor, Tensor]] = []
        self._held: dict[str, list[int]] = {}  # what was held constant: the numbers of its calls
        self._of_mechanism = self._paused = False

    @property
    def notes(self) -> list[str]:
        return [f"{layers_text(calls)}: {what}" for what, calls in self._held.items()]

    def attend(self, mechanism: Mechanism, inputs: Inputs) -> Tensor:
        """The mechanism's output, by the rules of its operator."""
        held: Held = {}
        with self._while("_of_mechanism"):
            try:
                operator = mechanism.operator(
                    _constant_inputs(inputs) if self.constant_attention else inputs
                )
            except _NoRule as error:
                held[error.what] = None
                operator = mechanism.operator(_constant_inputs(inputs))
            local = mechanism.local(inputs)
        output = self._times(mechanism.entry.name, operator, inputs.v, held)
        return output if local is None else output + local

    def mix(self, name: str, operator: Operator, value: Tensor) -> Tensor:
        """A V of a block, by the rules of its operator."""
        return self._times(name, operator, value, {})

    def _times(self, name: str, operator: Operator, value: Tensor, held: Held) -> Tensor:
        if self.constant_attention:
            self.attended += 1
            with self._while("_paused"):
                return operator.detach().matvec(value)
        with self._while("_paused"):
            output = times(operator, value, held)
        if held or not depends(operator):
            some = " in part" if depends(operator) else ""
            why = f"no rule for {', '.join(held)}" if held else "it is made of constants"
            what = f"A of {name} is held constant{some} ({why})"
            self._held.setdefault(what, []).append(self.attended)
        self.attended += 1
        return output

    @contextmanager
    def _while(self, name: str) -> Iterator[None]:
        before = getattr(self, name)
        setattr(self, name, True)
        try:
            yield
        finally:
            setattr(self, name, before)

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if self._paused:
            return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if function is F.multi_head_attention_forward:
            if kwargs.get("need_weights", True):
                raise self._no_rule("multi_head_attention_forward(need_weights=True)")
            with attending_by(lambda *a, **kw: self._apply(_FUSED, a, kw)):
                return function(*args, **kwargs)
        live = args[1:] if name in ("mul_", "div_") else args  # in place, by a weight: linear
        if self._refuses(name) and any(isinstance(x, Tensor) and x.requires_grad for x in live):
            raise self._no_rule(name)
        return self._apply(function, args, kwargs)

    def _no_rule(self, name: str) -> _NoRule:
        message = (
            f"backbone: {self.model} calls {name}; {self.method} has no rule for it, choose another"
        )
        return _NoRule(name, message)

    def _refuses(self, name: str) -> bool:
        return name in _REFUSED or (name in _FEATURES and not self._of_mechanism)

    def _apply(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        if not self._of_mechanism:
            self.attended += name in (*_ATTENTION, "softmax")
        rule = _RULES.get(name)
        if self.constant_attention:
            rule = _CONSTANT_ATTENTION.get(name, rule)
        result = function(*args, **kwargs) if rule is None else rule(function, *args, **kwargs)
        if self.keep_biases:
            bias = added_bias(function, args, kwargs)
            if bias is not None and result.requires_grad:
                self.biased.append((result, bias))
        return result


def _constant_inputs(inputs: Inputs) -> Inputs:
    x = None if inputs.x is None else inputs.x.detach()
    return inputs.replace(q=inputs.q.detach(), k=inputs.k.detach(), v=inputs.v.detach(), x=x)
