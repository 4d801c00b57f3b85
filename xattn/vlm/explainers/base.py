"""Base class for token explainers, which score each image and text token for every requested word.

A token explainer is one file in this folder, or in any other package, with a class registered by
:func:`register_token_explainer`. This is a complete one, gradient x input at the image features:

    @register_token_explainer("mine", title="My gradient x input")
    @dataclass(kw_only=True, eq=False)
    class Mine(TokenExplainer):
        \"""Gradient times the image features, minus the mean image token.\"""

        def explain(self, context, seen=None):
            f = context.features                                        # (n, D)
            gradients = context.gradients()                             # (W, n, D)
            return TokenScores((gradients * (f - context.fill)).sum(2))

Its fields are its options, checked by their annotations (:mod:`xattn.runtime.option_checks`). It receives a
:class:`Context`: one conversation, with prompt and answer in one teacher-forced pass of the frozen model.

    n   image tokens of all photos together, in order       M   text tokens: prompt without images, answer
    T   tokens of the answer, y_0 .. y_{T-1}                W   requested words
    q_t row of the decoder's logits (and attention) that produced y_t: ``context.rows[t]``

The image features f (n, D) are all features that enter from the image, even if a model adds some in
deeper layers (for Qwen3-VL, these are additional columns of the row). To hide token i, f_i is replaced
by ``context.fill``, the mean image token; zeros in an attention mask are never used.

An explainer may use the following, cheapest first:

    context.words, .asked             words (text, span, tokens), and the numbers of the requested ones
    context.image, .text              positions of image and text tokens in ``context.sequence``
    context.layouts                   positions of the image tokens on each photo
    context.scores(f)     (B, W)      score of every requested word for B other f; one pass each
    context.hidden(masks) (M', W)     the same for masks (M', n) that hide tokens, or pixels, in batches
    context.gradients(f)  (W, n, D)   gradients of each word's score: one pass, one backward pass per word
    context.logits(f)     (B, T, V)   of all tokens of the answer
    context.hidden_states (P + T, w)  the input of each layer, and of the LM head
    context.output(f, output_attentions=True)       what the model itself returns
    context.features_of(photos) (n, D)              for changed photos: runs processor and image tower again
    context.word_mean(x)  (T, ...) -> (W, ...)      the mean over each word's tokens

Scores follow ``score=`` and ``instead=`` as set by the user, so an explainer need not handle them.
Methods that read attention wrap ``context.output()`` in ``read_rows(context.vlm.decoder, ...)``; a
method that can do so while the answer is generated sets ``watches = True`` and defines
:meth:`TokenExplainer.watch`.

The model is always left as it was before; random numbers come from ``self.seed``.
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
from xattn.registry import Registry, make_adopter, with_name
from xattn.runtime.locking import alone
from xattn.runtime.memory import ForwardBatches
from xattn.runtime.option_checks import check_fields
from xattn.vlm.layout import Layout
from xattn.vlm.model import VLM, ForcedPass, ImageFeatures
from xattn.vlm.words import PhotoError, Word

Score = Literal["log_prob", "logit"]
Where = Literal["token", "pixel"]  # what masks hide


class TokenScores(NamedTuple):
    """Scores of image tokens (W, n), and of text tokens (W, M) if the method computes both from the
    same quantity, so that they are comparable; tokens after the word get 0."""

    image: Tensor
    text: Tensor | None = None


@dataclass(eq=False)
class Context:
    """One conversation in one pass, see :mod:`xattn.vlm.explainers.base`.

    Args:
        prompt_ids: (P,) of the prompt, on the CPU. ``ids``: (T,) of the answer, on the CPU.
        photos, prompt: the RGB photos of the conversation, and its question; both are for
            :meth:`features_of`.
        asked: numbers of the words to explain.
        score: "log_prob", the sum of log p over the word's tokens, or "logit".
        instead: by word number, the token id of another word. The score is then log p of the word's first
            token minus log p of that other token, or the difference of their logits.
        batches: manages the number of sequences per pass, which is halved when memory runs out.
    """

    vlm: VLM
    photos: Sequence[Image.Image]
    prompt: Any
    prompt_ids: Tensor
    ids: Tensor
    words: Sequence[Word]
    asked: Sequence[int]
    forced: ForcedPass
    entered: ImageFeatures
    layouts: Sequence[Layout]
    score: Score = "log_prob"
    instead: Mapping[int, int] = field(default_factory=dict)
    batches: ForwardBatches = field(default_factory=lambda: ForwardBatches(8))

    # ------------------------------------------------------------------ positions

    @property
    def features(self) -> Tensor:
        """The image features f (n, D), detached from the graph."""
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
        """(P + T,): ids of prompt and answer. In an encoder-decoder, the prompt goes to the encoder."""
        return torch.cat([self.prompt_ids, self.ids])

    @cached_property
    def image(self) -> Tensor:
        """(n,): positions of the image tokens in :attr:`sequence`; empty, (0,), for a model that
        cross-attends to them, because there the n image tokens are the keys of cross-attention."""
        return self.vlm.image_places(self.prompt_ids)

    @cached_property
    def text(self) -> Tensor:
        """(M,): positions of all other tokens in :attr:`sequence`."""
        other = torch.ones(len(self.sequence), dtype=torch.bool)
        other[self.image] = False
        return other.nonzero()[:, 0]

    def word_mean(self, of_tokens: Tensor) -> Tensor:
        """The mean over each requested word's tokens: (T, ...) -> (W, ...)."""
        return torch.stack([of_tokens[list(self.words[i].tokens)].mean(0) for i in self.asked])

    # ------------------------------------------------------------------ passes

    def output(self, features: Tensor | None = None, **asked: Any) -> Any:
        """The model's output for B sets of image features (B, n, D) that replace its own; by default, for
        its own. ``asked`` are additional arguments of the model's ``forward``. ``logits`` cover the whole
        sequence."""
        return self.vlm.output(self.forced, self.entered, features, **asked)

    @cached_property
    def hidden_states(self) -> tuple[Tensor, ...]:
        """L + 1 tensors (P + T, width): the input of each of the L layers, and that of the LM head."""
        with torch.no_grad():
            out = self.output(output_hidden_states=True, **self.vlm.answer_logits_only(self.forced))
        states = getattr(out, "hidden_states", None) or out.language_model_outputs.hidden_states
        return tuple(x[0] for x in states)

    @cached_property
    def before_projector(self) -> Tensor | None:
        """The length of each of the image tower's vectors at the projector's input; None without a
        projector."""
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
        """The score (B, W) of every requested word; gradients flow to ``features`` (B, n, D)."""
        return self.scores_of(self.logits(features))

    def scores_of(self, logits: Tensor) -> Tensor:
        """The score (B, W) of every requested word from logits (B, T, V)."""
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
        """Scores (M', W) under masks (M', n), which hide the tokens where they are True. Hidden tokens are
        replaced by the mean image token; with "pixel", the pixels that they cover are replaced by the mean
        colour of their photo instead, and the image tower runs again.

        Raises:
            ValueError: ``where`` is "pixel" and no token has a position.
        """
        f, fill = self.features, self.fill
        if where == "pixel" and not self.grids:
            raise ValueError(
                f"where: got 'pixel', but image tokens of a {type(self.vlm.model).__name__} have "
                f"no position; give 'token'"
            )

        def scored(part: Tensor) -> Tensor:
            if where == "token":
                return self.scores(torch.where(part.to(f.device)[:, :, None], fill, f[None]))
            return self.scores(torch.stack([self.features_of(self._covered(m)) for m in part]))

        with torch.no_grad():
            return torch.cat(self.batches.run(scored, masks))

    @cached_property
    def grids(self) -> list[Tensor]:
        """For each view of each photo, the numbers of its image tokens, arranged in a grid (h', w')."""
        return [x.first + torch.from_numpy(grid) for x in self.layouts for grid in x.grids]

    @property
    def frames_per_map(self) -> int:
        """The number of frames of a clip that share one layout; 1 for photos."""
        return -(-len(self.photos) // len(self.layouts))

    def _covered(self, mask: Tensor) -> list[Image.Image]:
        """The photos, with their mean colour where most tokens of a cell are True in ``mask`` (n,)."""
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
            for pixels in found[layout.number : layout.number + self.frames_per_map]:
                seen = pixels[rows[0] : rows[-1], columns[0] : columns[-1]]
                seen[cells] = pixels.mean((0, 1)).round()
        return [Image.fromarray(pixels) for pixels in found]

    def gradients(
        self, features: Tensor | None = None, of: Callable[[Tensor], Tensor] = lambda g: g
    ) -> Tensor:
        """Gradients (W, n, D) of each requested word's score with respect to the image features, at the
        features of the photo or at ``features`` (n, D). This takes one pass, and one backward pass per
        word. If a function ``of`` is given, only its result for each gradient (n, D) is kept."""
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
        """The features f (n, D) of other photos of the same sizes, such as photos with hidden parts.

        Raises:
            ValueError: the photos have a different number of image tokens.
        """
        found = self.vlm.entered(self.vlm.inputs(photos, self.prompt)).features
        if found.shape != self.features.shape:
            raise PhotoError(
                f"photos: {len(found)} image tokens instead of {len(self.features)}; the processor "
                f"divided them into other tiles"
            )
        return found


@dataclass(eq=False)
class TokenExplainer(ABC):
    """A method that explains the words of an answer; see :mod:`xattn.vlm.explainers.base`.

    Args:
        seed: for methods that draw random numbers; results depend only on (seed, photo, words).

    Class attributes: ``name``; ``watches``, whether it can collect its data while the answer is generated.
    """

    name: ClassVar[str]
    watches: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def watch(
        self, vlm: VLM, prompt_ids: Tensor, rows: Sequence[int] | None = None
    ) -> AbstractContextManager[Any]:
        """Context manager around the generation of an answer to ``prompt_ids`` (P,) or, if ``rows`` of the
        decoder are given, around the single pass over prompt and answer. The value that it yields is passed
        to :meth:`explain` as ``seen``; None means that the explainer needs a separate pass."""
        return nullcontext()

    @abstractmethod
    def explain(self, context: Context, seen: Any = None) -> TokenScores:
        """The scores of every requested word."""

    def notes(self, context: Context) -> list[str]:
        """Remarks to show with these maps, such as the number of sink tokens."""
        return []


@contextmanager
def collect_data(
    methods: Sequence[TokenExplainer],
    vlm: VLM,
    prompt_ids: Tensor,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, Any]]:
    """The data that each watching method in ``methods`` collects, by name; see
    :meth:`TokenExplainer.watch`."""
    with ExitStack() as stack:
        yield {
            m.name: stack.enter_context(m.watch(vlm, prompt_ids, rows))
            for m in methods
            if m.watches
        }


@contextmanager
def exclusive_use(vlm: VLM) -> Iterator[None]:
    """Context manager in which this thread has exclusive use of the model, without gradients; it restores
    the model's state."""
    with alone(vlm.model), preserve_state(vlm.model):
        for parameter in vlm.model.parameters():
            parameter.requires_grad_(False)
        yield


# ---------------------------------------------------------------------- registry


@dataclass(frozen=True)
class TokenExplainerEntry:
    """The registry's entry for a token explainer."""

    name: str
    title: str = ""
    """Its name in running text; by default the registered name."""
    passes: str = ""
    """Its cost in addition to generation, such as "1 + 1 backward a word"."""
    source: str = ""
    """The paper."""
    cases: tuple[Mapping[str, Any], ...] = ({},)
    """Options that are tested for every explainer."""
    kinds: tuple[str, ...] = ("decoder", "encoder", "cross")
    """The kinds of models that it supports, see :mod:`xattn.vlm.model`."""
    needs: str = ""
    """What it needs but some models of these kinds lack: "calls" of attention that can be recorded, or
    "places"."""


def register_token_explainer(
    name: str, **about: Any
) -> Callable[[type[TokenExplainer]], type[TokenExplainer]]:
    """Class decorator: register a token explainer under ``name``.

    Args:
        about: values of further fields of :class:`TokenExplainerEntry`.

    Example:
        >>> from xattn import create_token_explainer, list_token_explainers
        >>> from xattn import register_token_explainer
        >>> @register_token_explainer("attention_again")
        ... class MyAttention(type(create_token_explainer("attention"))):
        ...     pass
        >>> "attention_again" in list_token_explainers()
        True
    """
    return TOKEN_EXPLAINERS.register(TokenExplainerEntry(name, **about))


TOKEN_EXPLAINERS: Registry[TokenExplainer, TokenExplainerEntry] = Registry(
    "xattn.token_explainers",
    base=TokenExplainer,
    homes=("xattn.vlm.explainers",),
    argument="explainer",
    noun="token explainer",
    adopt=make_adopter(TokenExplainer, register_token_explainer),
    mark=with_name,
)
list_token_explainers = TOKEN_EXPLAINERS.names


def create_token_explainer(name: str, seed: int = 0, **options: Any) -> TokenExplainer:
    """Create a token explainer from its name, with options of its class.

    Raises:
        ValueError: an unknown name (with near matches) or option.

    Example:
        >>> from xattn import create_token_explainer
        >>> create_token_explainer("occlusion", seed=1).seed
        1
    """
    return TOKEN_EXPLAINERS.create(name, seed=seed, **options)
