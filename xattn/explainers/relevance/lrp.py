"""LRP: R_i = x_i sum_j r(w_ij) R_j / (sum_i x_i r(w_ij) + r(b_j) + eps), layer by layer to the pixels.

Bach et al., PLOS ONE 2015 (epsilon rule, r(w) = w); Montavon et al. 2019, doi 10.1007/978-3-030-28954-6_10
(gamma rule, r(w) = w + gamma max(w, 0)). One backward
pass carries c = R / activation, and R = x c: sums, pools and reshapes keep their own gradient, an
activation passes f(x)/x on, a gate is a constant, and a linear layer scales c by its output over its
denominator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xattn.explainers.base import Choose, Explainer, register_explainer
from xattn.explainers.gradients import (
    calling,
    check_same_logits,
    class_gradients,
    named,
    probe_image,
)
from xattn.runtime.option_checks import NotNegative


@register_explainer("lrp", title="LRP", networks=("cnn",))
@dataclass(kw_only=True, eq=False, repr=False)
class Lrp(Explainer):
    """LRP of a CNN: relevance of the normalised image, summed over its channels, (B, 1, H, W), signed.

    Relevance is conserved: the map, what the biases keep (a neuron of activation 1 each) and what eps
    absorbs sum to the logit. Biases can keep nearly all of it: on EfficientNet-Lite0 the map of the
    gamma rule sums to about 1 % of the logit. A BatchNorm that follows a convolution is one layer with
    it. The rules answer calls of functions, so that residual sums, depthwise convolutions, ReLU6 and
    activations in place are followed; Captum's LRP knows sequences of ``nn.Conv2d``, ``nn.Linear`` and
    ``nn.ReLU``, and a residual sum breaks its conservation.

    Args:
        gamma: how strongly convolutions prefer positive contributions; 0 is the epsilon rule, which
            on a ReLU network is close to input x gradient and as noisy. Inputs and outputs below 0
            follow the same rule with signs flipped. Linear layers always follow the epsilon rule.
        epsilon: added to the denominators, away from 0. By default a millionth of the layer's output, its
            root mean square on the image; a fixed number absorbs nearly all relevance of a network whose
            activations are small.

    Raises:
        ValueError: a network that calls a function without a rule; the message names it and its layer.
    """

    gamma: NotNegative = 0.25
    epsilon: NotNegative | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone = self.backbone
        rules = _Rules(self.gamma, self.epsilon)
        with self._guard(), torch.enable_grad():
            images = self._move(probe_image(backbone))
            with calling(backbone, rules.inside):
                logits, _ = self._run(images, rules)
            if rules.refused:
                raise ValueError(
                    f"backbone: lrp has no rule for {', '.join(sorted(rules.refused))}, called by "
                    f"{backbone.name}; use 'attn_lrp' for a transformer, else 'gradcam'"
                )
            check_same_logits(backbone, self.name, logits, backbone.logits(images))

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits, x = self._run(images, _Rules(self.gamma, self.epsilon))
            classes = self._chosen(choose, logits.detach())
            gradients = class_gradients(logits, x, classes)
            maps = [(x.detach() * gradient).sum(1) for (gradient,) in gradients]
        return logits.detach(), classes, torch.stack(maps, 1)

    def _run(self, images: Tensor, rules: _Rules) -> tuple[Tensor, Tensor]:
        """Logits whose gradient is c, and the normalised images."""
        self.backbone.requires_grad_(False)  # the guard puts it back
        x = self.backbone.normalize(images).requires_grad_()
        with rules:
            return self.backbone.logits_normalized(x), x


# ---------------------------------------------------------------------- the rules


class _Layer(NamedTuple):
    """A linear layer: ``linear(x, weight)`` without its bias."""

    linear: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None


class _Shared(torch.autograd.Function):
    """The identity on z; its gradient c = R / z goes to the denominator p as c z / p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, z: Tensor, epsilon: float | None) -> Tensor:
        small = _millionth(z) if epsilon is None else z.new_tensor(epsilon)
        # z = 0 has no relevance to share.
        stable = p + torch.where(p < 0, -small, small)
        ctx.save_for_backward(torch.where(z == 0, 0, z / stable))
        return z.clone()

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return c * ctx.saved_tensors[0], None, None


def _millionth(z: Tensor) -> Tensor:
    """A millionth of the root mean square of each image's z, (B, 1, ...)."""
    rms = z.double().flatten(1).square().mean(1).sqrt()
    return (1e-6 * rms).to(z.dtype).view(-1, *[1] * (z.ndim - 1))


# Linear without a weight, or a choice of values: their own gradient passes relevance on.
_PLAIN = frozenset(
    "add __add__ __radd__ add_ sub __sub__ __rsub__ sub_ neg __neg__ mean sum cat concat stack avg_pool2d "
    "adaptive_avg_pool2d max_pool2d adaptive_max_pool2d amax pad interpolate reshape view flatten "
    "unflatten permute transpose contiguous clone squeeze unsqueeze expand __getitem__ split chunk "
    "unbind dropout dropout2d identity to float double type_as roll movedim pixel_shuffle channel_shuffle "
    "pixel_unshuffle".split()
)
# f(0) = 0: relevance passes through unchanged, R = c x.
_ACTIVATIONS = frozenset(
    "relu relu_ relu6 hardtanh leaky_relu silu gelu hardswish elu selu celu mish tanh prelu".split()
)
_FACTS = frozenset(("__get__", "size", "dim", "numel"))  # shapes and types
_GATES = frozenset(("sigmoid", "hardsigmoid"))
_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "multiply", "mul_"))
_QUOTIENTS = frozenset(("div", "__truediv__", "true_divide", "div_"))
# ``x += y`` arrives as add_. Backward passes still need the old x.
_OUT_OF_PLACE = {"add_": torch.add, "sub_": torch.sub, "mul_": torch.mul, "div_": torch.div}


class _Rules(TorchFunctionMode):
    """Applies the rules to a network's function calls; ``refused`` collects those without a rule."""

    def __init__(self, gamma: float, epsilon: float | None) -> None:
        super().__init__()
        self.gamma = gamma
        self.epsilon = epsilon
        self.inside: list[nn.Module] = []
        self.refused: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if not any(x.requires_grad for x in _tensors([args, kwargs])):
            return function(*args, **kwargs)
        if name in _FACTS:
            return function(*args, **kwargs)
        if name == "batch_norm":
            return self._batch_norm(*args, **kwargs)
        args = [self._finished(x) for x in args]
        kwargs = {key: self._finished(x) for key, x in kwargs.items()}
        if name in ("conv2d", "linear") and not _weight(*args, **kwargs).requires_grad:
            if name == "conv2d":
                return self._convolution(function, *args, **kwargs)
            return self._shared(function(*args, **kwargs))
        if name in _ACTIVATIONS:
            return _activation(function, *args, **kwargs)
        if name in _GATES:
            return function(*args, **kwargs).detach()
        result = _OUT_OF_PLACE.get(name, function)(*args, **kwargs)
        if not self._has_rule(name, args) and _tensors(result):
            self.refused.add(named(name, self.inside))
        return result

    def _has_rule(self, name: str, args: Any) -> bool:
        live = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        if name in _PRODUCTS:
            return len(live) == 1
        if name in _QUOTIENTS:
            return live == [0]
        return name in _PLAIN

    def _convolution(
        self,
        function: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *options: Any,
        **kw: Any,
    ) -> Tensor:
        """The plain output, marked: a BatchNorm that comes next belongs to the same layer."""
        z = function(input, weight, bias, *options, **kw)
        z.lrp_layer = _Layer(  # type: ignore[attr-defined]
            lambda x, w: function(x, w, None, *options, **kw), input, weight, bias
        )
        return z

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        z = torch.nn.functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if training or running_mean is None or running_var is None:
            self.refused.add(named("batch_norm with statistics of the batch", self.inside))
            return z
        layer = getattr(input, "lrp_layer", None)
        if layer is None:
            return self._shared(z)
        scale = (running_var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -running_mean if layer.bias is None else layer.bias - running_mean
        shift = shift * scale if bias is None else shift * scale + bias
        folded = layer._replace(weight=layer.weight * scale[:, None, None, None], bias=shift)
        return self._shared(z, folded)

    def _finished(self, value: Any) -> Any:
        """``value`` with the rule applied to convolutions that no BatchNorm follows."""
        if isinstance(value, list | tuple):
            done = [self._finished(x) for x in value]
            return done if isinstance(value, list) else tuple(done)
        layer = getattr(value, "lrp_layer", None)
        return value if layer is None else self._shared(value, layer)

    def _shared(self, z: Tensor, layer: _Layer | None = None) -> Tensor:
        """Epsilon rule: the denominator is z. Gamma rule: z + gamma times the contributions of z's sign.

        a, the sum of contributions above 0, is linear(x+, w+) + linear(x-, w-); those below 0 sum to
        z - a. The denominator has the sign of z and is never smaller.
        """
        p = z
        if layer is not None and self.gamma:
            linear, x, weight, bias = layer
            a = linear(x.clamp(min=0), weight.clamp(min=0))
            if bool((x < 0).any()):
                a = a + linear(x.clamp(max=0), weight.clamp(max=0))
            if bias is not None:
                a = a + bias.clamp(min=0)[:, None, None]
            p = z + self.gamma * torch.where(z > 0, a, z - a)
        return _Shared.apply(p, z.detach(), self.epsilon)


def _activation(function: Callable[..., Any], x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """x (f(x)/x) with the quotient held constant; at 0, where there is nothing to distribute, 0."""
    if kw.get("inplace"):
        kw = {**kw, "inplace": False}
    if function.__name__.endswith("_"):
        function = getattr(torch, function.__name__[:-1])
    with torch.no_grad():
        gate = torch.where(x == 0, 0, function(x, *args, **kw) / x)
    return x * gate


def _weight(input: Tensor, weight: Tensor, *args: Any, **kw: Any) -> Tensor:
    return weight


def _tensors(values: Any) -> list[Tensor]:
    """All tensors of nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [x for value in values for x in _tensors(value)]
