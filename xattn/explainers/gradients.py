"""Maps of one backward pass: the gradient g = d logit_c / d x, x * g, and the guided gradient.

Saliency: Simonyan et al., arXiv 1312.6034; input x gradient: Shrikumar et al., arXiv 1605.01713;
guided backpropagation: Springenberg et al., arXiv 1412.6806. x are the raw pixels in [0, 1]; the
backbone normalises them inside. The first two are Captum's. A sensitivity (g, guided or not) becomes a
map by the largest absolute value over the channels, as in Simonyan et al.; x * g, an attribution with a
sign, by the sum over the channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xattn.backbone import Backbone
from xattn.explainers.base import Explainer, register_explainer


@register_explainer("saliency", title="Saliency")
class Saliency(Explainer):
    """max over the three channels of ``|g|``, (B, 1, H, W), never negative."""

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return pixel_gradient(self.backbone, images, target).abs().amax(1, keepdim=True)


@register_explainer("input_x_gradient", title="Input × gradient")
class InputXGradient(Explainer):
    """Sum over the three channels of x * g, (B, 1, H, W), signed. Black pixels get 0."""

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        # Imported late: captum takes longer to load than the maps take to compute.
        from captum.attr import InputXGradient as Captum

        maps = Captum(self.backbone.logits).attribute(images.detach().requires_grad_(), target)
        return maps.detach().sum(1, keepdim=True)


@register_explainer("guided_backprop", title="Guided backprop", networks=("cnn",))
class GuidedBackprop(Explainer):
    """max over the three channels of the absolute guided gradient, (B, 1, H, W), never negative.

    A ReLU passes back max(g, 0) where its own derivative is 1, else 0. ReLU, ReLU6 and
    ``hardtanh(x, 0, b)`` follow the rule, called as a module or as a function, in place or not.
    Captum's version changes only modules of type ``nn.ReLU``, through hooks on their inputs, which a
    skip connection may share. Other activations keep their own derivative, with a warning.

    Raises:
        ValueError: a network that calls no ReLU; the message names the activations that it calls.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone, guided = self.backbone, _GuidedReLUs()
        with self._guard(), torch.no_grad():
            images = self._move(probe_image(backbone))
            plain = backbone.logits(images)
            with calling(backbone, guided.inside), guided:
                check_same_logits(backbone, self.name, backbone.logits(images), plain)
        other = ", ".join(sorted(guided.other)) or "none"
        if not guided.found:
            raise ValueError(
                f"backbone: {backbone.name} calls no ReLU (activations found: {other}), so "
                f"guided_backprop would equal the gradient; use 'saliency' or 'smoothgrad'"
            )
        if guided.other:
            warnings.warn(
                f"guided_backprop: {backbone.name} also calls {other}; they keep their own derivative",
                stacklevel=4,
            )

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with _GuidedReLUs():
            gradient = pixel_gradient(self.backbone, images, target)
        return gradient.abs().amax(1, keepdim=True)


def pixel_gradient(backbone: Backbone, images: Tensor, target: Tensor) -> Tensor:
    """d logit / d pixel, (B, 3, H, W), by Captum."""
    from captum.attr import Saliency as Captum

    # A leaf of its own: Captum warns about inputs that do not require a gradient.
    leaf = images.detach().requires_grad_()
    return Captum(backbone.logits).attribute(leaf, target, abs=False).detach()


def class_gradients(
    logits: Tensor, x: Tensor | Sequence[Tensor], classes: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """d logit / d x of each column of ``classes`` (B, M), one for each ``x``.

    All come from one graph, which the last column frees.
    """
    columns = classes.unbind(1)
    for number, column in enumerate(columns, 1):
        score = logits.gather(1, column[:, None]).sum()
        yield torch.autograd.grad(score, x, retain_graph=number < len(columns))


# ------------------------------------------------------------------- a network's function calls


class _Guided(torch.autograd.Function):
    """min(max(x, 0), upper), whose gradient passes where it is positive and x in (0, upper)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upper: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < upper))
        return x.clamp(0, upper)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.clamp_min(0) * ctx.saved_tensors[0], None


_OTHER = frozenset(
    "silu silu_ gelu hardswish hardswish_ elu elu_ selu celu mish mish_ leaky_relu leaky_relu_ prelu "
    "rrelu tanh tanh_ softplus softsign hardtanh hardtanh_ sigmoid sigmoid_ hardsigmoid".split()
)


class _GuidedReLUs(TorchFunctionMode):
    """Replaces every call of a ReLU by the guided rule and notes which other activations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        self.found = False
        self.other: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        upper = _upper(name, *args, **kwargs)
        if upper is not None:
            self.found = True
            return _Guided.apply(args[0] if args else kwargs["input"], upper)
        if name in _OTHER:
            self.other.add(named(name, self.inside))
        return function(*args, **kwargs)


def _upper(
    name: str,
    input: Tensor | None = None,
    min_val: float = -1.0,
    max_val: float = 1.0,
    *other: Any,
    **kw: Any,
) -> float | None:
    """The largest value of the ReLU called ``name``; None for other functions."""
    if name in ("relu", "relu_"):
        return torch.inf
    if name in ("relu6", "relu6_"):
        return 6.0
    return float(max_val) if name in ("hardtanh", "hardtanh_") and min_val == 0 else None


def named(function: str, inside: list[nn.Module]) -> str:
    """ "silu in SiLU": a function and the type of the module that calls it."""
    return f"{function} in {type(inside[-1]).__name__}" if inside else function


@contextmanager
def calling(backbone: nn.Module, inside: list[nn.Module]) -> Iterator[None]:
    """Keep in ``inside`` the modules of ``backbone`` that are being called, the innermost last."""

    def leave(*_: Any) -> None:  # what a hook returns would take the place of the output
        inside.pop()

    handles = []
    for module in backbone.modules():
        handles.append(module.register_forward_pre_hook(lambda m, _: inside.append(m)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_image(backbone: Backbone) -> Tensor:
    """(1, 3, H, W) of noise at the backbone's default size, to try rules on."""
    size = (1, backbone.mean.shape[1], *backbone.preprocessing.input_size)
    return torch.rand(size, generator=torch.Generator().manual_seed(0), device="cpu")


def check_same_logits(backbone: Backbone, method: str, got: Tensor, plain: Tensor) -> None:
    """Raise a ``ValueError`` if rules that work out of place change what the network computes."""
    if not torch.allclose(got, plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
        raise ValueError(
            f"backbone: {backbone.name} reads a tensor again that an activation changed in place, "
            f"which {method} cannot follow; use 'saliency' or 'gradcam'"
        )
