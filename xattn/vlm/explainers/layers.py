"""Code shared by explainers that read the attention of every layer: its operators, in the order of the
pass.

decoder     self-attention over prompt, image tokens and answer
encoder     self-attention over prompt and image tokens, which the decoder's cross-attention reads
cross       self-attention over text; the keys of cross-attention are the image tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.record import Call, record
from xattn.kernels.softmax.reference import widen
from xattn.vlm.explainers.base import TOKEN_EXPLAINERS, Context, TokenScores
from xattn.vlm.model import VLM
from xattn.vlm.reading import QueryRows, read_rows


class Layer(NamedTuple):
    """An attention call: in an encoder, or in a decoder, where it attends to the decoder's tokens or to
    other keys. ``number`` counts the layers of the decoder, or of the encoder, from 0."""

    kind: Literal["encoder", "self", "cross"]
    number: int
    call: Call


class RecordedPass(NamedTuple):
    """The result of a pass: the scores (W,) of the requested words, with or without a graph, and the
    layers in order."""

    scores: Tensor
    layers: list[Layer]

    def gradients(self) -> Iterator[list[Tensor]]:
        """For each word, gradients of its score with respect to the output of each attention layer."""
        outputs = [layer.call.output for layer in self.layers]
        for i, score in enumerate(self.scores):
            yield list(
                torch.autograd.grad(
                    score,
                    outputs,
                    retain_graph=i < len(self.scores) - 1,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )


def record_pass(context: Context, name: str, graph: bool = False) -> RecordedPass:
    """One pass with recorded attention, for the explainer ``name``.

    Raises:
        ValueError: the model does not compute attention with a function that can be recorded.
    """
    f = context.features[None].clone().requires_grad_(graph)
    with torch.set_grad_enabled(graph), _text_in_graph(context.vlm.model, graph):
        with record(context.vlm.model) as calls:
            scores = context.scores(f)[0]
    text = context.vlm.model.config.get_text_config()
    if not calls:
        raise unsupported_error(
            context, name, "reads calls of scaled_dot_product_attention", "makes none"
        )
    if context.vlm.kind == "encoder":
        before = int(text.encoder_layers)
        layers = [Layer("encoder", i, call) for i, call in enumerate(calls[:before])]
        for i, call in enumerate(calls[before:]):
            layers.append(Layer("cross" if i % 2 else "self", i // 2, call))
        return RecordedPass(scores, layers)
    crossing = getattr(text, "cross_attention_layers", None) or ()
    return RecordedPass(
        scores,
        [Layer("cross" if i in crossing else "self", i, call) for i, call in enumerate(calls)],
    )


def unsupported_error(context: Context, name: str, needs: str, lacks: str) -> ValueError:
    """The error for an explainer that ``needs`` something that this model ``lacks``; it lists
    explainers that do not need it."""
    every = [TOKEN_EXPLAINERS.entry(n) for n in TOKEN_EXPLAINERS.names() if n != name]
    own = TOKEN_EXPLAINERS.entry(name).needs
    able = [e.name for e in every if context.vlm.kind in e.kinds and not (own and e.needs == own)]
    return ValueError(
        f"explainer: {name} {needs}, but a {type(context.vlm.model).__name__} {lacks}; give one of "
        f"{', '.join(able)}"
    )


def normalise_numbers(argument: str, numbers: Sequence[int], count: int) -> list[int]:
    """``numbers`` of layers or heads, counted from 0.

    Raises:
        ValueError: a number is out of range.
    """
    for i in numbers:
        if not -count <= i < count:
            raise ValueError(f"{argument}: got {i}; the model has {count}, numbered from 0")
    return [i % count for i in numbers]


@contextmanager
def _text_in_graph(model: nn.Module, graph: bool) -> Iterator[None]:
    """Context manager in which text embeddings require gradients, so that layers that see no image have
    gradients, too."""
    weights = [m.weight for m in model.modules() if graph and isinstance(m, nn.Embedding)]
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_()
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def start_rows(context: Context, attended: RecordedPass) -> Tensor:
    """(W, N): for each requested word, 1 at the decoder's rows that produced its tokens, else 0."""
    queries = next(x.call.operator.shape[2] for x in attended.layers if x.kind == "self")
    found = widen(context.features).new_zeros(len(context.asked), queries)
    for row, i in zip(found, context.asked, strict=True):
        row[context.rows[list(context.words[i].tokens)]] = 1
    return found


def token_scores(context: Context, own: Tensor, keys: Tensor | None) -> TokenScores:
    """Scores of tokens, from scores (W, N) of the decoder's positions and scores (W, S) of the
    positions that its cross-attention reads."""
    own = own.cpu()
    if keys is None:
        return TokenScores(own[:, context.image], own[:, context.text])
    keys = keys.cpu()
    if context.vlm.kind == "cross":
        return TokenScores(keys, own)
    # An encoder-decoder's answer starts with a token that is in no text, and its last token is not read.
    prompt = context.text[context.text < keys.shape[1]]
    text = torch.cat([keys[:, prompt], own[:, 1:], own.new_zeros(len(own), 1)], 1)
    return TokenScores(keys[:, context.image], text)


class HeadRows:
    """The rows of every layer and head whose keys include image tokens, by query position, for the
    decoder's self-attention or its cross-attention. Stored on the CPU, in float16."""

    def __init__(self, vlm: VLM) -> None:
        self._cross = vlm.kind != "decoder"
        self._step: dict[int, dict[int, Tensor]] = {}  # by layer, on the model's device
        self._kept: dict[int, Tensor] = {}

    @classmethod
    @contextmanager
    def watched(cls, vlm: VLM, rows: Sequence[int] | None = None) -> Iterator[HeadRows]:
        """Context manager that keeps ``rows`` of each pass or, by default, the last row of each step."""
        kept = cls(vlm)
        with read_rows(vlm.decoder, kept.add, rows):
            yield kept

    def add(self, rows: QueryRows) -> None:
        """Keep the rows of one attention call, as :func:`~xattn.vlm.reading.read_rows` reports them."""
        beams = len(rows.weights) > 1  # it is not yet known which becomes the answer
        if rows.cross != self._cross or rows.layer is None or beams:
            return
        if not self._step.keys() >= set(rows.queries):
            self._settle()
        weights = rows.over(rows.offset + rows.weights.shape[-1])[0].half()
        for i, place in enumerate(rows.queries):
            self._step.setdefault(place, {})[rows.layer] = weights[:, i]

    def _settle(self) -> None:
        """Copy the last step to the CPU, all layers at once."""
        for place, layers in self._step.items():
            self._kept[place] = torch.cat([layers[i] for i in sorted(layers)]).cpu()
        self._step = {}

    def of_words(
        self,
        context: Context,
        change: Callable[[QueryRows], QueryRows] = lambda rows: rows,
        image: bool = False,
    ) -> Iterator[Tensor]:
        """Rows (L H, S) of each requested word, averaged over its tokens, in float32. S is the number of
        keys: the tokens of the whole sequence, those of the prompt (for an encoder-decoder), or the image
        tokens (for a model that cross-attends to them); with ``image``, always the image tokens. If any of
        these rows were not kept, all of them are read in another pass and changed by ``change``."""
        words = [context.rows[list(context.words[i].tokens)].tolist() for i in context.asked]
        places = {place for word in words for place in word}
        if not places <= self._kept.keys() | self._step.keys():
            decoder = context.vlm.decoder
            with read_rows(decoder, lambda rows: self.add(change(rows)), sorted(places)):
                with torch.no_grad():
                    context.logits()
        self._settle()
        ends = {
            "decoder": context.sequence,
            "encoder": context.prompt_ids,
            "cross": context.features,
        }
        length = len(ends[context.vlm.kind])
        for word in words:
            rows = [F.pad(self._kept[p], (0, length - self._kept[p].shape[1])) for p in word]
            own = [self.of_image(context, r) if image else r for r in rows]
            yield torch.stack([r.float() for r in own]).mean(0)

    @staticmethod
    def of_image(context: Context, rows: Tensor) -> Tensor:
        """The entries (..., n) of rows (..., S) at the image tokens."""
        return rows if context.vlm.kind == "cross" else rows[..., context.image]
