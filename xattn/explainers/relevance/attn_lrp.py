"""AttnLRP: relevance R = x * grad, with gradient rules that distribute the class logit.

Achtibat et al., ICML 2024, arXiv 2402.05602, in the form input x gradient: a product of two
activations gives half the gradient to each, so that in softmax attention dV counts 1/2 and dQ, dK 1/4;
LayerNorm's standard deviation is a constant; GELU and SiLU pass f(x)/x on in place of f'(x). One
forward and one backward pass with fused attention; biases and softmax absorb a part of the relevance.

The rules of functions are in :mod:`xattn.explainers.relevance.attn_lrp_functions`. A layer of
:mod:`xattn.attention` is one step, Y = A V, by a rule for the kind of its operator, see
:mod:`xattn.explainers.relevance.attn_lrp_functions`; where there is none, A is held constant, relevance
passes through the values, and the map's provenance says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from xattn.attention.record import answering_by, fused_layers
from xattn.explainers.base import Choose, Explainer, register_explainer
from xattn.explainers.gradients import class_gradients
from xattn.explainers.relevance.attention import patch_grid
from xattn.explainers.relevance.attn_lrp_functions import Rules


@register_explainer("attn_lrp", title="AttnLRP", networks=("vit",))
@dataclass(kw_only=True, eq=False, repr=False)
class AttnLrp(Explainer):
    """AttnLRP of a model with attention: softmax or any mechanism of :mod:`xattn.attention`.

    Args:
        at: "tokens", relevance of the patch embeddings, (h, w) of the patch grid; or "pixels", of
            the normalised image, (H, W). Summed over channels, with its sign.

    Raises:
        ValueError: a model without attention, or one that calls a function without a rule.
    """

    at: Literal["tokens", "pixels"] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone = self.backbone
        if self._reads_embeddings and not hasattr(backbone.model, "patch_embed"):
            raise ValueError(f"at='tokens': {backbone.name} has no patch_embed; give at='pixels'")
        with self._guard(), torch.enable_grad():
            size = backbone.preprocessing.input_size
            image = self._move(torch.zeros(1, backbone.mean.shape[1], *size, device="cpu"))
            rules = self._run(image)[2]
            self._check(rules)
        for note in rules.notes:
            self._note(note)

    @property
    def _reads_embeddings(self) -> bool:
        """Whether relevance is that of the patch embedding's output."""
        return self.at == "tokens"

    def _check(self, rules: Rules) -> None:
        """Raise a ``ValueError`` if the rules met nothing of what the method explains."""
        if not rules.attended:
            raise ValueError(
                f"backbone: {self.backbone.name} makes no call of softmax attention; attn_lrp "
                f"explains transformers, use 'gradcam'"
            )

    def _rules(self) -> Rules:
        return Rules(self.backbone.name)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits, x, _ = self._run(images)
            classes = self._chosen(choose, logits.detach())
            gradients = class_gradients(logits, x, classes)
            maps = [self._map(x.detach() * gradient, images) for (gradient,) in gradients]
        return logits.detach(), classes, torch.stack(maps, 1)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, Rules]:
        """Logits, the tensor to explain, and what the rules met on the way."""
        rules = self._rules()
        self.backbone.requires_grad_(False)  # weights are no activations; the guard puts it back
        x = self.backbone.normalize(images)
        if self.at == "pixels":
            x.requires_grad_()
            return self._logits(x, rules), x, rules
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
            logits = self._logits(x, rules)
        finally:
            handle.remove()
        return logits, embedded[0], rules

    def _logits(self, x: Tensor, rules: Rules) -> Tensor:
        with fused_layers(self.backbone.model), answering_by(rules), rules:
            return self.backbone.logits_normalized(x)

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
