"""AttnLRP: relevance R = x * grad, with gradient rules that distribute the class logit.

Achtibat et al., ICML 2024, arXiv 2402.05602, in the form input x gradient. Each of two multiplied
activations gets half the gradient. In softmax attention, dV therefore has the factor 1/2, and dQ and dK
have 1/4. LayerNorm's standard deviation counts as a constant. GELU and SiLU pass on f(x)/x instead of
f'(x). The method takes one forward and one backward pass with fused attention. Biases and softmax absorb
part of the relevance.

A layer of :mod:`xattn.attention` is a single step, Y = A V, with a rule for its type of operator, see
:mod:`xattn.explainers.relevance.operators`. If there is no rule, A is held constant and relevance passes
only through the values, which is recorded in the map's provenance.
"""

from __future__ import annotations

from dataclasses import dataclass

from xattn.explainers.base import register_explainer
from xattn.explainers.relevance.engine import Engine
from xattn.explainers.relevance.linear import gamma_rule
from xattn.explainers.relevance.lrp import TOKENS, RelevanceExplainer
from xattn.explainers.relevance.rules import Composite
from xattn.runtime.option_checks import NotNegative


@register_explainer(
    "attn_lrp",
    title="AttnLRP",
    networks=("vit",),
    cases=(
        {},
        {"at": "pixels"},
        {"at": "pixels", "gamma": 0.25, "linear_gamma": 0.05, "residual": 1.0},
    ),
)
@dataclass(kw_only=True, eq=False, repr=False)
class AttnLrp(RelevanceExplainer):
    """AttnLRP of a model with attention: softmax or any mechanism of :mod:`xattn.attention`.

    Args:
        at: as in the base class, by default "tokens".
        gamma: gamma of the gamma rule for convolutions, see
            :class:`~xattn.explainers.relevance.lrp.Lrp`; 0 turns the rule off.
        linear_gamma: the same for other linear layers.
        residual: as in :class:`~xattn.explainers.relevance.lrp.Lrp`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("attn_lrp", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    at: str = TOKENS
    gamma: NotNegative = 0.0
    linear_gamma: NotNegative = 0.0
    residual: NotNegative = 0.0

    @property
    def _composite(self) -> Composite:
        convolution, dense = (gamma_rule(g) if g else None for g in (self.gamma, self.linear_gamma))
        return Composite(convolution, dense, attention="shared", residual=self.residual)

    def _check(self, engine: Engine) -> None:
        if not engine.attended:
            self._note(
                "no call to softmax attention, so the map equals libragrad's input x gradient"
            )
