"""Layer-wise relevance propagation to the image features: s_i = f_i . G_i, with G computed by the rules of
LRP.

    attn_lrp  Achtibat et al., ICML 2024, arXiv 2402.05602: through values, softmax and gates
    cp_lrp    Ali et al., ICML 2022, arXiv 2202.07304: attention weights and gates are constant

The model's pass follows :mod:`xattn.explainers.relevance.rules` up to its logits z; the relevance of a
word's score starts as z_c ds/dz_c. Text tokens get the relevance of their embeddings. With cp_lrp, the
relevance of image and text sums to the logit, apart from the part that biases absorb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from xattn.explainers.relevance.engine import apply_rules
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer

COST = "1 + 1 backward a word"


@register_token_explainer("attn_lrp", title="AttnLRP", passes=COST, source="arXiv 2402.05602")
@dataclass(kw_only=True, eq=False)
class AttnLRP(TokenExplainer):
    """Gradient x input by the rules of AttnLRP; each factor of a product of activations gets half of the
    relevance."""

    composite: ClassVar[str] = "attn_lrp"

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        model, of_text = context.vlm.model, context.vlm.kind != "encoder"
        leaves = [context.features.detach().clone().requires_grad_()]

        def keep(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not of_text or len(leaves) > 1:
                return None
            leaves.append(output.detach().clone().requires_grad_())
            return leaves[1].clone()

        handles = [model.get_input_embeddings().register_forward_hook(keep)]
        handles += [
            m.register_forward_hook(lambda m, args, y: y.detach()) for m in self._held(model)
        ]
        try:
            with torch.enable_grad(), apply_rules(model, self.composite):
                logits = context.logits(leaves[0][None])
        finally:
            for handle in handles:
                handle.remove()
        found = []
        for score in context.scores_of(logits)[0]:
            grads = torch.autograd.grad(score, leaves, retain_graph=True)
            found.append([(x * g).sum(-1).detach() for x, g in zip(leaves, grads, strict=True)])
        image = torch.stack([own[0] for own in found])
        if not of_text:
            return TokenScores(image)
        return TokenScores(image, torch.stack([own[1][0] for own in found])[:, context.text])

    def _held(self, model: Any) -> list[Any]:
        """Modules whose outputs are constants."""
        return []


@register_token_explainer("cp_lrp", title="CP-LRP", passes=COST, source="arXiv 2202.07304")
@dataclass(kw_only=True, eq=False)
class CPLRP(AttnLRP):
    """Gradient x input by the rules of CP-LRP, with attention weights and gates as constants."""

    composite = "cp_lrp"

    def _held(self, model: Any) -> list[Any]:
        return [
            m.act_fn for m in model.modules() if hasattr(m, "gate_proj") and hasattr(m, "act_fn")
        ]
