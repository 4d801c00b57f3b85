"""The gradient that each PyTorch function passes on, so that input x gradient is relevance.

Every function of a network is replaced by an affine map at its input. If y = F(a_1, ..., a_n, constants)
passes on coefficients with

    sum_i a_i c_i + (what constants keep) = y c_y

then by the chain rule, for any graph, sum_pixels x c_x + (what constants keep) = f, the score.

    sums, layouts, pools, selections           their own gradient
    activations, powers, L2 and RMS norms      c f(a)/a; at a = 0 the left derivative
    sigmoid, exp, deviations, denominators     constants, as they only scale what they multiply
    LayerNorm, GroupNorm                       (a - mean) / constant
    products of n activations                  1/n of the gradient to each
    softmax attention                          constant: all to the values; shared: 1/2 to the values and
                                               1/4 to queries and keys, softmax keeps its gradient
    linear layers, z = W x + b                 see :mod:`xattn.explainers.relevance.linear`
    sums of two, residual = g > 0              p = w(a) a + w(b) b, w(u) = 1 + g where u y > 0

Sources: Bach et al., PLOS ONE 2015 (epsilon, alpha-beta); Montavon et al. 2017 and 2019 (box, wsquare,
gamma); Lapuschkin et al. 2019 (flat); Arras et al. 2019 (gates); Ali et al. 2022 (constant attention and
norms); Achtibat et al., ICML 2024 (shared products); Mehri et al., CVPR 2025 (LibraGrad); Berend et al.
2026 (residual). The code was written from these equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.backbone.norm_gradients import affine_batch_norm, batch_norm_scale_and_shift
from xattn.explainers.relevance.linear import (
    INPUT_RULES,
    KeptTensor,
    Layer,
    LinearRule,
    alpha_beta_rule,
    epsilon_rule,
    gamma_rule,
    in_cache,
)

Rule = Callable[..., Any]
"""``rule(engine, function, *args, **kwargs)`` returns the value of ``function(*args, **kwargs)`` with the
gradient of the rule; ``engine`` is the :class:`~xattn.explainers.relevance.engine.Engine`."""


def nested_tensors(values: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [x for value in values for x in nested_tensors(value)]


def map_nested(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested lists, tuples and dicts with ``change`` applied to every item."""
    if isinstance(value, list | tuple):
        found = [map_nested(x, change) for x in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, dict):
        return {key: map_nested(x, change) for key, x in value.items()}
    return change(value)


def depends_on_input(value: Any) -> bool:
    """Whether a tensor depends on the explained input; a network's weights never do."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


class _Share(torch.autograd.Function):
    """The identity, with its gradient multiplied by ``part``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: float) -> Tensor:
        ctx.part = part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.part, None


def scale_relevance(x: Any, part: float) -> Any:
    """Return ``x`` with a gradient that gives it only ``part`` of the relevance that it would otherwise
    receive."""
    return _Share.apply(x, part) if depends_on_input(x) and part != 1 else x


# ---------------------------------------------------------------------- composites


@dataclass(frozen=True)
class Composite:
    """The rules of a method, one for each type of function; see :data:`COMPOSITES`.

    Args:
        convolution: rule for convolutions, including a BatchNorm that follows; None means the zero rule.
        dense: rule for other linear layers; a separate BatchNorm uses epsilon unless this is None.
        first: rule for layers that read the image; None means the rule for their type.
        attention: "constant" or "shared", see the module.
        residual: how strongly sums of two activations prefer the one with the sum's sign; 0 to 1.
        plain: functions without a rule in ``rules`` keep their own gradient.
        rules: rules by function name, which replace those in :data:`RULES`.
    """

    convolution: LinearRule | None = None
    dense: LinearRule | None = None
    first: LinearRule | None = None
    attention: Literal["constant", "shared"] = "constant"
    residual: float = 0.0
    plain: bool = False
    rules: tuple[tuple[str, Rule], ...] = ()

    @property
    def conserves(self) -> bool:
        """Whether all relevance reaches the input, except what constants receive."""
        linear = (self.convolution, self.dense, self.first)
        exact = all(rule is None or rule.conserves for rule in linear)
        return exact and self.attention == "constant" and not self.plain


_EPSILON, _GAMMA = epsilon_rule(), gamma_rule()
COMPOSITES: dict[str, Composite] = {
    "gradient": Composite(plain=True),
    "libragrad": Composite(),
    "cp_lrp": Composite(),
    "attn_lrp": Composite(attention="shared"),
    "res_lrp": Composite(attention="shared", residual=1.0),
    "epsilon": Composite(_EPSILON, _EPSILON),
    "gamma": Composite(_GAMMA, _EPSILON),
    "vit": Composite(_GAMMA, gamma_rule(0.05)),
    "plus": Composite(alpha_beta_rule(1.0), _EPSILON),
    "alpha_beta": Composite(alpha_beta_rule(), _EPSILON),
    "plus_flat": Composite(alpha_beta_rule(1.0), _EPSILON, INPUT_RULES["flat"]),
    "alpha_beta_flat": Composite(alpha_beta_rule(), _EPSILON, INPUT_RULES["flat"]),
    "gamma_box": Composite(_GAMMA, _EPSILON, INPUT_RULES["box"]),
}
"""Composites by name; add one with ``COMPOSITES["mine"] = Composite(...)``."""


# ---------------------------------------------------------------------- functions


def own_gradient(engine: Any, function: Rule, *args: Any, **kw: Any) -> Any:
    """The rule for linear functions and selections of values: their own gradient passes relevance on."""
    return function(*args, **kw)


def no_relevance(engine: Any, function: Rule, *args: Any, **kw: Any) -> Any:
    """The rule for gates and normalisers, which scale what they multiply and get no relevance."""
    result = function(*args, **kw)
    return (
        result.detach() if isinstance(result, Tensor) else type(result)(x.detach() for x in result)
    )


class _Gated(torch.autograd.Function):
    """y = f(x) with gradient y / x; at 0 its limit from the left, as in autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Rule, again: bool) -> Tensor:
        """``again``: whether to keep x, which other rules keep as well, and recompute y."""
        least = torch.full((1,), -4 * torch.finfo(x.dtype).tiny, dtype=x.dtype, device=x.device)
        ctx.function, ctx.start = function, float(function(least.clone()) / least)
        if again:
            ctx.x = KeptTensor(x)
            return function(x)  # type: ignore[no-any-return]
        y, gate = function(x), torch.empty_like(x)
        _Gated.into(gate, ctx, x, lambda part: y[part])
        ctx.save_for_backward(gate)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def into(gate: Tensor, ctx: Any, x: Tensor, of: Callable[[slice], Tensor]) -> None:
        whole = {"posinf": torch.inf, "neginf": -torch.inf}  # NaN of y stays NaN
        for part in in_cache(x):
            torch.div(of(part), x[part], out=gate[part]).nan_to_num_(ctx.start, **whole)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        if ctx.saved_tensors:
            return c * ctx.saved_tensors[0], None, None
        x, gate = ctx.x.x, torch.empty_like(c)
        _Gated.into(gate, ctx, x, lambda part: ctx.function(x[part]))
        return gate.mul_(c), None, None


def activation(engine: Any, function: Rule, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """x (f(x)/x) with the quotient held constant."""
    return _Gated.apply(x, lambda x: function(x, *args, **kw), KeptTensor.has(x))  # type: ignore[no-any-return]


def relu(engine: Any, function: Rule, x: Tensor, *_: Any, **kw: Any) -> Tensor:
    """The rule for ReLU: its own gradient."""
    if not KeptTensor.has(x):
        return function(x)  # type: ignore[no-any-return]
    return _Rectified.apply(x)  # type: ignore[no-any-return]


class _Rectified(torch.autograd.Function):
    """ReLU that stores its input, as the layer before it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = KeptTensor(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ops.aten.threshold_backward(c, ctx.x.x, 0)  # type: ignore[no-any-return]


def _scaling(engine: Any, function: Rule, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """x times a factor computed from other elements; treated like :func:`activation`."""
    with torch.no_grad():
        safe = torch.where(x == 0, -4 * torch.finfo(x.dtype).tiny, x)
        gate = function(safe, *args, **kw) / safe
    return x * gate


def shifted_activation(engine: Any, function: Rule, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """The rule for an activation whose value at 0 counts as an added constant."""
    with torch.no_grad():
        y, start = function(x, *args, **kw), function(torch.zeros_like(x), *args, **kw)
        gate = torch.where(x == 0, 0, (y - start) / x)
    return engine.add_constant(x * gate + start, start)


def _larger(engine: Any, function: Rule, x: Any, *args: Any, **kw: Any) -> Any:
    """max and min of one tensor or of two; a constant operand is the bound of an activation."""
    if (
        not args
        or not isinstance(args[0], Tensor)
        or (depends_on_input(x) and depends_on_input(args[0]))
    ):
        return function(x, *args, **kw)
    moving, fixed = (x, args[0]) if depends_on_input(x) else (args[0], x)
    full = torch.broadcast_shapes(moving.shape, fixed.shape)
    return shifted_activation(engine, function, moving.expand(full), fixed.expand(full))


def _power(engine: Any, function: Rule, x: Any, exponent: Any = 2, **kw: Any) -> Any:
    name = function.__name__.strip("_")
    if depends_on_input(exponent):
        engine.refuse("powers whose exponent is a tensor")
    if depends_on_input(exponent) or not depends_on_input(x):
        return no_relevance(engine, function, x, exponent, **kw)
    given = () if name in ("sqrt", "square") else (exponent,)
    power = float(exponent) if given else {"sqrt": 0.5, "square": 2.0}[name]
    if power <= 0:
        return no_relevance(engine, function, x, *given, **kw)
    if power >= 1:
        return function(scale_relevance(x, 1 / power), *given, **kw)
    with torch.no_grad():
        gate = torch.where(x == 0, 0, function(x, *given, **kw) / x)
    return x * gate


def product_rule(engine: Any, function: Rule, *args: Any, **kw: Any) -> Any:
    """The rule for products: activations get equal shares. A product of one activation with a weight
    counts as a linear layer."""
    if len(args) == 2 and isinstance(args[1], list | tuple):  # einsum(equation, [a, b])
        args = (args[0], *args[1])
    moving = [i for i, x in enumerate(args) if depends_on_input(x)]
    count = len(moving) + sum(map(depends_on_input, kw.values()))
    if count > 1:
        kw = {key: scale_relevance(x, 1 / count) for key, x in kw.items()}
        return function(*(scale_relevance(x, 1 / count) for x in args), **kw)
    weights = [i for i, x in enumerate(args) if _is_weight(x)]
    z = function(*args, **kw)
    if len(moving) == len(weights) == 1 and function.__name__.strip("_") in _MATRIX:
        places = (moving[0], weights[0])

        def linear(x: Tensor, weight: Tensor) -> Tensor:
            given = list(args)
            given[places[0]], given[places[1]] = x, weight
            return function(*given, **kw)  # type: ignore[no-any-return]

        return engine.linear(z, Layer(linear, args[weights[0]], None), args[moving[0]])
    return z


_MATRIX = frozenset("matmul mm mv einsum rmatmul".split())


def _is_weight(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2 and not depends_on_input(x)


def _added_product(engine: Any, function: Rule, c: Any, x: Any, y: Any, **kw: Any) -> Any:
    """addmm and similar functions: c + x y."""
    if function.__name__ == "addmm" and depends_on_input(x) and not depends_on_input(y) and not kw:
        z = function(c, x, y)
        bias = None if depends_on_input(c) else c
        if bias is not None:
            return engine.linear(z, Layer(lambda x, w: x @ w, y, bias), x)
        return z
    if depends_on_input(x) and depends_on_input(y):
        x, y = scale_relevance(x, 0.5), scale_relevance(y, 0.5)
    return function(c, x, y, **kw)


def _quotient(engine: Any, function: Rule, x: Any, y: Any, *args: Any, **kw: Any) -> Any:
    if function.__name__.strip("_") in ("rdiv", "rtruediv"):  # y / x
        return function(x.detach(), y, *args, **kw)
    return function(x, y.detach() if isinstance(y, Tensor) else y, *args, **kw)


class _Sum(torch.autograd.Function):
    """z = x + y, whose gradient c goes to x as c w(x) q, q = z / (w(x) x + w(y) y), and to y alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, function: Rule, g: float) -> Tensor:
        z = function(x, y)
        size = z.abs()
        both = torch.add(x.abs(), y.abs()).add_(size).mul_(g / 2).add_(size)  # |w(x) x + w(y) y|
        q = size.div_(both).nan_to_num_(0)
        ctx.save_for_backward(q, x * z > 0, y * z > 0)
        ctx.g = g
        return z  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:  # type: ignore[override]
        q, *ups = ctx.saved_tensors
        c = c * q
        return *(torch.addcmul(c, c, up.to(c.dtype), value=ctx.g) for up in ups), None, None


def _addition(engine: Any, function: Rule, x: Any, y: Any, **kw: Any) -> Any:
    g = engine.composite.residual
    if not g or kw or not (depends_on_input(x) and depends_on_input(y)) or x.shape != y.shape:
        return function(x, y, **kw)
    return _Sum.apply(x, y, function, g)


def _linear(
    engine: Any, function: Rule, input: Tensor, weight: Tensor, bias: Any = None, *options: Any,
    **kw: Any,
) -> Any:  # fmt: skip
    if depends_on_input(weight):  # computed from activations
        part = 0.5 if depends_on_input(input) else 1.0
        return function(
            scale_relevance(input, part), scale_relevance(weight, part), bias, *options, **kw
        )
    z = function(input, weight, bias, *options, **kw)
    dims = max(0, weight.ndim - 2)
    layer = Layer(
        lambda x, w: function(x, w, None, *options, **kw), weight, over_places(bias, dims)
    )
    return engine.linear(z, layer, input, convolution=dims > 0)


def over_places(bias: Tensor | None, dims: int) -> Tensor | None:
    return None if bias is None else bias.unflatten(0, (-1, *dims * [1]))


class _Scaled(torch.autograd.Function):
    """BatchNorm; on a CPU, PyTorch's gradient is wrong for one image if the input is channels-last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, given: Any) -> Tensor:
        ctx.save_for_backward(scale)
        return F.batch_norm(x, *given)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return (c * ctx.saved_tensors[0]).to(c.dtype), None, None


def batch_norm(
    engine: Any, function: Rule, input: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """BatchNorm as x scale + shift; if it follows a convolution or a linear layer, both count as one
    layer."""
    if training or running_mean is None or running_var is None:
        engine.refuse("batch_norm with statistics of the batch")
        return function(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if input.is_contiguous() and input.device.type == "cpu":  # else the fused function is slower
        scale, shift = batch_norm_scale_and_shift(running_mean, running_var, weight, bias, eps)
        given = (running_mean, running_var, weight, bias, False, momentum, eps)
        z = _Scaled.apply(input, over_places(scale, input.ndim - 2), given)
    else:
        z, scale, shift = affine_batch_norm(input, running_mean, running_var, weight, bias, eps)
    return engine.apply_batch_norm(z, input, scale, over_places(shift.to(z.dtype), z.ndim - 2))


class _Normed(torch.autograd.Function):
    """(x - mean) s weight + bias with a constant s; without the mean where ``centre`` is False.

    ``normed(x)`` returns it, and s for the rows (..., 1) into which ``rows`` reshapes x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Any, weight: Any, rows: Any, normed: Any, centre: bool = True
    ) -> Tensor:
        y, scale = normed(x)
        ctx.save_for_backward(scale.to(x.dtype), *(() if weight is None else (weight,)))
        ctx.rows, ctx.centre, ctx.size = rows, centre, None if bias is None else bias.shape
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:  # type: ignore[override]
        scale, *weight = ctx.saved_tensors
        grad = (c * weight[0] if weight else c.clone()).reshape(ctx.rows)
        if ctx.centre:
            grad.sub_(grad.mean(-1, keepdim=True))
        of_bias = c.sum_to_size(ctx.size) if ctx.needs_input_grad[1] else None
        return grad.mul_(scale).reshape(c.shape), of_bias, None, None, None, None


def _layer_norm(
    engine: Any, function: Rule, x: Tensor, shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *_: Any,
) -> Any:  # fmt: skip
    shape = tuple(shape)

    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        y, _, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        return y, scale.flatten(x.ndim - len(shape))

    return _Normed.apply(x, bias, weight, (*x.shape[: -len(shape)], -1), normed)


def _group_norm(
    engine: Any, function: Rule, x: Tensor, groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *_: Any,
) -> Any:  # fmt: skip
    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        given = (x.contiguous(), weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)
        y, _, scale = torch.native_group_norm(*given)
        return y, scale[..., None]

    places = (over_places(t, x.ndim - 2) for t in (bias, weight))
    return _Normed.apply(x, *places, (len(x), groups, -1), normed)


def _rms_norm(
    engine: Any, function: Rule, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
) -> Any:
    least = torch.finfo(x.dtype).eps if eps is None else eps
    start = x.ndim - len(tuple(shape))

    def normed(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.flatten(start).to(torch.promote_types(x.dtype, torch.float32))
        return function(x, shape, weight, eps), (wide.square().mean(-1, True) + least).rsqrt()

    return _Normed.apply(x, None, weight, (*x.shape[:start], -1), normed, False)


def _instance_norm(
    engine: Any, function: Rule, x: Tensor, running_mean: Any = None, running_var: Any = None,
    weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    if use_input_stats:
        return _group_norm(engine, function, x, x.shape[1], weight, bias, eps)
    return batch_norm(engine, F.batch_norm, x, running_mean, running_var, weight, bias, eps=eps)


def _glu(engine: Any, function: Rule, x: Tensor, dim: int = -1) -> Tensor:
    first, gate = x.chunk(2, dim)
    return first * gate.sigmoid().detach()


def _moments(engine: Any, function: Rule, *args: Any, **kw: Any) -> Any:
    spread, mean = function(*args, **kw)
    return spread.detach(), mean


def _sampled(engine: Any, function: Rule, x: Tensor, grid: Tensor, *args: Any, **kw: Any) -> Any:
    return function(x, grid.detach(), *args, **kw)


# ---------------------------------------------------------------------- attention


def attention_factors(query: Any, key: Any, value: Tensor, bias: Any = None) -> list[Any]:
    """The factors of A V, with the relevance that the written-out products would give them; learned
    tensors get nothing."""
    scored = any(map(depends_on_input, (query, key, bias)))
    part = 0.5 if scored and depends_on_input(value) else 1.0
    half = part / max(1, depends_on_input(query) + depends_on_input(key))
    return [
        scale_relevance(query, half),
        scale_relevance(key, half),
        scale_relevance(value, part),
        scale_relevance(bias, part),
    ]


def _attention(
    engine: Any, function: Rule, q: Any, k: Any, v: Any, mask: Any = None, *args: Any, **kw: Any
) -> Any:
    mask = kw.pop("attn_mask", mask)
    return function(*attention_factors(q, k, v, mask), *args, **kw)


def _causal_product(engine: Any, function: Rule, q: Any, k: Any, v: Any, *given: Any) -> Any:
    return _attention(
        engine, lambda q, k, v, _, *rest: function(q, k, v, *rest), q, k, v, None, *given
    )


def _by_values(
    engine: Any, function: Rule, query: Any, key: Any, value: Tensor, *args: Any, **kw: Any
) -> Any:
    """Attention or pooling with constant weights."""
    query, key, *other = (x.detach() if isinstance(x, Tensor) else x for x in (query, key, *args))
    kw = {name: x.detach() if isinstance(x, Tensor) else x for name, x in kw.items()}
    return function(query, key, value, *other, **kw)


def _multi_head(
    engine: Any, function: Rule, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int,
    in_weight: Tensor | None, in_bias: Tensor | None, bias_k: Any, bias_v: Any, add_zero_attn: bool,
    dropout: float, out_weight: Tensor, out_bias: Tensor | None, **kw: Any,
) -> Any:  # fmt: skip
    """Projections, attention, projection, each with its rule; (N, B, C) or (N, C)."""
    if bias_k is not None or add_zero_attn or kw.get("static_k") is not None:
        engine.refuse("multi_head_attention_forward with keys of its own")
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = [kw[name] for name in names] if in_weight is None else in_weight.chunk(3)
    biases = [None] * 3 if in_bias is None else in_bias.chunk(3)
    mask, hidden = kw.get("attn_mask"), kw.get("key_padding_mask")
    with engine:
        parts = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).movedim(0, -2) for x, w, b in parts)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, heads))
        mask = mask if mask is None or mask.dtype != torch.bool else _hiding(mask, q)
        if hidden is not None:
            hidden = _hiding(hidden, q) if hidden.dtype == torch.bool else hidden
            hidden = hidden[..., None, None, :]
            mask = hidden if mask is None else mask + hidden
        y = F.scaled_dot_product_attention(q, k, v, mask)
        y = F.linear(y.movedim(-2, 0).flatten(-2), out_weight, out_bias)
        if not kw.get("need_weights", True):
            return y, None
        scores = q.detach() @ k.detach().mT / q.shape[-1] ** 0.5
        a = (scores if mask is None else scores + mask).softmax(-1)
        return y, a.mean(-3) if kw.get("average_attn_weights", True) else a


def _hiding(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def _lstm(
    engine: Any, function: Rule, x: Tensor, hx: Any, weights: Any, has_bias: bool, layers: int,
    dropout: float, training: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """Gates are constants; the products, sums and tanh of each step have their own rules."""
    ways = 2 if bidirectional else 1
    size = len(weights) // (layers * ways)
    ends: list[tuple[Tensor, Tensor]] = []
    with engine:
        steps = list(x.unbind(1 if batch_first else 0))
        for layer in range(layers):
            outputs = []
            for way in range(ways):
                number = layer * ways + way
                w_in, w_own, *b = weights[number * size : number * size + 2 + 2 * has_bias]
                b_in, b_own = b or (None, None)
                h, c = (state[number] for state in hx)
                found = []
                for step in reversed(steps) if way else steps:
                    sums = F.linear(step, w_in, b_in) + F.linear(h, w_own, b_own)
                    i, f, g, o = sums.chunk(4, -1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                    found.append(h)
                outputs.append(found[::-1] if way else found)
                ends.append((h, c))
            steps = [torch.cat(pair, -1) for pair in zip(*outputs, strict=True)]
        out = torch.stack(steps, 1 if batch_first else 0)
        return out, *(torch.stack(kind) for kind in zip(*ends, strict=True))


# ---------------------------------------------------------------------- the table

LAYOUT = frozenset(
    "reshape view flatten unflatten permute transpose swapaxes movedim t contiguous clone squeeze "
    "unsqueeze unfold im2col pixel_unshuffle pad to float double half bfloat16 type type_as getitem chunk "
    "split unbind".split()
)
"""Functions that only move positions; an image remains an image."""
AFFINE = frozenset(
    "add radd sub rsub cat concat concatenate hstack vstack stack where masked_fill addcmul addcdiv addmm "
    "baddbmm addbmm lerp pad setitem copy scatter index_put index_add index_copy masked_scatter".split()
)
"""Functions that may add constants to activations."""
_LINEAR = (
    "neg negative sum mean cumsum tril triu diagonal diag_embed trace expand expand_as broadcast_to repeat "
    "repeat_interleave tile roll flip rot90 narrow select tensor_split unsafe_chunk unsafe_split gather "
    "take take_along_dim index_select masked_select fold col2im pixel_shuffle channel_shuffle "
    "native_channel_shuffle view_as reshape_as ravel swapdims moveaxis hsplit vsplit get cpu cuda "
    "requires_grad retain_grad detach view_as_real view_as_complex real imag fft_fft fft_ifft fft_fft2 "
    "fft_ifft2 fft_rfft fft_irfft fft_rfft2 fft_irfft2 avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample max_pool1d "
    "max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d amax amin topk sort kthvalue median "
    "identity abs absolute fill zero meshgrid "
    "broadcast_tensors nan_to_num"
)
# Of kernels.
_ATTENTION = ("scaled_dot_product_attention", "softmax_forward", "block_sparse_forward")
_POOLS = ("pooling_forward", "causal_product_forward")
WRITING = frozenset("setitem copy index_put fill zero".split())
"""Names of functions that change their first argument, with or without underscores."""
FEATURES = frozenset(
    "exp exp2 expm1 log softplus mish elu selu celu erf sin cos rpow relu6 logsigmoid hardtanh "
    "special_expit".split()
)
"""Functions of one activation that keep their own gradient when a mechanism builds its operator."""
WRITTEN_OUT = frozenset(("multi_head_attention_forward", "lstm"))


def _of(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **dict.fromkeys(LAYOUT | AFFINE, own_gradient),
    **_of(_LINEAR, own_gradient),
    **_of("add radd", _addition),
    **_of("addcmul baddbmm addmm addbmm addmv", _added_product),
    **_of(
        "relu6 hardtanh elu selu celu gelu silu mish hardswish tanh softsign softshrink tanhshrink "
        "threshold erf sin atan",
        activation,
    ),
    **_of("leaky_relu prelu rrelu hardshrink", own_gradient),
    **_of("normalize local_response_norm", _scaling),
    "relu": relu,
    "rms_norm": _rms_norm,
    **_of("clamp clip clamp_min clamp_max cos cosh logsigmoid log_sigmoid", shifted_activation),
    **_of("max min maximum minimum fmax fmin", _larger),
    **_of(
        "sigmoid special_expit hardsigmoid exp exp2 expm1 log log2 log10 log1p softplus rpow norm "
        "linalg_norm linalg_vector_norm rsqrt reciprocal std var logsumexp sign floor ceil "
        "round floor_divide",
        no_relevance,
    ),
    **_of("pow square sqrt", _power),
    **_of(
        "mul rmul multiply matmul bmm mm mv einsum inner outer ger dot tensordot rmatmul",
        product_rule,
    ),
    **_of("div divide truediv true_divide rdiv rtruediv", _quotient),
    **_of(
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _linear
    ),
    **_of("var_mean std_mean", _moments),
    "grid_sample": _sampled,
    "glu": _glu,
    "batch_norm": batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "multi_head_attention_forward": _multi_head,
    "lstm": _lstm,
    **dict.fromkeys(_ATTENTION, _attention),
    "pooling_forward": _attention,
    "causal_product_forward": _causal_product,
    **_of("softmax log_softmax", own_gradient),
}
"""Rules by function name, without leading and trailing underscores; with "shared" attention."""
_CONSTANT_ATTENTION: dict[str, Rule] = {
    **dict.fromkeys((*_ATTENTION, *_POOLS), _by_values),
    **_of("softmax log_softmax", no_relevance),
}
ATTENTION = frozenset((*_ATTENTION, "softmax"))
TAUGHT: set[str] = set()
"""Names of functions whose rule comes from a user."""
_KINDS = {
    "linear": own_gradient,
    "activation": activation,
    "constant": no_relevance,
    "product": product_rule,
}


def rules_of(composite: Composite) -> dict[str, Rule]:
    """The table of rules of a composite."""
    if composite.plain:
        return dict(composite.rules)
    constant = _CONSTANT_ATTENTION if composite.attention == "constant" else {}
    return {**RULES, **constant, **dict(composite.rules)}


def register_rule(name: str, rule: Rule | str) -> None:
    """Use ``rule`` for all functions called ``name``.

    Args:
        name: function name, such as "gelu", or the name of your ``torch.library`` op.
        rule: a :data:`Rule`, or "linear", "activation", "constant" or "product".

    Raises:
        ValueError: an unknown rule name.

    >>> register_rule("my_swish", "activation")
    """
    found = _KINDS.get(rule) if isinstance(rule, str) else rule
    if found is None:
        raise ValueError(f"rule: got {rule!r}; give one of {', '.join(_KINDS)}, or a function")
    name = name.strip("_")
    RULES[name] = found
    TAUGHT.add(name)


# ---------------------------------------------------------------------- constants added by layers


def _shift(
    input: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    """The constant that BatchNorm in eval mode adds to its scaled input."""
    if not (training or mean is None or var is None):
        bias = batch_norm_scale_and_shift(mean, var, weight, bias, eps)[1]
    return over_places(bias, input.ndim - 2)


# Position of a layer's bias among the arguments.
BIASED: dict[str, Callable[..., Tensor | None]] = {
    "layer_norm": lambda input, shape, weight=None, bias=None, *a, **kw: bias,
    **dict.fromkeys(
        "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(),
        lambda input, weight, bias=None, *a, **kw: over_places(bias, max(0, weight.ndim - 2)),
    ),
    "group_norm": lambda x, n, weight=None, bias=None, *a, **kw: over_places(bias, x.ndim - 2),
    "instance_norm": lambda x, m=None, v=None, weight=None, bias=None, *a, **kw: over_places(
        bias, x.ndim - 2
    ),
    "batch_norm": _shift,
}


def added_bias(function: Rule, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """The constant that a layer function adds to its output, in a shape that broadcasts there."""
    found = BIASED.get(getattr(function, "__name__", ""))
    return None if found is None else found(*args, **kwargs)
