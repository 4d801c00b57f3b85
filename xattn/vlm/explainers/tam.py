"""TAM, the token activation map: a word's logits at image tokens, minus the part due to earlier words.

Li et al., ICCV 2025, arXiv 2506.23270. For token c of the answer, and earlier tokens c_j of prompt and
answer

    a = max(W_c . h_i, 0)  at image tokens i                   a_j likewise, for c_j
    u_j = max(W_c . h_j, 0), 0 where c_j = c, of sum 1         h_j at position j of the prompt, or row q_j
    e = max(a - s b, 0),  b = sum_j u_j a_j,  s = <a, b> / <b, b>

e and the text's scores, max(W_c . h_j, 0), are scaled together to [0, 1]. Then each grid of image tokens is
filtered: the sorted values of a window are weighted by exp(-r^2 / (2 v^2)), where r is the rank, counted
from the middle, and v the window's standard deviation divided by its mean. The filter halves the values of
objects that cover only a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from xattn.runtime.option_checks import Condition
from xattn.vlm.explainers.base import Context, TokenExplainer, TokenScores, register_token_explainer
from xattn.vlm.explainers.logit_lens import hidden_states, word_logits

Odd = Annotated[int, Condition(lambda n: n >= 1 and n % 2 == 1, "an odd int, such as 3")]


@register_token_explainer(
    "tam",
    title="TAM",
    passes="1",
    source="arXiv 2506.23270",
    cases=({}, {"kernel": 1}, {"released": True}),
    kinds=("decoder",),
)
@dataclass(kw_only=True, eq=False)
class TAM(TokenExplainer):
    """The token activation map of each token of a word, averaged over the word's tokens.

    The method needs a model that recognises words at image tokens, as pretrained models do.

    Args:
        kernel: side of the filter's window, in tokens; 1 means no filter.
        released: follow the authors' code, which replaces the prompt's first token by the most probable
            one, and the answer's first token by the prompt's last; for the answer's first token, it shows
            the map of the prompt's first token.
    """

    kernel: Odd = 3
    released: bool = False

    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        hidden = hidden_states(context, self.name)
        special = set(context.vlm.tokenizer.all_special_ids)
        places = [p for p in context.text.tolist() if p < len(context.prompt_ids)]
        prompt = [p for p in places if int(context.sequence[p]) not in special]
        rows = torch.tensor([*prompt, *context.rows.tolist()])
        ids = torch.cat([context.sequence[prompt], context.ids])
        tokens = ids.clone()
        if self.released and prompt:
            head = context.vlm.model.get_output_embeddings()
            with torch.no_grad():
                ids[0] = head(hidden[prompt[0]]).argmax()
            ids[len(prompt)] = context.sequence[prompt[-1]]
        activations = word_logits(context, hidden[context.image], ids).clamp_min(0)  # (K, n)
        said = word_logits(context, hidden[rows], ids).clamp_min(0)  # (K, K): of id k at row j
        at = {place: i for i, place in enumerate(context.text.tolist())}
        own = torch.tensor([at[p] for p in prompt], dtype=torch.long)
        answer = [at[len(context.prompt_ids) + t] for t in range(len(context.ids))]
        columns = torch.cat([own, torch.tensor(answer)])
        image = torch.zeros(len(context.ids), len(context.image))
        text = torch.zeros(len(context.ids), len(context.text))
        for t in range(len(context.ids)):
            before = (
                len(prompt) + t
            )  # earlier tokens, with whose scores those of the image are scaled
            k = 0 if self.released and t == 0 else before
            weights = said[k, :k] * (tokens[:k] != tokens[k])
            e = unexplained_part(activations[k], activations[:k], weights)
            both = torch.cat([e, said[k, :before]])
            both = (both - both.min()) / (both.max() - both.min()).clamp_min(1e-12)
            image[t] = self._filtered(context, both[: len(e)])
            text[t, columns[:before]] = both[len(e) :]
        return TokenScores(context.word_mean(image), context.word_mean(text))

    def _filtered(self, context: Context, scores: Tensor) -> Tensor:
        made = scores.clone()
        for grid in context.grids:
            made[grid] = torch.from_numpy(rank_filter(scores[grid].numpy(), self.kernel))
        return made


def unexplained_part(a: Tensor, earlier: Tensor, weights: Tensor) -> Tensor:
    """e (n,) = max(a - s b, 0), where b is the mean of ``earlier`` (k, n), weighted by ``weights`` (k,),
    and s is the best scale."""
    b = weights / (weights.sum() + 1e-8) @ earlier
    square = float(b @ b)
    return (a - (float(a @ b) / square if square else 0.0) * b).clamp_min(0)


def rank_filter(values: NDArray[np.float32], kernel: int) -> NDArray[np.float32]:
    """TAM's filter of a grid (h, w), with reflected edges; windows with mean 0 give 0.

    >>> grid = np.zeros((5, 5), np.float32)
    >>> grid[1:3, 1:3] = 1
    >>> [round(float(rank_filter(grid, 3)[i]), 4) for i in ((1, 1), (1, 3), (3, 3))]
    [0.3216, 0.0819, 0.0583]
    """
    padded = np.pad(values.astype(np.float64), kernel // 2, mode="reflect")
    windows = np.sort(sliding_window_view(padded, (kernel, kernel)).reshape(*values.shape, -1), -1)
    rank = np.arange(kernel**2) - kernel**2 // 2
    mean, spread = windows.mean(-1, keepdims=True), windows.std(-1, keepdims=True)
    v = spread / np.where(mean > 0, mean, 1)
    weights = np.exp(-(rank**2) / (2 * np.maximum(v, 1e-3) ** 2))  # below: only the middle
    found = (windows * weights).sum(-1) / weights.sum(-1)
    return np.where(mean[..., 0] > 0, found, 0).astype(np.float32)
