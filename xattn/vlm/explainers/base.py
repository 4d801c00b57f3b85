"""Base of token explainers: for every asked word of an answer, a score of each image and text token.

A token explainer is one file here, or in any other package, with a class that
:func:`register_token_explainer` names. This is a whole one, gradient x input at the image features:

    @register_token_explainer("mine", title="My gradient x input")
    @dataclass(kw_only=True, eq=False)
    class Mine(TokenExplainer):
        \"""Gradient times the image features, less the mean image token.\"""

        def explain(self, context, seen=None):
            f = context.features                                        # (n, D)
            gradients = context.gradients()                             # (W, n, D)
            return TokenScores((gradients * (f - context.fill)).sum(2))

Its fields are its options, checked by their annotations (:mod:`xattn.runtime.option_checks`). It gets a
:class:`Context`: one conversation, prompt and answer in one teacher-forced pass through the frozen model.

    n   image tokens of all photos together, in order       M   text tokens: prompt without images, answer
    T   tokens of the answer, y_0 .. y_{T-1}                W   asked words
    q_t row of the logits (and of attention) that produced y_t: ``context.rows[t]``, of the decoder

Image features f (n, D) are all that enters of the image, also where a model adds some in deeper layers
(Qwen3-VL: they are further columns of the row). What hides token i puts ``context.fill``, the mean image
token, in the place of f_i; never zeros in an attention mask.

What it may ask, cheapest first:

    context.words, .asked             words (text, span, tokens), and the numbers of those asked for
    context.image, .text              places of image and text tokens in ``context.sequence``
    context.layouts                   where image tokens lie on each photo
    context.scores(f)     (B, W)      score of every asked word for B other f; one pass each
    context.hidden(masks) (M', W)     the same where masks (M', n) hide tokens, or pixels, in batches
    context.gradients(f)  (W, n, D)   gradients of each word's score: a pass, a backward a word
    context.logits(f)     (B, T, V)   of all tokens of the answer
    context.hidden_states (P + T, w)  what each layer is given, and the LM head
    context.output(f, output_attentions=True)       what the model itself returns
    context.features_of(photos) (n, D)              of changed photos: processor and image tower again
    context.word_mean(x)  (T, ...) -> (W, ...)      the mean over each word's tokens

Scores are of ``score=`` and ``instead=`` as the user asked, so an explainer need not know them. Methods
that read attention take ``read_rows(context.vlm.decoder, ...)`` around ``context.output()``; one that can
do so while the answer is generated says ``watches = True`` and has :meth:`TokenExplainer.watch`.

Whatever runs inside, the model comes out as it went in; random numbers come from ``self.seed``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.explainers.base import preserve_state
from xattn.registry import Registry, adopting, with_name
from xattn.runtime.locking import alone
from xattn.runtime.memory import ForwardBatches
from xattn.runtime.option_checks import check_fields
from xattn.vlm.layout import Layout
from xattn.vlm.model import VLM, Entered, Forced
from xattn.vlm.words import PhotoError, Word

Score = Literal["log_prob", "logit"]
Where = Literal["token", "pixel"]  # what masks hide


class TokenScores(NamedTuple):
    """Scores of image tokens (W, n), and of text tokens (W, M) where the method has them from the same
    quantity, so that they can be compared; those of tokens that come after the word are 0."""

    image: Tensor
    text: Tensor | None = None


@dataclass(eq=False)
class Context:
    """One conversation in one pass, see :mod:`xattn.vlm.explainers.base`.

    Args:
        prompt_ids: (P,) of the prompt, on the CPU. ``ids``: (T,) of the answer, on the CPU.
        photos: the photos of the conversation, RGB, and ``prompt`` what was asked, for :meth:`features_of`.
        asked: numbers of the words to explain.
        score: "log_prob", the sum over the word's tokens of log p, or "logit".
        instead: by number of a word the token id of another one: the score is then log p(first token of
            the word) - log p(that token), or the difference of logits.
        batches: how many sequences are in a pass, halved where memory runs out.
    """

    vlm: VLM
    photos: Sequence[Image.Image]
    prompt: Any
    prompt_ids: Tensor
    ids: Tensor
    words: Sequence[Word]
    asked: Sequence[int]
    forced: Forced
    entered: Entered
    layouts: Sequence[Layout]
    score: Score = "log_prob"
    instead: Mapping[int, int] = field(default_factory=dict)
    batches: ForwardBatches = field(default_factory=lambda: ForwardBatches(8))

    # ------------------------------------------------------------------ where things are

    @property
    def features(self) -> Tensor:
        """f (n, D), detached."""
        return self.entered.features

    @property
    def fill(self) -> Tensor:
        """The mean image token (D,)."""
        return self.features.mean(0)

    @property
    def rows(self) -> Tensor:
        """(T,): q_t, the row of the decoder that produced token t."""
        return self.forced.rows

    @property
    def sequence(self) -> Tensor:
        """(P + T,): ids of prompt and answer. The prompt of an encoder-decoder is the encoder's."""
        return torch.cat([self.prompt_ids, self.ids])

    @cached_property
    def image(self) -> Tensor:
        """(n,): places of the image tokens in :attr:`sequence`; (0,) of a model that cross-attends to them:
        there the keys of cross-attention are the n tokens themselves."""
        return self.vlm.image_places(self.prompt_ids)

    @cached_property
    def text(self) -> Tensor:
        """(M,): places of all other tokens in :attr:`sequence`."""
        other = torch.ones(len(self.sequence), dtype=torch.bool)
        other[self.image] = False
        return other.nonzero()[:, 0]

    def word_mean(self, of_tokens: Tensor) -> Tensor:
        """The mean over each asked word's tokens: (T, ...) -> (W, ...)."""
        return torch.stack([of_tokens[list(self.words[i].tokens)].mean(0) for i in self.asked])

    # ------------------------------------------------------------------ passes

    def output(self, features: Tensor | None = None, **asked: Any) -> Any:
        """What the model returns for B others in the place of its image features, (B, n, D), by default
        its own; ``asked`` are further arguments of its forward. ``logits`` are of the whole sequence."""
        return self.vlm.output(self.forced, self.entered, features, **asked)

    @cached_property
    def hidden_states(self) -> tuple[Tensor, ...]:
        """(P + T, width) of each of L + 1: what a layer is given, and what the LM head is."""
        with torch.no_grad():
            out = self.output(output_hidden_states=True, **self.vlm.few_logits(self.forced))
        states = getattr(out, "hidden_states", None) or out.language_model_outputs.hidden_states
        return tuple(x[0] for x in states)

    @cached_property
    def before_projector(self) -> Tensor | None:
        """The length of each vector of the image tower that a projector is given, where there is one."""
        named = self.vlm.model.named_modules()
        found = [m for name, m in named if name.endswith("multi_modal_projector")]
        if not found:
            return None
        kept: list[Tensor] = []
        handle = found[0].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
        try:
            self.vlm.entered(self.vlm.inputs(self.photos, self.prompt))
        finally:
            handle.remove()
        return kept[0].flatten(0, -2).float().norm(dim=1) if len(kept) == 1 else None

    def logits(self, features: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) that produce each token of the answer, float32; see :meth:`output`."""
        return self.vlm.logits(self.forced, self.entered, features)

    def log_probs(self, features: Tensor | None = None) -> Tensor:
        """log p (B, T) of each token of the answer."""
        logits = self.logits(features)
        return self._of_answer(logits) - logits.logsumexp(2)

    def scores(self, features: Tensor | None = None) -> Tensor:
        """The score (B, W) of every asked word; gradients flow to ``features`` (B, n, D)."""
        return self.scores_of(self.logits(features))

    def scores_of(self, logits: Tensor) -> Tensor:
        """The score (B, W) of every asked word from logits (B, T, V)."""
        own, found = self._of_answer(logits), []
        values = own if self.score == "logit" else own - logits.logsumexp(2)
        for i in self.asked:
            tokens = list(self.words[i].tokens)
            if i in self.instead:
                t = tokens[0]
                found.append(own[:, t] - logits[:, t, self.instead[i]])
            else:
                found.append(values[:, tokens].sum(1))
        return torch.stack(found, 1)

    def _of_answer(self, values: Tensor) -> Tensor:
        """(B, T, V) -> (B, T), at the tokens of the answer."""
        ids = self.ids.to(values.device)[None, :, None].expand(len(values), -1, 1)
        return values.gather(2, ids)[:, :, 0]

    def hidden(self, masks: Tensor, where: Where = "token") -> Tensor:
        """Scores (M', W) where masks (M', n) hide the tokens that are True in them: they are the mean image
        token, or ("pixel") what they cover has the mean colour of its photo, and the image tower runs
        again.

        Raises:
            ValueError: pixels, and no token has a place.
        """
        f, fill = self.features, self.fill
        if where == "pixel" and not self.grids:
            raise ValueError(
                f"where: got 'pixel', and image tokens of a {type(self.vlm.model).__name__} have no place; "
                f"give 'token'"
            )

        def scored(part: Tensor) -> Tensor:
            if where == "token":
                return self.scores(torch.where(part.to(f.device)[:, :, None], fill, f[None]))
            return self.scores(torch.stack([self.features_of(self._covered(m)) for m in part]))

        with torch.no_grad():
            return torch.cat(self.batches.run(scored, masks))

    @cached_property
    def grids(self) -> list[Tensor]:
        """Numbers (h', w') of the image tokens that lie side by side, of each view of each photo."""
        return [x.first + torch.from_numpy(grid) for x in self.layouts for grid in x.grids]

    @property
    def frames_a_map(self) -> int:
        """How many of the photos, which are frames of a clip, a layout is of; of photos 1."""
        return -(-len(self.photos) // len(self.layouts))

    def _covered(self, mask: Tensor) -> list[Image.Image]:
        """The photos, in their mean colour where most tokens of a cell are True in ``mask`` (n,)."""
        both = torch.stack([mask, torch.ones_like(mask)]).float()
        found = [np.array(photo) for photo in self.photos]
        for layout in self.layouts:
            own, whole = layout.maps(both)
            top, left, bottom, right = layout.view.photo_box
            rows, columns = (
                np.linspace(start, end, count + 1).round().astype(int)
                for start, end, count in zip((top, left), (bottom, right), own.shape, strict=True)
            )
            cells = np.repeat(own > whole / 2, np.diff(rows), 0).repeat(np.diff(columns), 1)
            for pixels in found[layout.number : layout.number + self.frames_a_map]:
                seen = pixels[rows[0] : rows[-1], columns[0] : columns[-1]]
                seen[cells] = pixels.mean((0, 1)).round()
        return [Image.fromarray(pixels) for pixels in found]

    def gradients(
        self, features: Tensor | None = None, of: Callable[[Tensor], Tensor] = lambda g: g
    ) -> Tensor:
        """Gradients (W, n, D) of each asked word's score with respect to the image features, at those of
        the photo or at ``features`` (n, D): one pass, and a backward a word; or what ``of`` makes of each
        (n, D), the only thing kept."""
        at = (self.features if features is None else features).detach().clone().requires_grad_()
        with torch.enable_grad():
            scores = self.scores(at[None])[0]
            last = len(scores) - 1
            found = [
                of(torch.autograd.grad(s, at, retain_graph=i < last)[0])
                for i, s in enumerate(scores)
            ]
        return torch.stack(found)

    def features_of(self, photos: Sequence[Image.Image]) -> Tensor:
        """f (n, D) of other photos of the same sizes, such as with hidden parts.

        Raises:
            ValueError: they have another number of image tokens.
        """
        found = self.vlm.entered(self.vlm.inputs(photos, self.prompt)).features
        if found.shape != self.features.shape:
            raise PhotoError(
                f"photos: {len(found)} image tokens instead of {len(self.features)}; the processor "
                f"made other tiles of them"
            )
        return found


@dataclass(eq=False)
class TokenExplainer(ABC):
    """One way to explain the words of an answer; see :mod:`xattn.vlm.explainers.base`.

    Args:
        seed: for those that draw random numbers; results depend on (seed, photo, words) alone.

    Class attributes: ``name``; ``watches``, whether it can read what it needs while the answer is
    generated.
    """

    name: ClassVar[str]
    watches: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def watch(
        self, vlm: VLM, prompt_ids: Tensor, rows: Sequence[int] | None = None
    ) -> AbstractContextManager[Any]:
        """Around the generation of an answer to (P,) ids, or, where ``rows`` of the decoder are named, the
        one pass over prompt and answer: what it yields is given to :meth:`explain` as ``seen``; None: the
        explainer needs a pass of its own."""
        return nullcontext()

    @abstractmethod
    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        """The scores of every asked word."""

    def notes(self, context: Context) -> list[str]:
        """What should be said of these maps beside them, such as how many tokens were sinks."""
        return []


@contextmanager
def watching(
    methods: Sequence[TokenExplainer],
    vlm: VLM,
    prompt_ids: Tensor,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """What each of ``methods`` that watches sees inside, by its name; see :meth:`TokenExplainer.watch`."""
    with ExitStack() as stack:
        yield {
            m.name: stack.enter_context(m.watch(vlm, prompt_ids, rows))
            for m in methods
            if m.watches
        }


@contextmanager
def guarded(vlm: VLM) -> Iterator[None]:
    """Inside, this thread has the model alone; afterwards it is as it was, without gradients."""
    with alone(vlm.model), preserve_state(vlm.model):
        for parameter in vlm.model.parameters():
            parameter.requires_grad_(False)
        yield


# ---------------------------------------------------------------------- registry


@dataclass(frozen=True)
class TokenExplainerEntry:
    """What the registry knows about a token explainer."""

    name: str
    title: str = ""
    """What it is called in running text; the name by default."""
    passes: str = ""
    """What it costs beyond generation, such as "1 + 1 backward a word"."""
    source: str = ""
    """The paper."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options that the tests of every explainer try."""
    kinds: tuple[str, ...] = ("decoder", "encoder", "cross")
    """The kinds of models that it explains, see :mod:`xattn.vlm.model`."""
    needs: str = ""
    """What some models of these kinds lack: "calls" of attention that can be recorded, or "places"."""


def register_token_explainer(
    name: str, **about: Any
) -> Callable[[type[TokenExplainer]], type[TokenExplainer]]:
    """Class decorator: make a token explainer known under ``name``.

    Args:
        about: further fields of :class:`TokenExplainerEntry`.
    """
    return TOKEN_EXPLAINERS.register(TokenExplainerEntry(name, **about))


TOKEN_EXPLAINERS: Registry[TokenExplainer, TokenExplainerEntry] = Registry(
    "xattn.token_explainers",
    base=TokenExplainer,
    homes=("xattn.vlm.explainers",),
    argument="explainer",
    noun="token explainer",
    adopt=adopting(TokenExplainer, register_token_explainer),
    mark=with_name,
)
list_token_explainers = TOKEN_EXPLAINERS.names


def create_token_explainer(name: str, seed: int = 0, **options: Any) -> TokenExplainer:
    """A token explainer by name, with options of its class.

    Raises:
        ValueError: an unknown name (with near matches) or option.
    """
    return TOKEN_EXPLAINERS.create(name, seed=seed, **options)
