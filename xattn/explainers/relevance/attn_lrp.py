"""AttnLRP: relevance R = x * grad, with gradient rules that distribute the class logit.

Achtibat et al., ICML 2024, arXiv 2402.05602, in the form input x gradient: a product of two
activations gives half the gradient to each, so that in softmax attention dV counts 1/2 and dQ, dK 1/4;
LayerNorm's standard deviation is a constant; GELU and SiLU pass f(x)/x on in place of f'(x). One
forward and one backward pass with fused attention; biases and softmax absorb a part of the relevance.

A layer of :mod:`xattn.attention` is one step, Y = A V, by a rule for the kind of its operator, see
:mod:`xattn.explainers.relevance.operators`; where there is none, A is held constant, relevance passes
through the values, and the map's provenance says so.
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
        at: as in the base, by default "tokens".
        gamma: the gamma rule of convolutions, see :class:`~xattn.explainers.relevance.lrp.Lrp`; 0 is none.
        linear_gamma: the same of other linear layers.
        residual: as there.
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
            self._note("no call of softmax attention: as libragrad's input x gradient")
