"""A transformers vision-language model: its image features, its answers, one teacher-forced pass.

    f (n, D)          image features after the projector: row i is everything that enters for image token i
    q_t = P + t - 1   the row of logits that produced token y_t of the answer; P prompt tokens

    decoder           image tokens are in the prompt, f replaces their embeddings     LLaVA, Qwen-VL, ...
    encoder           likewise, in an encoder's prompt; the decoder gives the answer  Florence-2
    cross             f is read by cross-attention and is not in any sequence         BLIP, Mllama

Features are read and replaced at the point where the model computes them, so every other part runs
unchanged.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from xattn.backbone.families.transformers_models import name_of
from xattn.runtime.locking import alone
from xattn.runtime.option_checks import Count, check
from xattn.vlm.words import PhotoError

PLACE = "<image>"  # position of an image in a prompt
FAMILIES = (
    "LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL, Idefics3, SmolVLM, "
    "PaliGemma, Gemma 3, Mistral 3, Florence-2, BLIP, BLIP-2, Mllama"
)
OF_CLIPS = {
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
    "llava_onevision": "LLaVA-OneVision",
}  # fmt: skip


class Timing(NamedTuple):
    """Frames of a clip: their ``numbers``, from 0; the total number of frames; the frame rate."""

    numbers: tuple[int, ...]
    total: int
    fps: float


class _EnoughError(Exception):
    """Ends a pass early."""


class FeatureEntry(NamedTuple):
    """The point where image features enter: the call of the module that computes them.

    ``field`` is the field that holds the features in the result of ``module.method``, or "" if the result
    is the features themselves; ``before`` is a network that need not run if the features are replaced.
    """

    module: nn.Module
    method: str = "get_image_features"
    field: str = "pooler_output"
    before: nn.Module | None = None

    @contextmanager
    def recorded(
        self, places: int | None = None, stop: bool = False
    ) -> Iterator[list[ImageFeatures]]:
        """Context manager that records the image features as they enter the model; a ``ValueError`` is
        raised unless they fill ``places`` tokens. With ``stop``, the pass ends once the features have
        entered."""
        kept: list[ImageFeatures] = []
        before: list[Any] = [None]
        with ExitStack() as stack:

            def keep(output: Any) -> None:
                entered = ImageFeatures(output, self.field, before[0])
                if places not in (None, len(entered.features)):
                    raise PhotoError(
                        f"images: {places} image tokens in the prompt, {len(entered.features)} features; "
                        f"give the processor that was saved with the model"
                    )
                kept.append(entered)
                if stop:
                    raise _EnoughError

            stack.enter_context(_watched(self.module, self.method, keep))
            if self.before is not None:
                see = functools.partial(before.__setitem__, 0)
                stack.enter_context(_watched(self.before, "forward", see))
            with suppress(_EnoughError):
                yield kept

    @contextmanager
    def filled(self, entered: ImageFeatures, features: Tensor) -> Iterator[None]:
        """Context manager in which ``features`` (B, n, D) enter regardless of the pixels."""
        with ExitStack() as stack:
            output = entered.filled(features)
            stack.enter_context(_replaced(self.module, self.method, lambda *a, **k: output))
            if self.before is not None:
                stack.enter_context(
                    _replaced(self.before, "forward", lambda *a, **k: entered.before)
                )
            yield


def entrance_of(model: nn.Module) -> FeatureEntry:
    """Where image features enter ``model``.

    Raises:
        ValueError: the model has no image tokens.
    """
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind == "blip" and hasattr(model, "text_decoder") and not hasattr(model, "text_encoder"):
        tower: Any = model.vision_model
        return FeatureEntry(tower, "forward", "last_hidden_state")
    if kind == "mllama" and hasattr(model, "model"):
        base: Any = model.model
        return FeatureEntry(base.multi_modal_projector, "forward", "", base.vision_model)
    for owner in (getattr(model, "base_model", None), model):
        tokens = _image_token(model) is not None and hasattr(model, "generate")
        if tokens and callable(getattr(owner, "get_image_features", None)):
            return FeatureEntry(owner)  # type: ignore[arg-type]
    raise ValueError(
        f"vlm: a {type(model).__name__} has no image tokens (config.image_token_id and "
        f"get_image_features); give a model of: {FAMILIES}"
    )


class ImageFeatures:
    """The features that entered from the images: ``features`` (n, D), detached.

    Qwen3-VL also adds features in its first layers; each row then holds the features of the input, followed
    by those that are added later.
    """

    def __init__(self, output: Any, field: str, before: Any = None) -> None:
        self.output, self.before = output, before
        self.field = field if hasattr(output, field or " ") else ""
        self._parts = [getattr(output, self.field) if self.field else output]
        self._parts += list(getattr(output, "deepstack_features", None) or [])
        flat = [torch.cat([x.reshape(-1, x.shape[-1]) for x in part]) for part in self._parts]
        self.features = torch.cat(flat, 1).detach()
        self._widths = [x.shape[1] for x in flat]

    def filled(self, features: Tensor) -> Any:
        """The value that the recorded call would return with ``features`` (B, n, D) of B sequences."""
        pieces = features.split(self._widths, 2)
        new = [_like(part, x) for part, x in zip(self._parts, pieces, strict=True)]
        if not self.field:
            return new[0]
        values = {**self.output, self.field: new[0]}
        if len(new) > 1:
            values["deepstack_features"] = new[1:]
        return type(self.output)(**values)


def _like(part: Any, features: Tensor) -> Any:
    """``features`` (B, n, D) in the form of ``part``: a tensor (items, ..., D) or a list of items."""
    if isinstance(part, Tensor):
        return features.reshape(len(features) * part.shape[0], *part.shape[1:])
    lengths = [x.shape[:-1].numel() for x in part]
    rows = [row.split(lengths) for row in features]
    shapes = [x.shape for x in part] * len(rows)
    items = [x.reshape(s) for x, s in zip((x for row in rows for x in row), shapes, strict=True)]
    return type(part)(items)


@contextmanager
def _replaced(module: nn.Module, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Context manager in which ``module.name`` is replaced by ``call``."""
    own = vars(module)
    before = own.get(name)
    own[name] = call
    try:
        yield
    finally:
        own.pop(name)
        if before is not None:
            own[name] = before


def _watched(module: nn.Module, name: str, keep: Callable[[Any], object]) -> Any:
    """Context manager in which ``keep`` receives what ``module.name`` returns."""
    original = getattr(module, name)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        keep(output)
        return output

    return _replaced(module, name, call)


class GeneratedAnswer(NamedTuple):
    """An answer: its ids (T,), on the CPU; its logits (T, V), if requested; and the image features that
    entered the model (None if the model generates without the call that is recorded)."""

    ids: Tensor
    logits: Tensor | None
    entered: ImageFeatures | None


class ForcedPass(NamedTuple):
    """Prompt and answer in one pass: its inputs, and the row of logits before each token of the answer."""

    inputs: dict[str, Any]
    rows: Tensor


@dataclass(frozen=True, eq=False)
class VLM:
    """A vision-language model with its processor, see :func:`load_vlm`.

    ``kind``: how the image enters, "decoder", "encoder" or "cross". With a ``clip``, the photos are its
        frames and the image tokens are the tokens of the clip.
    """

    model: Any
    processor: Any
    entrance: FeatureEntry
    kind: str
    clip: Timing | None = None

    def of_clip(self, clip: Timing) -> VLM:
        """The same model, set up to be shown frames of a clip.

        Raises:
            ValueError: the model does not take clips, or the clip is too short for it.
        """
        if self.family not in OF_CLIPS or not hasattr(self.processor, "video_processor"):
            raise ValueError(
                f"images: a {type(self.model).__name__} takes no clips; give photos, or a model of: "
                f"{', '.join(OF_CLIPS.values())}"
            )
        if self.family == "qwen3_vl" and len(clip.numbers) < 2:
            raise PhotoError(f"frames: got {len(clip.numbers)}; a Qwen3-VL needs 2 or more")
        entrance = self.entrance._replace(method="get_video_features")
        return replace(self, entrance=entrance, clip=clip)

    @property
    def name(self) -> str:
        """The name from which the model can be loaded again, or its class."""
        return name_of(self.model)

    @property
    def family(self) -> str:
        """The ``model_type`` of the model, such as "llava_next"."""
        return str(self.model.config.model_type)

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def decoder(self) -> Any:
        """The part that produces the answer, whose attention :func:`~xattn.vlm.reading.read_rows` reads."""
        found = self.model.get_decoder()
        return getattr(found, "decoder", found) if self.kind == "encoder" else found

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def image_places(self, ids: Tensor) -> Tensor:
        """The positions (n,), in order, where images enter a prompt (P,); empty for a cross-attending
        model."""
        if self.kind == "cross":
            return torch.zeros(0, dtype=torch.long)
        return torch.eq(ids.cpu(), _image_token(self.model, self._medium) or 0).nonzero()[:, 0]

    @property
    def _medium(self) -> str:
        return "video" if self.clip else "image"

    # ------------------------------------------------------------------ prompts

    def inputs(self, photos: Sequence[Image.Image], prompt: Any) -> dict[str, Any]:
        """The processor's result for photos, or for frames of a clip, and a prompt: tensors of one
        conversation.

        Args:
            prompt: text, with ``<image>`` at the position of the images or the clip, which otherwise come
                before the text; or messages as chat templates take them.

        Raises:
            ValueError: the prompt does not have one position for each image.
        """
        shown: list[Any] = [np.stack([*map(np.asarray, photos)])] if self.clip else list(photos)
        of_text, medium = isinstance(prompt, str), self._medium
        parts = [] if of_text else [p for m in prompt for p in parts_of(m)]
        places = prompt.count(PLACE) if of_text else sum(p.get("type") == medium for p in parts)
        if (places or not of_text) and places != len(shown):
            what = PLACE if of_text else f"{medium}s in the messages"
            count = f"{len(shown)} {medium}{'s' if len(shown) > 1 else ''}"
            raise ValueError(f"prompt: {places} {what} for {count}; give one place for each")
        if of_text and not prompt.strip() and self.kind != "cross":
            raise ValueError("prompt: empty; give a question or an instruction")
        chats = getattr(self.processor, "chat_template", None)
        if not of_text and not chats:
            raise ValueError(
                f"prompt: the processor of {self.name} has no chat template; give a text"
            )
        try:
            if chats:
                made = self._chat(
                    shown, _messages(prompt, len(shown), medium) if of_text else prompt
                )
            else:
                text = self._text(prompt, shown)
                made = self.processor(images=shown, text=text, return_tensors="pt")
        except ValueError as error:
            raise PhotoError(f"image, prompt: the processor of {self.name}: {error}") from error
        if self.family in ("idefics3", "smolvlm"):  # they treat all-zero tiles as padding
            tiles = made["pixel_values"]
            tiles[(tiles == 0).flatten(2).all(2)] = 1e-6
        return {k: self._moved(v) for k, v in made.items() if k not in ("labels", "video_metadata")}

    def _chat(self, shown: Sequence[Any], messages: Any) -> Mapping[str, Any]:
        remaining, medium = iter(shown), self._medium
        filled = [
            {**m, "content": [
                {**p, medium: next(remaining)} if p.get("type") == medium else p for p in parts_of(m)
            ]}
            for m in messages
        ]  # fmt: skip
        options: dict[str, Any] = {}
        if self.clip:
            numbers, total, fps = self.clip
            told = {"total_num_frames": total, "fps": fps, "frames_indices": [*numbers]}
            options = {"processor_kwargs": {"do_sample_frames": False, "video_metadata": [told]}}
        return self.processor.apply_chat_template(  # type: ignore[no-any-return]
            filled,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )

    def _text(self, prompt: str, photos: Sequence[Any]) -> str:
        """``prompt`` for a processor without a chat template."""
        tokens = [getattr(self.processor, name, None) for name in ("boi_token", "image_token")]
        token = next((str(t) for t in tokens if t), "")
        if self.family in ("florence2", "blip", "blip-2", "blip_2"):  # their processors add it
            return prompt.replace(PLACE, "").strip()
        if PLACE not in prompt:
            prompt = PLACE * len(photos) + prompt
        return prompt.replace(PLACE, token)

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)

    # ------------------------------------------------------------------ running it

    def generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 64,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        logits: bool = False,
    ) -> GeneratedAnswer:
        """The model's answer, decoded greedily unless ``options`` for its ``generate`` change that.

        Raises:
            ValueError: the prompt leaves no room for an answer.
        """
        check("max_new_tokens", max_new_tokens, Count)
        if reserved := {"output_logits", "return_dict_in_generate"} & set(options or {}):
            raise ValueError(f"generate: {min(reserved)} is set by xattn; leave it out")
        ids = inputs["input_ids"]
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room and self.kind == "decoder":
            max_new_tokens = min(max_new_tokens, room - ids.shape[1])
            if max_new_tokens <= 0:
                raise PhotoError(
                    f"max_new_tokens: a prompt of {ids.shape[1]:,} tokens leaves none of "
                    f"{room:,}; give a shorter prompt or smaller photos"
                )
        greedy = {
            "do_sample": False,
            "num_beams": 1,
            **dict.fromkeys(("temperature", "top_p", "top_k")),
        }
        asked = {**greedy, **(options or {}), "max_new_tokens": max_new_tokens}
        devices = [self.device] if self.device.type == "cuda" else []
        places = None if self.kind == "cross" else len(self.image_places(ids[0]))
        with alone(self.model), self.entrance.recorded(places) as kept, torch.no_grad():
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                given = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
                out = self.model.generate(
                    **given, **asked, return_dict_in_generate=True, output_logits=logits
                )
        alone_in_it = logits and len(out.logits[0]) == 1  # no beams
        found = torch.stack([x[0] for x in out.logits]).float() if alone_in_it else None
        return GeneratedAnswer(
            self._answer(ids[0].cpu(), out.sequences[0].cpu()), found, kept[0] if kept else None
        )

    def _answer(self, prompt: Tensor, sequence: Tensor) -> Tensor:
        """The new tokens in the result of ``generate``."""
        if self.kind == "encoder":
            return sequence[1:].clone()
        if self.family == "blip":  # drops the last token of the prompt and changes the first
            return sequence[len(prompt) - 1 :].clone()
        whole = len(sequence) >= len(prompt) and torch.equal(sequence[: len(prompt)], prompt)
        return sequence[len(prompt) if whole else 0 :].clone()

    def forced(self, inputs: Mapping[str, Any], ids: Tensor) -> ForcedPass:
        """One pass over prompt and answer ``ids`` (T,), with the same logits as generation."""
        own, count = dict(inputs), len(ids)
        prompt, answer = own["input_ids"], ids.to(self.device)[None]
        if self.kind == "encoder":
            start = self.model.config.get_text_config().decoder_start_token_id
            first = torch.full_like(answer[:, :1], start)
            own["decoder_input_ids"] = torch.cat([first, answer[:, :-1]], 1)
            return ForcedPass(own, torch.arange(count, device=self.device))
        if self.family == "blip":
            prompt = prompt[:, :-1].clone()
            prompt[:, 0] = self.model.config.text_config.bos_token_id
            own["attention_mask"] = own["attention_mask"][:, :-1]
        length = prompt.shape[1]
        own["input_ids"] = torch.cat([prompt, answer], 1)
        for name, value in own.items():
            pixels = name.startswith("pixel") or not isinstance(value, Tensor)
            if not pixels and value.shape[:2] == (1, length):
                own[name] = self._extended(name, value, count)
        rows = torch.arange(length - 1, length + count - 1, device=self.device)
        return ForcedPass(own, rows)

    def _extended(self, name: str, value: Tensor, count: int) -> Tensor:
        """An input with one value per prompt token, extended for ``count`` more tokens."""
        if name == "cross_attention_mask":
            more = value[:, -1:].expand(-1, count, *value.shape[2:])
        else:
            of_text = name == "attention_mask"
            # PaliGemma's prefix attends in both directions, the answer (1) does not.
            of_text |= name == "token_type_ids" and self.family.startswith("paligemma")
            more = torch.full((1, count), int(of_text), dtype=value.dtype, device=value.device)
        return torch.cat([value, more], 1)

    def entered(self, inputs: Mapping[str, Any]) -> ImageFeatures:
        """The image features that enter for a prompt; the language model does not run."""
        places = len(self.image_places(inputs["input_ids"][0]))
        recorded = self.entrance.recorded(None if self.kind == "cross" else places, stop=True)
        with alone(self.model), self._same(), torch.no_grad(), recorded as kept:
            self.model(**inputs, use_cache=False)
        return kept[0]

    def output(
        self,
        forced: ForcedPass,
        entered: ImageFeatures,
        features: Tensor | None = None,
        **asked: Any,
    ) -> Any:
        """The model's output with its image features replaced by those of B images, ``features`` (B, n, D).

        Args:
            asked: additional arguments of the model's ``forward``, such as ``output_hidden_states=True``.

        Gradients flow to ``features`` if these require gradients.
        """
        if features is None:
            features = entered.features[None]
        count = len(features)
        inputs = {
            k: v if k.startswith("pixel") else _repeated(v, count) for k, v in forced.inputs.items()
        }
        needs = features.requires_grad or torch.is_grad_enabled()
        with alone(self.model), self._same(), torch.set_grad_enabled(needs):
            with self.entrance.filled(entered, features.to(entered.features.dtype)):
                return self.model(**inputs, use_cache=False, **asked)

    def logits(
        self, forced: ForcedPass, entered: ImageFeatures, features: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, V) before each token of the answer, float32; see :meth:`output`."""
        few = self.answer_logits_only(forced)
        found = self.output(forced, entered, features, **few).logits
        return (found if few else found[:, forced.rows]).float()

    def answer_logits_only(self, forced: ForcedPass) -> dict[str, Any]:
        """Arguments of ``forward`` that limit the logits to the answer, if the model supports this."""
        return {"logits_to_keep": forced.rows} if self._keeps else {}

    @functools.cached_property
    def _keeps(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @contextmanager
    def _same(self) -> Iterator[None]:
        """Context manager that afterwards restores the positions that Qwen-VL stores while it generates."""
        kept = [(m, m.rope_deltas) for m in self.model.modules() if hasattr(m, "rope_deltas")]
        try:
            yield
        finally:
            for module, value in kept:
                module.rope_deltas = value


def _repeated(value: Any, count: int) -> Any:
    """An input of one conversation, repeated for ``count``."""
    if isinstance(value, list):
        return value * count
    if count == 1 or not isinstance(value, Tensor):
        return value
    return value.repeat(count, *[1] * (value.ndim - 1))


def _image_token(model: Any, medium: str = "image") -> int | None:
    """The id of the tokens that image features replace."""
    config = getattr(model, "config", None)
    found = (getattr(config, f"{medium}_token_{name}", None) for name in ("id", "index"))
    return next((i for i in found if i is not None), None)


def parts_of(message: Any) -> list[Any]:
    """The parts of a chat message."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _messages(prompt: str, count: int, medium: str) -> list[dict[str, Any]]:
    """A user's message with images at each ``<image>``, or before the text if there is none."""
    if PLACE not in prompt:
        prompt = PLACE * count + prompt
    content: list[dict[str, Any]] = []
    for i, text in enumerate(prompt.split(PLACE)):
        content += [{"type": medium}] if i else []
        content += [{"type": "text", "text": text}] if text.strip() else []
    return [{"role": "user", "content": content}]
