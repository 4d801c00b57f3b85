"""AttnLRP: relevance R = x * grad, with gradient rules that distribute the class logit.

Achtibat et al., ICML 2024, arXiv 2402.05602, in the form input x gradient: a product of two
activations gives half the gradient to each, so that in softmax attention dV counts 1/2 and dQ, dK 1/4;
LayerNorm's standard deviation is a constant; GELU and SiLU pass f(x)/x on in place of f'(x). One
forward and one backward pass with fused attention; biases and softmax absorb a part of the relevance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xattn.attention.base import Mechanism
from xattn.attention.record import attending_by, fused_layers
from xattn.explainers.attention import patch_grid
from xattn.explainers.base import Choose, Explainer, register_explainer


@register_explainer("attn_lrp", networks=("vit",))
@dataclass(kw_only=True, eq=False, repr=False)
class AttnLrp(Explainer):
    """AttnLRP of a model with softmax attention.

    Args:
        at: "tokens", relevance of the patch embeddings, (h, w) of the patch grid; or "pixels", of
            the normalised image, (H, W). Summed over channels, with its sign.

    Raises:
        ValueError: a model with another kind of attention, or that calls a function without a rule.
    """

    at: str = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone, at = self.backbone, self.at
        if at not in ("tokens", "pixels"):
            raise ValueError(f"at: got {at!r}; give 'tokens' or 'pixels'")
        if at == "tokens" and not hasattr(backbone.model, "patch_embed"):
            raise ValueError(f"at='tokens': {backbone.name} has no patch_embed; give at='pixels'")
        other = {m.entry.name for m in backbone.modules() if isinstance(m, Mechanism)} - {"softmax"}
        if other:
            raise ValueError(
                f"backbone: {backbone.name} attends by {', '.join(sorted(other))}; attn_lrp has "
                f"rules for softmax attention only"
            )
        with self._guard(), torch.enable_grad():
            size = backbone.preprocessing.input_size
            image = self._move(torch.zeros(1, backbone.mean.shape[1], *size, device="cpu"))
            if not self._run(image)[2]:
                raise ValueError(
                    f"backbone: {backbone.name} makes no call of softmax attention; attn_lrp "
                    f"explains transformers, use 'gradcam'"
                )

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits, x, _ = self._run(images)
            classes = self._chosen(choose, logits.detach())
            maps: list[Tensor] = []
            for column in classes.unbind(1):
                score = logits.gather(1, column[:, None]).sum()
                last = len(maps) == classes.shape[1] - 1
                grad = torch.autograd.grad(score, x, retain_graph=not last)[0]
                maps.append(self._map(x.detach() * grad, images))
        return logits.detach(), classes, torch.stack(maps, 1)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, int]:
        """Logits, the tensor to explain, and the number of calls of attention."""
        rules = _Rules(self.backbone.name)
        self.backbone.requires_grad_(False)  # weights are no activations; the guard puts it back
        x = self.backbone.normalize(images)
        if self.at == "pixels":
            x.requires_grad_()
            with fused_layers(self.backbone.model), rules:
                return self.backbone.logits_normalized(x), x, rules.attended
        embedded: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any) -> Tensor:
            known = isinstance(output, Tensor) and (output.ndim == 3 or self._layout())
            if not known:
                raise ValueError(
                    f"at='tokens': patch_embed of {self.backbone.name} does not give tokens "
                    f"(B, N, C); give at='pixels'"
                )
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        handle = self.backbone.model.patch_embed.register_forward_hook(keep)  # type: ignore[union-attr]
        try:
            with fused_layers(self.backbone.model), rules:
                logits = self.backbone.logits_normalized(x)
        finally:
            handle.remove()
        return logits, embedded[0], rules.attended

    def _map(self, relevance: Tensor, images: Tensor) -> Tensor:
        """Summed over channels: (B, C, H, W), (B, N, C) or (B, h, w, C) -> (B, h, w)."""
        if self.at == "pixels":
            return relevance.sum(1)
        if relevance.ndim == 4:
            return relevance.sum(1 if self._layout() == "NCHW" else 3)
        relevance = relevance.sum(2)
        return relevance.unflatten(1, patch_grid(self.backbone, images, relevance.shape[1]))

    def _layout(self) -> str:
        """The memory format, NCHW or NHWC, of a patch embedding that keeps the grid."""
        return str(getattr(self.backbone.model.patch_embed, "output_fmt", "")).rpartition(".")[2]  # type: ignore[union-attr]


# ---------------------------------------------------------------------- the rules


class _Share(torch.autograd.Function):
    """The identity; its gradient is multiplied by ``share``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.share, None


def _attention(
    function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
) -> Any:
    q, k = (_Share.apply(x, 0.25) for x in (query, key))
    return function(q, k, _Share.apply(value, 0.5), *args, **kw)


def _product(function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """A product of activations gives each an equal share; factors without gradient are weights."""
    if any(isinstance(x, Tensor | list | tuple) for x in kw.values()):
        raise ValueError(f"attn_lrp has no rule for {function.__name__} with tensors by keyword")
    if len(args) == 2 and isinstance(args[1], list | tuple):  # einsum(equation, [a, b])
        args = (args[0], *args[1])
    live = sum(isinstance(x, Tensor) and x.requires_grad for x in args)
    if live < 2:
        return function(*args, **kw)
    shared = (_Share.apply(x, 1 / live) if isinstance(x, Tensor) else x for x in args)
    return function(*shared, **kw)


def _added_product(function: Callable[..., Any], x: Any, *args: Any, **kw: Any) -> Any:
    return _product(lambda *factors, **kw: function(x, *factors, **kw), *args, **kw)


def _power(function: Callable[..., Any], x: Any, exponent: Any = 2, **kw: Any) -> Any:
    if not isinstance(exponent, int | float):
        raise ValueError("attn_lrp has no rule for powers whose exponent is a tensor")
    x = _Share.apply(x, 1 / exponent) if isinstance(x, Tensor) and exponent else x
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


_RULES: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "softmax_forward": _attention,  # of xattn.kernels
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
_REFUSED = frozenset(
    "addcdiv addbmm mul_ div_ tanh_ sigmoid_ exp log softplus mish elu selu celu "
    "group_norm instance_norm cosine_similarity erf sin cos reciprocal prod bilinear "
    "linalg_matmul linalg_multi_dot multi_dot chain_matmul cumprod expm1 exp2 glu __rpow__ pow_ "
    "relu6 logsigmoid log_sigmoid hardtanh".split()
)


class _Rules(TorchFunctionMode):
    """Replaces the PyTorch functions that have a rule; all others keep their own gradient."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.model = model
        self.attended = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is F.multi_head_attention_forward:
            if kwargs.get("need_weights", True):
                name = "multi_head_attention_forward(need_weights=True)"
                raise ValueError(
                    f"backbone: {self.model} calls {name}; attn_lrp has no rule for it"
                )
            with attending_by(lambda *a, **kw: self._apply(_FUSED, a, kw)):
                return function(*args, **kwargs)
        live = args[1:] if name in ("mul_", "div_") else args  # in place, by a weight: linear
        if name in _REFUSED and any(isinstance(x, Tensor) and x.requires_grad for x in live):
            raise ValueError(f"backbone: {self.model} calls {name}; attn_lrp has no rule for it")
        return self._apply(function, args, kwargs)

    def _apply(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        self.attended += name in ("scaled_dot_product_attention", "softmax_forward", "softmax")
        rule = _RULES.get(name)
        return function(*args, **kwargs) if rule is None else rule(function, *args, **kwargs)


_FUSED = F.scaled_dot_product_attention
