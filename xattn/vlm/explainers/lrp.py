"""Layer-wise relevance propagation to the image features: s_i = f_i . G_i, G by the rules of LRP.

    attn_lrp  Achtibat et al., ICML 2024, arXiv 2402.05602
    cp_lrp    Ali et al., ICML 2022, arXiv 2202.07304: attention weights and gates are constant, too

    norms         1/rms, or 1/deviation, is constant
    activations   act(x) is x times the constant act(x)/x
    products      of two activations get half of the gradient
    attention     queries and keys get a quarter, by way of the softmax, values half; by cp_lrp values all

in the model's own pass up to its logits z; a word's score hands down z_c ds/dz_c. Text tokens get the
relevance of their embeddings. By cp_lrp, image and text sum to the logit, but for what biases hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xattn.attention.record import FUSED, fused_layers
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer

COST = "1 + 1 backward a word"
ACTIVATIONS = frozenset(("silu", "gelu", "relu", "tanh", "sigmoid"))
PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "multiply"))


@dataclass(kw_only=True, eq=False)
class _Relevance(TokenExplainer):
    """Gradient x input by the rules."""

    attention: ClassVar[bool]
    """Whether relevance goes through softmax and gates."""

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        of_text = context.vlm.kind != "encoder"
        leaves = [context.features.detach().clone().requires_grad_()]

        def keep(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not of_text or len(leaves) > 1:
                return None
            leaves.append(output.detach().clone().requires_grad_())
            return leaves[1].clone()

        handle = context.vlm.model.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad(), _following(context.vlm.model, self.attention) as rules:
                logits = context.logits(leaves[0][None])
        finally:
            handle.remove()
        if not rules.attended:
            raise ValueError(
                f"explainer: {self.name} needs calls of scaled_dot_product_attention, and a "
                f"{type(context.vlm.model).__name__} makes none; attention, occlusion and "
                f"integrated_gradients can explain it"
            )
        found = []
        for score in context.scores_of(logits)[0]:
            grads = torch.autograd.grad(score, leaves, retain_graph=True)
            found.append([(x * g).sum(-1).detach() for x, g in zip(leaves, grads, strict=True)])
        image = torch.stack([own[0] for own in found])
        if not of_text:
            return TokenScores(image)
        return TokenScores(image, torch.stack([own[1][0] for own in found])[:, context.text])


@register_token_explainer("attn_lrp", title="AttnLRP", passes=COST, source="arXiv 2402.05602")
@dataclass(kw_only=True, eq=False)
class AttnLRP(_Relevance):
    """Relevance through values, softmax and gates."""

    attention = True


@register_token_explainer("cp_lrp", title="CP-LRP", passes=COST, source="arXiv 2202.07304")
@dataclass(kw_only=True, eq=False)
class CPLRP(_Relevance):
    """Relevance through values alone."""

    attention = False


@contextmanager
def _following(model: Any, attention: bool) -> Iterator[_Rules]:
    """Inside, ``model`` runs by the rules, its weights without gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]
    handles = []
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for module in model.modules() if not attention else ():
            if hasattr(module, "gate_proj") and hasattr(module, "act_fn"):
                gate = module.act_fn.register_forward_hook(lambda m, args, out: out.detach())
                handles.append(gate)
        with fused_layers(model), _Rules(attention) as rules:
            yield rules
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.requires_grad_()


class _Rules(TorchFunctionMode):
    """The rules for functions of activations; others keep their gradient."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.shares = (0.25, 0.25, 0.5) if attention else (0.0, 0.0, 1.0)
        self.attended = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if function is FUSED:
            self.attended += 1
            names = ("query", "key", "value")
            inputs = [*args[:3], *(kwargs.pop(n) for n in names[len(args) :])]
            shared = map(_share, inputs, self.shares)
            return function(*shared, *args[3:], **kwargs)
        if name == "rsqrt":
            return function(*args, **kwargs).detach()
        if name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        if name in ACTIVATIONS:
            x = args[0] if args else kwargs["input"]
            y = function(*args, **kwargs).detach()
            return x * torch.where(x == 0, 0, y / torch.where(x == 0, 1, x)).detach()
        result = function(*args, **kwargs)
        if name in PRODUCTS and all(isinstance(x, Tensor) and x.requires_grad for x in args[:2]):
            return _share(result, 0.5)
        return result


def _share(x: Tensor, share: float) -> Tensor:
    """x, of whose gradient a share is handed down."""
    return x.detach() + share * (x - x.detach())


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    """Of a module, which gives all of these, over the last dimension."""
    deviation = (x.detach().var(-1, correction=0, keepdim=True) + eps).sqrt()
    found = (x - x.mean(-1, keepdim=True)) / deviation
    found = found if weight is None else found * weight
    return found if bias is None else found + bias
