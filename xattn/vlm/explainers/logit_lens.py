"""Logit lens at image tokens: s_i = W_c . norm(h^l_i), the logit of a word, read from a token of layer
l.

nostalgebraist, "interpreting GPT: the logit lens", 2020. In a causal model whose prompt starts with the
image, s does not depend on the question: it shows what a token could mean, not which tokens were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer
from xattn.vlm.explainers.layers import normalise_numbers, unsupported_error

NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")  # names of a decoder's last norm


@register_token_explainer(
    "logit_lens",
    title="Logit lens",
    passes="1",
    cases=({}, {"layer": 0}, {"layer": -2}),
    kinds=("decoder",),
)
@dataclass(kw_only=True, eq=False)
class LogitLens(TokenExplainer):
    """The logit of each token of a word at every image token, averaged over the word's tokens.

    Text tokens after the word get the score 0.

    Args:
        layer: number of the layer whose output is read, negative from the end; by default the last.
    """

    layer: int = -1

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        hidden = hidden_states(context, self.name, self.layer)
        found = word_logits(context, hidden, context.ids)  # (T, P + T)
        places = torch.arange(len(context.sequence))
        found = torch.where(places <= context.rows.cpu()[:, None], found, 0)
        image = word_logits(context, hidden[context.image], context.ids)
        return TokenScores(context.word_mean(image), context.word_mean(found[:, context.text]))


def hidden_states(context: Context, name: str, layer: int = -1) -> Tensor:
    """The LM head's input at each position, (P + T, D); for an earlier ``layer``, the input that the LM
    head would get if that layer were the last one.

    Raises:
        ValueError: the image tokens are not in a decoder's prompt, or there is no such layer.
    """
    vlm = context.vlm
    if vlm.kind != "decoder":
        needs = "needs image tokens that the LM head can read"
        raise unsupported_error(context, name, needs, "attends to them from elsewhere")
    states = context.hidden_states
    count = len(states) - 1  # the first are embeddings
    (number,) = normalise_numbers("layer", [layer], count)
    if number == count - 1:  # these have already passed the last norm
        return states[-1]
    decoder = vlm.model.get_decoder()
    modules = {name.rpartition(".")[2]: module for name, module in decoder.named_modules()}
    norm = next((getattr(decoder, n) for n in NORMS if hasattr(decoder, n)), None)
    norm = norm or next((modules[n] for n in NORMS[1:] if n in modules), None)
    if norm is None:
        raise ValueError(
            f"layer: got {layer}, but a {type(decoder).__name__} has no last norm; give -1"
        )
    with torch.no_grad():
        return norm(states[number + 1])  # type: ignore[no-any-return]


@torch.no_grad()
def word_logits(context: Context, hidden: Tensor, ids: Tensor | Sequence[int]) -> Tensor:
    """Logits (K, N) of K token ids at hidden states (N, D), in float32 on the CPU."""
    head = context.vlm.model.get_output_embeddings()
    index = torch.as_tensor(ids, device=head.weight.device)
    bias = getattr(head, "bias", None)
    found = F.linear(hidden, head.weight[index], None if bias is None else bias[index])
    return found.T.float().cpu()
