"""``explain_tokens``: what a vision-language model says of photos, with a map a word.

generation (attention is read meanwhile), words, log p with and without the image, each method's scores of
image tokens (W, n), maps (h, w) on the photo.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from xattn.explaining.naming import file_name_of, named_photos
from xattn.explaining.photos import report
from xattn.packs.answers import AnswerFacts, AnswerWord
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.writer import PackWriter, pack_writer
from xattn.photos.image_names import unique_id
from xattn.photos.images import MAX_PIXELS, load_image
from xattn.runtime.files import check_output
from xattn.runtime.memory import ForwardBatches, is_out_of_memory
from xattn.runtime.option_checks import Count, check
from xattn.runtime.version import __version__
from xattn.vlm.answer import Answer, Answers, Maps
from xattn.vlm.explainers.base import (
    TOKEN_EXPLAINERS,
    Context,
    Score,
    TokenExplainer,
    TokenScores,
    create_token_explainer,
    guarded,
)
from xattn.vlm.layout import locate
from xattn.vlm.model import VLM
from xattn.vlm.words import Word, spans_of, word_number, words_of

LEAST = -1e4  # log p
NEEDED = 0.1  # nats that a word loses without the image, from which on it is "visual"


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
) -> Answers:
    """Explain the words of a vision-language model's answers about photos.

    Args:
        images: as in :func:`xattn.explain`, each photo a conversation of its own. Photos in a tuple are
            shown together, in its order; a list may hold such tuples.
        vlm: of :func:`~xattn.vlm.loading.load_vlm`.
        prompt: text, with ``<image>`` where the images stand, else before the text; or chat messages.
        answer: a text to explain instead of a generated one, or one for each photo.
        explainer: a name of ``xattn list token-explainers``, a token explainer, or several in a list.
        words: words, numbers of words, or ("fork", 2) for the second; by default all; ``"visual"``: those
            that lose at least 0.1 nats without the image.
        instead: ``{"cat": "dog"}``: the score is log p(cat) - log p(dog), of the first token of each.
        score: what perturbation and gradients are of: ``"log_prob"``, the sum over a word's tokens, or
            ``"logit"``.
        generate: options of the model's ``generate``; greedy by default, and sampled with ``seed``.
        output: folder of a pack to write, photo by photo; none is written where no word was explained.
        batch_size: sequences in a pass, halved where memory runs out.
        overlays: also write pictures of the maps into the pack, which may take longer than the answer.
        keep: return at most so many answers, of ``.total``; ``output`` has all.

    Returns:
        An answer a photo. Photos that cannot be read, or whose answer lacks a word that was asked for, are
        skipped with a warning and listed in ``.skipped``; a single one raises.

    Raises:
        ValueError: an argument that does not fit, which is named first.
        OSError: a missing path.
    """
    check("batch_size", batch_size, Count)
    check("score", score, Score)
    if vlm.model.training:
        raise ValueError("vlm: the model is in training mode; call model.eval() first")
    methods = _methods(explainer, seed)
    if output is not None:
        check_output(Path(output))
    asked = _conversations(images)
    texts = _texts(answer, len(asked))
    about = (prompt, words, dict(instead or {}), score, max_new_tokens, dict(generate or {}), seed)
    found = Answers()
    with ExitStack() as stack:
        writer: PackWriter | None = None
        bar = tqdm(asked, "explain", unit="photo", disable=not progress or len(asked) == 1)
        for (name, sources), text in zip(bar, texts, strict=True):
            try:
                photos = [load_image(source, max_pixels) for source in sources]
                with guarded(vlm):
                    made = _explained(vlm, methods, name, sources, photos, text, batch_size, *about)
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                if len(asked) == 1 or not _of_photo(error):
                    raise
                found.skipped.append((name, str(error)))
                continue
            found.add(made, keep)
            if output is not None and made.maps:
                if writer is None:
                    writer = stack.enter_context(pack_writer(output, overlays, keep=True))
                    writer.skipped = found.skipped
                _write(writer, made)
            elif output is not None:
                found.skipped.append((name, "answer: no word of it was explained"))
    return _reported(found, missing=output is not None and writer is None)


def _reported(found: Answers, missing: bool) -> Answers:
    """Warn of what was skipped, or of a pack that is ``missing``."""
    if missing and found.total:
        warnings.warn("output: no word was explained, so no pack was written", stacklevel=3)
    elif found.skipped:
        report(found.skipped, found.total)
    return found


def _write(writer: PackWriter, answer: Answer) -> None:
    """Add the maps of each of its photos."""
    photos: dict[str, list[Explanation]] = {}
    for one in answer.explanations:
        photos.setdefault(one.image_id, []).append(one)
    for group in photos.values():
        writer.add(group)


def _of_photo(error: Exception) -> bool:
    """Whether an error is of one photo, and not of all of them."""
    return (
        isinstance(error, OSError)
        or is_out_of_memory(error)
        or str(error).startswith(
            ("image", "photo", "words", "instead", "max_new_tokens", "map", "answer")
        )
    )


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


def _conversations(images: Any) -> list[tuple[str, list[Any]]]:
    """The id of each conversation, and its photos."""
    if isinstance(images, tuple):
        images = [images]
    if not (isinstance(images, list) and any(isinstance(item, tuple) for item in images)):
        return [(name, [source]) for name, source in named_photos(images)]
    found, taken = [], set[str]()
    for number, group in enumerate(images):
        photos = list(group) if isinstance(group, tuple) else [group]
        own = named_photos(photos)
        if len(own) != len(photos):
            raise ValueError("images: one of a tuple holds several photos; name each of them")
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
    vlm: VLM,
    methods: Sequence[TokenExplainer],
    name: str,
    sources: Sequence[Any],
    photos: Sequence[Image.Image],
    text: str | None,
    batch_size: int,
    prompt: Any,
    words: Any,
    instead: Mapping[Any, str],
    score: Score,
    max_new_tokens: int,
    generate: Mapping[str, Any],
    seed: int,
) -> Answer:
    """One conversation, see :func:`explain_tokens`."""
    inputs = vlm.inputs(photos, prompt)
    prompt_ids, seen, logits, entered = inputs["input_ids"][0].cpu(), {}, None, None
    if text is None:
        with ExitStack() as stack:
            for method in methods:
                if method.watches:
                    seen[method.name] = stack.enter_context(method.watch(vlm, prompt_ids))
            made = vlm.generate(inputs, max_new_tokens, generate, seed, logits=True)
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
        layouts=locate(vlm, photos, prompt, inputs, len(entered.features)),
        score=score,
        instead=_instead(vlm.tokenizer, said, ids, found, instead),
        batches=ForwardBatches(batch_size),
    )
    log_probs, lost = _need(context, logits)
    own = replace(context, asked=_asked(words, found, lost))
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
    maps: dict[int, dict[str, Maps]] = {i: {} for i in own.asked}
    for method in methods if own.asked else ():
        protocol = _protocol(own, method, text is not None)
        for i, of_word in _maps(own, scores[method.name], shown, method, protocol, sources):
            maps[i][method.name] = of_word
    return replace(shown, maps=_with_facts(shown, maps))


def _tokens(context: Context) -> tuple[tuple[str, bool], ...]:
    """The text of each text token, with the white space before it, and whether it is of the prompt."""
    tokenizer, ids = context.vlm.tokenizer, context.sequence[context.text].tolist()
    text, spans = spans_of(tokenizer, ids)
    shown = [text[a:b] or tokenizer.decode([i]) for i, (a, b) in zip(ids, spans, strict=True)]
    return tuple(zip(shown, (context.text < len(context.prompt_ids)).tolist(), strict=True))


def _need(context: Context, logits: Tensor | None) -> tuple[Any, Any]:
    """(W,) log p of each word, and what it loses where every image token is the mean one."""
    f = context.features
    without = context.fill.expand_as(f)
    with torch.no_grad():
        if logits is not None:
            ids = context.ids.to(logits.device)[:, None]
            own = logits.log_softmax(1).gather(1, ids)[:, 0]
            other = context.log_probs(without[None])[0]
        else:
            both = context.batches.run(context.log_probs, torch.stack([f, without]))
            own, other = torch.cat(both)
    tokens = [list(word.tokens) for word in context.words]
    log_probs = torch.stack([own[t].sum() for t in tokens]).cpu()
    log_probs = log_probs.float().clamp_min(LEAST)  # a probability of 0 has a number, too
    without = torch.stack([other[t].sum() for t in tokens]).cpu().float().clamp_min(LEAST)
    return log_probs.numpy(), (log_probs - without).numpy()


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
    """By number of a word the first token of the other one."""
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
            raise ValueError(
                f"instead: {words[i].text!r} has other tokens in this answer than by itself; choose "
                f"another word"
            )
        if at is None:
            raise ValueError(
                f"instead: {other!r} starts with the same token as {words[i].text!r}; give a word that "
                f"starts otherwise"
            )
        if len(new) > at + 1:
            parts = "+".join(repr(tokenizer.decode([t]).strip()) for t in new[at:])
            warnings.warn(f"instead: {other!r} starts as {parts}; its first counts", stacklevel=5)
        made[i] = new[at]
    return made


def _maps(
    context: Context,
    scores: TokenScores,
    answer: Answer,
    method: TokenExplainer,
    protocol: dict[str, Any],
    sources: Sequence[Any],
) -> Iterator[tuple[int, Maps]]:
    """By number of the word what a method says of it."""
    image = scores.image.detach().float().cpu().numpy()
    text = None if scores.text is None else scores.text.detach().float().cpu().numpy()
    of_prompt = np.array([of_prompt for _, of_prompt in answer.tokens], bool)
    several = len(sources) > 1
    on_photos = [layout.maps(image) for layout in context.layouts]
    unplaced = [layout.unplaced(np.abs(image)) for layout in context.layouts]
    title = TOKEN_EXPLAINERS.entry(method.name).title if method.name in TOKEN_EXPLAINERS else ""
    for j, i in enumerate(context.asked):
        whole, parts = float(np.abs(image[j]).sum()), None
        explanations = tuple(
            Explanation(
                map=maps[j],
                target=i,
                target_name=answer.words[i].text,
                probability=min(float(answer.probabilities[i]), 1.0),
                method=method.name,
                method_title=title,
                view=context.layouts[k].view.check_size(),
                image_id=f"{answer.image_id}#{k + 1}" if several else answer.image_id,
                protocol={
                    **protocol,
                    "layout": context.layouts[k].source,
                    "unplaced": float(unplaced[k][j]) / whole if whole else 0.0,
                },
                file_name=file_name_of(sources[k]),
                source=sources[k],
            )
            for k, maps in enumerate(on_photos)
        )
        if text is not None:
            sizes = whole, *(float(np.abs(text[j][part]).sum()) for part in (of_prompt, ~of_prompt))
            total = sum(sizes) or 1.0
            parts = sizes[0] / total, sizes[1] / total, sizes[2] / total
        yield i, Maps(explanations, None if text is None else text[j], parts)


def _with_facts(
    answer: Answer, maps: Mapping[int, Mapping[str, Maps]]
) -> dict[int, dict[str, Maps]]:
    """``maps`` whose explanations know the answer, as packs keep it."""
    words = []
    for i, word in enumerate(answer.words):
        own = maps.get(i, {}).items()
        shares = {name: m.shares for name, m in own if m.shares is not None}
        sources = {name: tuple(m.text.tolist()) for name, m in own if m.text is not None}
        log_prob, lost = float(answer.log_probs[i]), float(answer.lost[i])
        p = float(answer.probabilities[i])
        words.append(AnswerWord(word.text, word.span, log_prob, lost, p, shares, sources))
    tokens = tuple(token for token, _ in answer.tokens)
    told_of = AnswerFacts(answer.prompt, answer.text, tuple(words), tokens, answer.asked)
    facts = ImageFacts(answer=told_of)

    def told(m: Maps) -> Maps:
        return replace(m, explanations=tuple(replace(e, facts=facts) for e in m.explanations))

    return {i: {name: told(m) for name, m in of.items()} for i, of in maps.items()}


def _protocol(context: Context, method: TokenExplainer, given: bool) -> dict[str, Any]:
    vlm = context.vlm
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    return {
        "xattn": __version__,
        "vlm": {"name": vlm.name, "class": type(vlm.model).__name__, "dtype": str(vlm.model.dtype)},
        "explainer": method.name,
        "options": options,
        "score": context.score,
        "instead": {f"{i} {context.words[i].text}": t for i, t in context.instead.items()},
        "answer": "given" if given else "generated",
        "classes": "words",
        "probability": "softmax",
    }


def _text_of(messages: Any) -> str:
    """The text of chat messages."""
    parts = []
    for message in messages:
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts += [part["text"] for part in content if part.get("type") == "text"]
    return "\n".join(parts)
