"""Conversations with the tiny models of :mod:`vlm_models`, as token explainers get them."""

from functools import cache

import torch
import vlm_models

from xattn.vlm.explainers.base import Context, create_token_explainer, exclusive_use
from xattn.vlm.layout import locate
from xattn.vlm.loading import load_vlm
from xattn.vlm.words import words_of

PROMPT = "what is on the table ?"
ANSWER = "a red fork and"  # "red" is of one token, as all words are


@cache
def loaded(kind, dtype=torch.float32):
    return load_vlm(vlm_models.network(kind), vlm_models.processor(kind), dtype=dtype)


def conversation(
    kind="llava", photos=1, answer=ANSWER, asked=None, vlm=None, prompt=PROMPT, **options
):
    """What an explainer gets of ``answer``, by default of all its words."""
    vlm = vlm or loaded(kind)
    shown = [vlm_models.photo(seed) for seed in range(photos)]
    inputs = vlm.inputs(shown, prompt)
    ids = torch.tensor(vlm.tokenizer.encode(answer, add_special_tokens=False))
    _, words = words_of(vlm.tokenizer, ids.tolist())
    entered, forced = vlm.entered(inputs), vlm.forced(inputs, ids)
    prompt_ids = (
        inputs["input_ids"] if vlm.kind == "encoder" else forced.inputs["input_ids"][:, : -len(ids)]
    )
    return Context(
        vlm=vlm, photos=shown, prompt=prompt, prompt_ids=prompt_ids[0].cpu(), ids=ids,
        words=words, asked=list(range(len(words))) if asked is None else asked,
        forced=forced, entered=entered,
        layouts=locate(vlm, shown, prompt, inputs, len(entered.features)), **options,
    )  # fmt: skip


def explained(name, context, **options):
    """Scores of the token explainer ``name``."""
    with exclusive_use(context.vlm):
        return create_token_explainer(name, **options).explain(context)


def of_sequence(context, found):
    """Image and text scores in the order of the sequence, (W, P + T)."""
    whole = found.image.new_zeros(len(found.image), len(context.sequence))
    whole[:, context.image], whole[:, context.text] = found
    return whole


class Linear:
    """Makes a context's scores linear in its features, z_w = <weights_w, f> + constant_w."""

    def __init__(self, context, words=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        f = context.features
        self.weights = torch.randn(words, *f.shape, generator=generator, dtype=f.dtype)
        self.constant = torch.randn(words, generator=generator, dtype=f.dtype)
        context.scores = self.scores

    def scores(self, features):
        return torch.einsum("bnd,wnd->bw", features, self.weights) + self.constant
