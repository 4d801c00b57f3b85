"""Guided backpropagation: Springenberg et al., arXiv 1412.6806. A ReLU passes back max(g, 0) where its
derivative is 1, else 0. As in saliency, the map is the largest absolute value over the channels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from xattn.explainers.base import Explainer, register_explainer
from xattn.explainers.gradients import pixel_gradient, probe_image
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.rules import Composite, Rule


class _Guided(torch.autograd.Function):
    """min(max(x, 0), upper); its gradient passes where it is positive and x is in (0, upper)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upper: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < upper))
        return x.clamp(0, upper)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.clamp_min(0) * ctx.saved_tensors[0], None


def _other(engine: Engine, function: Rule, *args: Any, **kw: Any) -> Any:
    engine.refuse(function.__name__.strip("_"))  # only recorded
    return function(*args, **kw)


def _relu(
    engine: Engine,
    function: Rule,
    x: Tensor,
    min_val: float = -1.0,
    max_val: float = 1.0,
    **kw: Any,
) -> Any:
    name = function.__name__.strip("_")
    if name == "hardtanh" and min_val != 0:
        return _other(engine, function, x, min_val, max_val)
    engine.attended += 1
    return _Guided.apply(x, {"relu": torch.inf, "relu6": 6.0}.get(name, float(max_val)))


_OTHER = (
    "silu gelu hardswish elu selu celu mish leaky_relu prelu rrelu tanh softplus softsign sigmoid "
    "hardsigmoid"
)
RULES = Composite(
    plain=True,
    rules=(
        *((name, _relu) for name in ("relu", "relu6", "hardtanh")),
        *((name, _other) for name in _OTHER.split()),
    ),
)


@register_explainer("guided_backprop", title="Guided backprop", networks=("cnn",))
class GuidedBackprop(Explainer):
    """Maps (B, 1, H, W): the largest absolute guided gradient over the three channels.

    ReLU, ReLU6 and ``hardtanh(x, 0, b)`` follow the rule, whether called as a module or a function, in
    place or not. Captum's version changes only modules of type ``nn.ReLU``, through hooks on their inputs,
    which a skip connection may share. Other activations keep their usual derivative, with a warning.

    Raises:
        ValueError: a network that calls no ReLU; the message names the activations that it calls.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_resnet", weights=None, input_size=64)
        >>> method = xattn.create_explainer("guided_backprop", net)
        >>> method.attribute(torch.rand(1, 3, 64, 64), target=3).shape
        torch.Size([1, 1, 64, 64])
    """

    clips = True

    def __post_init__(self) -> None:
        super().__post_init__()
        engine = Engine(RULES)
        with self._guard(), torch.enable_grad(), engine:
            self.backbone.logits(self._move(probe_image(self.backbone)).requires_grad_())
        other = ", ".join(sorted(engine.refused)) or "none"
        if not engine.attended:
            raise ValueError(
                f"backbone: {self.backbone.name} calls no ReLU (activations found: {other}), so "
                f"guided_backprop would equal the gradient; use 'saliency' or 'smoothgrad'"
            )
        if engine.refused:
            warnings.warn(
                f"guided_backprop: {self.backbone.name} also calls {other}, which keep their "
                "usual derivative",
                stacklevel=4,
            )

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with Engine(RULES):
            gradient = pixel_gradient(self.backbone, images, target)
        return gradient.abs().amax(1, keepdim=True)
