"""``explain_tokens``: a vision-language model's answers about photos, with a map for each word.

The steps are: generation (during which attention is read), words, log p with and without the image, each
method's scores of image tokens (W, n), and maps (h, w) on the photo.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from xattn.explaining.naming import file_name_of, named_photos, with_ids
from xattn.explaining.photos import report
from xattn.packs.answers import AnswerFacts, AnswerWord, frame_id
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.writer import check_local, pack_writer
from xattn.photos.clip import FALLBACK_FPS
from xattn.photos.image_names import unique_id
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.runtime.memory import ForwardBatches, is_out_of_memory
from xattn.runtime.option_checks import Count, Positive, check_fields
from xattn.runtime.version import __version__
from xattn.vlm.answer import Answer, Answers, WordMaps
from xattn.vlm.clips import frames_of, is_clip
from xattn.vlm.explainers.base import (
    TOKEN_EXPLAINERS,
    Context,
    Score,
    TokenExplainer,
    TokenScores,
    collect_data,
    create_token_explainer,
    exclusive_use,
)
from xattn.vlm.layout import Views, locate
from xattn.vlm.model import PLACE, VLM, Timing, parts_of
from xattn.vlm.words import PhotoError, Word, token_texts, word_number, words_of

LEAST = -1e4  # smallest log p
NEEDED = 0.1  # a word that loses at least this many nats without the image is "visual"


def explain_tokens(
    images: Any,
    vlm: VLM,
    prompt: Any = "Describe the image.",
    answer: str | Sequence[str] | None = None,
    explainer: Any = "attention",
    words: str | Sequence[Any] | None = None,
    instead: Mapping[Any, str] | None = None,
    score: Score = "log_prob",
    max_new_tokens: int = 64,
    generate: Mapping[str, Any] | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    batch_size: int = 8,
    overlays: bool = False,
    progress: bool = False,
    max_pixels: int | None = MAX_PIXELS,
    keep: int | None = None,
    *,
    views: Views = "all",
    frames: int = 16,
    fps: float = FALLBACK_FPS,
) -> Answers:
    """Explain the words of a vision-language model's answers about photos.

    Args:
        images: as in :func:`xattn.explain`; each photo is a separate conversation. Photos in a tuple are
            shown together; a list may hold such tuples. A video file is a clip, and so is an array
            (frames, H, W, 3) if ``vlm`` takes clips; a map covers one or two frames.
        vlm: from :func:`~xattn.vlm.loading.load_vlm`.
        prompt: text, with ``<image>`` where the images are to be (by default first); or chat messages.
        answer: a text to explain instead of a generated one, or one per photo.
        explainer: a name from ``xattn list token-explainers``, a token explainer, or a list of several.
        words: words, word numbers, or ("fork", 2) for the second "fork"; by default all; ``"visual"``
            selects words that lose at least 0.1 nats without the image.
        instead: ``{"cat": "dog"}``: the score is log p(cat) - log p(dog), for the first token of each.
        score: the quantity that perturbations and gradients explain, summed over a word's tokens.
        generate: options of the model's ``generate``; greedy by default; sampling uses ``seed``.
        output: folder of a pack to write, photo by photo; nothing is written if no word was explained.
        batch_size: sequences per pass, halved when memory runs out.
        overlays: also write pictures of the maps into the pack, which may take longer than the answer.
        keep: return at most this many of the ``.total`` answers; ``output`` contains all.
        views: for models that see a photo both whole and in tiles: whether to use all tokens or one kind.
        frames, fps: how many evenly spaced frames of a clip are shown, and the frame rate of an array.

    Returns:
        One answer per photo. Photos that cannot be read, or whose answer lacks a requested word, are
        skipped with a warning and listed in ``.skipped``; for a single photo, an error is raised.

    Raises:
        ValueError: an argument is invalid; the message begins with its name.
        OSError: a path does not exist.
    """
    if vlm.model.training:
        raise ValueError("vlm: the model is in training mode; call model.eval() first")
    if output is not None:
        check_local(output)
    task = _Task(
        _methods(explainer, seed), prompt, words, dict(instead or {}), score, max_new_tokens,
        dict(generate or {}), seed, batch_size, views, frames, fps, max_pixels,
    )  # fmt: skip
    asked = _conversations(images, task, vlm)
    texts = _texts(answer, len(asked))
    bar = tqdm(asked, "explain", unit="photo", disable=not progress or len(asked) == 1)
    found, writer = Answers(), None
    with ExitStack() as stack:
        for made in _each(task, vlm, zip(bar, texts, strict=True), found.skipped, len(asked) > 1):
            found.add(made, keep)
            if output is not None and made.maps:
                writer = writer or stack.enter_context(pack_writer(output, overlays, keep=True))
                writer.skipped = found.skipped
                for group in made.by_photo.values():
                    writer.add(group)
            elif output is not None:
                found.skipped.append((made.image_id, "answer: no word of it was explained"))
    if output is not None and writer is None and found.total:
        warnings.warn("output: no word was explained, so no pack was written", stacklevel=2)
    elif found.skipped:
        report(found.skipped, found.total)
    return found


def _each(
    task: _Task, vlm: VLM, asked: Iterable[Any], skipped: list[tuple[str, str]], skip: bool
) -> Iterator[Answer]:
    """Each answer; if ``skip`` is true, errors in a single photo are collected in ``skipped``."""
    for (name, sources), text in asked:
        try:
            loaded = _loaded(task, vlm, sources)
            with exclusive_use(vlm):
                made = _explained(task, name, text, *loaded)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if not skip or not (isinstance(error, PhotoError | OSError) or is_out_of_memory(error)):
                raise
            skipped.append((name, str(error)))
        else:
            yield made


@dataclass(frozen=True)
class _Task:
    """The settings for each conversation, see :func:`explain_tokens`."""

    methods: Any
    prompt: Any
    words: Any
    instead: Any
    score: Score
    max_new_tokens: Count
    generate: Any
    seed: int
    batch_size: Count
    views: Views
    frames: Count
    fps: Positive
    max_pixels: int | None

    def __post_init__(self) -> None:
        check_fields(self)


def _loaded(
    task: _Task, vlm: VLM, sources: Sequence[Any]
) -> tuple[VLM, list[Image.Image], Sequence[Any]]:
    """The model prepared for this input, the photos or frames, and where they were read from.

    Raises:
        PhotoError: they cannot be read.
    """
    try:
        if not is_clip(sources[0], vlm):
            return vlm, [load_image(source, task.max_pixels) for source in sources], sources
        photos, timing = frames_of(sources[0], task.frames, task.max_pixels, task.fps)
    except ValueError as error:
        raise PhotoError(str(error)) from error
    return vlm.of_clip(timing), photos, photos


def _methods(explainer: Any, seed: int) -> list[TokenExplainer]:
    given = explainer if isinstance(explainer, list | tuple) else [explainer]
    made = [create_token_explainer(e, seed) if isinstance(e, str) else e for e in given]
    for one in made:
        if not isinstance(one, TokenExplainer):
            known = ", ".join(TOKEN_EXPLAINERS.names())
            raise ValueError(f"explainer: got a {type(one).__name__}; give a name of {known}")
    names = [one.name for one in made]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"explainer: got {', '.join(names) or 'none'}; give each method once")
    return made


def _conversations(images: Any, task: _Task, vlm: VLM) -> list[tuple[str, list[Any]]]:
    """The id of each conversation, and its photos or its clip; unsupported clips raise an error."""
    if isinstance(images, tuple) or is_clip(images, vlm):
        images = [images]
    apart = isinstance(images, list) and any(
        isinstance(x, tuple) or is_clip(x, vlm) for x in images
    )
    if not apart:
        return [(name, [source]) for name, source in named_photos(images)]
    found, taken = [], set[str]()
    for number, group in enumerate(images):
        photos = list(group) if isinstance(group, tuple) else [group]
        if len(photos) > 1 and any(is_clip(x, vlm) for x in photos):
            raise ValueError("images: a clip is in a tuple; give it by itself")
        if is_clip(photos[0], vlm):
            vlm.of_clip(Timing(tuple(range(task.frames)), task.frames, task.fps))
        own = list(with_ids(photos)) if is_clip(photos[0], vlm) else named_photos(photos)
        if len(own) != len(photos):
            raise ValueError("images: an item of a tuple holds several photos; list each of them")
        name, first = own[0]
        name = name if file_name_of(first) else f"image {number}"
        found.append((unique_id(name, taken), [source for _, source in own]))
    return found


def _texts(answer: str | Sequence[str] | None, count: int) -> list[str | None]:
    single = answer is None or isinstance(answer, str)
    given: list[str | None] = [answer] * count if single else list(answer)  # type: ignore[arg-type, list-item]
    if len(given) != count:
        raise ValueError(f"answer: got {len(given)} texts for {count} photos; give one for each")
    if any(text is not None and not text.strip() for text in given):
        raise ValueError("answer: empty; give the text to explain, or None to generate one")
    return given


def _explained(
    task: _Task,
    name: str,
    text: str | None,
    vlm: VLM,
    photos: Sequence[Image.Image],
    sources: Sequence[Any],
) -> Answer:
    """Explain one conversation, see :func:`explain_tokens`."""
    prompt, methods = task.prompt, task.methods
    inputs = vlm.inputs(photos, prompt)
    prompt_ids, seen, logits, entered = inputs["input_ids"][0].cpu(), {}, None, None
    if text is None:
        with collect_data(methods, vlm, prompt_ids) as seen:
            made = vlm.generate(inputs, task.max_new_tokens, task.generate, task.seed, logits=True)
        ids, entered = made.ids, made.entered
        logits = None if made.logits is None or len(made.logits) != len(ids) else made.logits
    else:
        ids = torch.tensor(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])
    said, found = words_of(vlm.tokenizer, ids.tolist())
    asked_text = prompt if isinstance(prompt, str) else _text_of(prompt)
    if not found:
        warnings.warn(f"answer: {name}: the answer is empty, so there is no word", stacklevel=4)
        empty = np.zeros(0, np.float32)
        return Answer(name, asked_text, said, (), tuple(ids.tolist()), empty, empty)
    entered, forced = entered or vlm.entered(inputs), vlm.forced(inputs, ids)
    if vlm.kind != "encoder":  # BLIP changes the prompt
        prompt_ids = forced.inputs["input_ids"][0, : -len(ids)].cpu()
    layouts = locate(vlm, photos, prompt, inputs, len(entered.features))
    for layout in layouts:
        layout.shown(task.views)
    context = Context(
        vlm=vlm,
        photos=photos,
        prompt=prompt,
        prompt_ids=prompt_ids,
        ids=ids,
        words=found,
        asked=range(len(found)),
        forced=forced,
        entered=entered,
        layouts=layouts,
        score=task.score,
        instead=_instead(vlm.tokenizer, said, ids, found, task.instead),
        batches=ForwardBatches(task.batch_size),
    )
    if logits is None:  # one pass, during which all methods read
        with collect_data(methods, vlm, prompt_ids, context.rows.tolist()) as seen, torch.no_grad():
            logits = context.logits()[0]
    log_probs, lost = _need(context, logits)
    own = replace(context, asked=_asked(task.words, found, lost))
    scores = {m.name: m.explain(own, seen.get(m.name)) for m in methods} if own.asked else {}
    shown = Answer(
        image_id=name,
        prompt=asked_text,
        text=said,
        words=tuple(found),
        token_ids=tuple(ids.tolist()),
        log_probs=log_probs,
        lost=lost,
        tokens=_tokens(own),
        notes={m.name: notes for m in methods if (notes := m.notes(own))},
    )
    protocols = {m.name: _protocol(own, m, text is not None, task.views) for m in methods}
    return replace(shown, maps=_maps(own, scores, shown, protocols, sources, task.views))


def _tokens(context: Context) -> tuple[tuple[str, bool], ...]:
    """The text of each text token, with preceding white space, and whether it belongs to the prompt."""
    shown = token_texts(context.vlm.tokenizer, context.sequence[context.text].tolist())
    return tuple(zip(shown, (context.text < len(context.prompt_ids)).tolist(), strict=True))


def _need(context: Context, logits: Tensor) -> tuple[Any, Any]:
    """(W,) log p of each word from ``logits`` (T, V), and how much of it is lost when every image token
    is replaced by the mean token."""
    with torch.no_grad():
        own = logits.log_softmax(1).gather(1, context.ids.to(logits.device)[:, None])[:, 0]
        other = context.log_probs(context.fill.expand_as(context.features)[None])[0]
    # A probability of 0 also needs a finite number.
    whole, without = (
        torch.stack([x[list(word.tokens)].sum() for word in context.words])
        .float()
        .cpu()
        .clamp_min(LEAST)
        for x in (own, other)
    )
    return whole.numpy(), (whole - without).numpy()


def _asked(words: Any, found: Sequence[Word], lost: Any) -> list[int]:
    if words is None:
        return list(range(len(found)))
    if isinstance(words, str) and words == "visual":
        return [i for i, value in enumerate(lost) if value >= NEEDED]
    pair = isinstance(words, tuple) and tuple(map(type, words)) == (str, int)
    given = [words] if isinstance(words, str | int) or pair else list(words)
    if not given:
        raise ValueError("words: got an empty list; name at least one, or pass None for all")
    return list(dict.fromkeys(word_number(found, word) for word in given))


def _instead(
    tokenizer: Any, said: str, ids: Tensor, words: Sequence[Word], instead: Mapping[Any, str]
) -> dict[int, int]:
    """For each word number, the first token of the replacement word."""
    made = {}
    for key, other in instead.items():
        i = word_number(words, key, "instead")
        before = said[: words[i].span[0]]
        own, new = (
            tokenizer(before + word, add_special_tokens=False)["input_ids"]
            for word in (words[i].text, other)
        )
        at = next((k for k, (a, b) in enumerate(zip(own, new, strict=False)) if a != b), None)
        if at is not None and own[at] != int(ids[words[i].tokens[0]]):
            raise PhotoError(
                f"instead: {words[i].text!r} has other tokens in this answer than by itself; choose "
                f"another word"
            )
        if at is None:
            raise PhotoError(
                f"instead: {other!r} starts with the same token as {words[i].text!r}; give a word with "
                f"another first token"
            )
        if len(new) > at + 1:
            parts = "+".join(repr(tokenizer.decode([t]).strip()) for t in new[at:])
            warnings.warn(
                f"instead: {other!r} consists of {parts}; only the first token counts", stacklevel=5
            )
        made[i] = new[at]
    return made


def _maps(
    context: Context,
    scores: Mapping[str, TokenScores],
    answer: Answer,
    protocols: Mapping[str, Any],
    sources: Sequence[Any],
    views: Views,
) -> dict[int, dict[str, WordMaps]]:
    """The results by word number and method; each map carries the answer in the form that packs store."""
    image = {name: _array(of.image) for name, of in scores.items()}
    text = {name: _array(of.text) for name, of in scores.items() if of.text is not None}
    of_prompt, shares = np.array([of_prompt for _, of_prompt in answer.tokens], bool), {}
    for name, own in text.items():
        parts = (image[name], own[:, of_prompt], own[:, ~of_prompt])
        sizes = np.stack([np.abs(part).sum(1, dtype=float) for part in parts], 1)
        shares[name] = sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-30)
    place = {i: j for j, i in enumerate(context.asked)}
    words = [
        AnswerWord(
            word.text, word.span, float(answer.log_probs[i]), float(answer.lost[i]),
            float(answer.probabilities[i]),
            *(
                {n: (*map(float, x[place[i]]),) for n, x in of.items() if i in place}
                for of in (shares, text)
            ),
        )
        for i, word in enumerate(answer.words)
    ]  # fmt: skip
    tokens = tuple(token for token, _ in answer.tokens)
    told = AnswerFacts(answer.prompt, answer.text, tuple(words), tokens, answer.asked)
    facts, found = ImageFacts(answer=told), {i: dict[str, WordMaps]() for i in place}
    for name, own in image.items():
        title = TOKEN_EXPLAINERS.entry(name).title if name in TOKEN_EXPLAINERS else ""
        whole = np.maximum(np.abs(own).sum(1, dtype=float), 1e-30)
        on_photos = [
            (layout, image_id, layout.maps(own, views), layout.unplaced(np.abs(own), views) / whole)
            for layout, image_id in zip(
                context.layouts, _ids(context, answer.image_id), strict=True
            )
        ]
        for i, j in place.items():
            explanations = tuple(
                Explanation(
                    map=maps[j],
                    target=i,
                    target_name=answer.words[i].text,
                    probability=min(float(answer.probabilities[i]), 1.0),
                    method=name,
                    method_title=title,
                    view=layout.view.check_size(),
                    image_id=image_id,
                    protocol={
                        **protocols[name],
                        "layout": layout.source,
                        "unplaced": float(left[j]),
                    },
                    file_name=file_name_of(sources[layout.number]),
                    source=sources[layout.number],
                    facts=facts,
                )
                for layout, image_id, maps, left in on_photos
            )
            of_text = text[name][j] if name in text else None
            of_parts = tuple(map(float, shares[name][j])) if name in text else None
            found[i][name] = WordMaps(explanations, of_text, of_parts)  # type: ignore[arg-type]
    return found


def _array(scores: Tensor) -> NDArray[np.float32]:
    return scores.detach().float().cpu().numpy()  # type: ignore[no-any-return]


def _ids(context: Context, image_id: str) -> list[str]:
    """Ids of the photos or frames that have maps; see :mod:`xattn.packs.answers`."""
    numbers, clip = [layout.number for layout in context.layouts], context.vlm.clip
    if clip:
        return [frame_id(image_id, clip.numbers[i]) for i in numbers]
    return [f"{image_id}#{i + 1}" for i in numbers] if len(numbers) > 1 else [image_id]


def _protocol(
    context: Context, method: TokenExplainer, given: bool, views: Views
) -> dict[str, Any]:
    vlm = context.vlm
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    video = {}
    if vlm.clip:
        numbers = [layout.number for layout in context.layouts]
        shown, each = [vlm.clip.numbers[i] for i in numbers], context.frames_per_map
        video = {"video": {"fps": vlm.clip.fps, "frames": shown, "frames_per_map": each}}
    return {
        **video,
        "xattn": __version__,
        "vlm": {"name": vlm.name, "class": type(vlm.model).__name__, "dtype": str(vlm.model.dtype)},
        "explainer": method.name,
        "options": options,
        "score": context.score,
        "instead": {f"{i} {context.words[i].text}": t for i, t in context.instead.items()},
        "answer": "given" if given else "generated",
        "views": views,
        "classes": "words",
        "probability": "softmax",
    }


def _text_of(messages: Any) -> str:
    """The text of chat messages, with ``<image>`` at the positions of images."""
    parts = [part for message in messages for part in parts_of(message)]
    text = "\n".join(p["text"] if p.get("type") == "text" else PLACE for p in parts)
    return text.replace(f"\n{PLACE}", PLACE).replace(f"{PLACE}\n", PLACE)
