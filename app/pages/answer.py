"""The Answer page: a vision-language model's answer about a photo, with a map of every word."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from xattn.app import components, models, state
from xattn.app.navigation import address, last_view
from xattn.app.pages.image.display import SIDE
from xattn.app.pictures.rendering import Look, map_cells, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.app.triage import selection
from xattn.packs.answers import AnswerFacts, AnswerWord, frame_id
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from xattn.packs.reader import Pack
    from xattn.vlm.model import VLM

KEY = "answer"  # of the component
MOST_PHOTOS = 32  # most photos shown together
FRAME_SIDE = 256  # pixels of a frame's longer side
MOST_FALL = 4  # a word that falls by this many nats or more has the strongest colour


class ShownPhotos(NamedTuple):
    """The photos that are shown together, with the maps of the words on each photo. If they are the frames
    of a clip, ``seconds`` are their times, and ``frames_per_map`` is the number of frames that share a
    map."""

    ids: list[str]
    entries: list[pd.DataFrame]
    seconds: list[float] | None = None
    frames_per_map: int = 1

    @property
    def side(self) -> int:
        """The longer side of each picture in pixels."""
        return SIDE if self.seconds is None else FRAME_SIDE


def page(context: Context) -> None:
    """Show the answer about the photo that the URL names, or about the first photo of the pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = last_view.photo_bar(
        pack, "answer", "answer_", lambda: {"method": st.query_params.get("method")}
    )
    answer = pack.facts_of(image_id).answer
    if answer is None or not answer.words:
        st.info(
            "This photo has no answer of a vision-language model."
            if answer is None
            else "The model's answer on this photo is empty."
        )
        st.caption("A pack of answers is made by:")
        components.command('xattn caption photos/ --vlm transformers:OWNER/NAME --prompt "..."')
        return
    shown = _together(pack, image_id, answer)
    if not shown.ids:
        st.info("No word of this answer has a map.")
        return
    _answer(pack, shown, image_id, answer)
    _what_if(pack, shown, image_id, answer)
    _numbers(pack, answer)


def _together(pack: Pack, image_id: str, answer: AnswerFacts) -> ShownPhotos:
    """The photos of one conversation, or the frames of a clip, whose words have maps."""
    table, words = selection.table(pack), _texts(answer)
    stem, mark, number = image_id.rpartition("#")
    names, clip = [image_id], None
    if mark and number.isdigit():
        names = list(dict.fromkeys([*_numbered(stem, MOST_PHOTOS), image_id]))
    elif mark and len(own := _of_words(pack, image_id, words)):
        record = pack.provenance(own.index[0])["protocol"].get("video")
        clip = _clip(record, lambda i: frame_id(stem, i) == image_id)
        names = [frame_id(stem, i) for i in clip[0]] if clip else names
    there = [name for name in names if table.image(name) is not None]
    found = {n: own for n in there if len(own := _of_words(pack, n, words))}
    ids, entries = [*found], [*found.values()]
    if clip is None:
        return ShownPhotos(ids, entries)
    seconds = [int(name.rpartition("-")[2]) / clip[1] for name in ids]
    return ShownPhotos(ids, entries, seconds, clip[2])


def _numbered(stem: str, count: int) -> list[str]:
    """The ids of photos that were shown together."""
    return [f"{stem}#{i + 1}" for i in range(count)]


def _all_there(pack: Pack, ids: list[str], image_id: str) -> bool:
    """Whether ``ids`` are all photos that were shown, judging by their numbers."""
    stem, mark, number = image_id.rpartition("#")
    if not mark or not number.isdigit():
        return ids == [image_id]
    *before, after = _numbered(stem, len(ids) + 1)
    return ids == before and image_id in ids and selection.table(pack).image(after) is None


def _clip(
    record: Any, own: Callable[[int], bool] = lambda number: False
) -> tuple[list[int], float, int] | None:
    """From a clip's record: the numbers of at most ``MOST_PHOTOS`` evenly spaced frames and of the
    page's ``own`` frame, the frames per second, and the frames per map. None if this is not a clip's
    record."""
    if not isinstance(record, Mapping):
        return None
    frames, fps, each = (record.get(name) for name in ("frames", "fps", "frames_per_map"))
    if not isinstance(frames, list) or not all(type(i) is int and 0 <= i < 1e9 for i in frames):
        return None
    if not isinstance(fps, int | float) or not 0 < fps < 1e6:
        return None
    step = max(math.ceil(len(frames) / MOST_PHOTOS), 1)
    numbers = [number for i, number in enumerate(frames) if i % step == 0 or own(number)]
    return numbers, float(fps), each if type(each) is int else 1


def _answer(pack: Pack, shown: ShownPhotos, image_id: str, answer: AnswerFacts) -> None:
    texts = _texts(answer)
    methods = list(dict.fromkeys(shown.entries[0]["method"]))
    word, method = _asked(answer, methods)
    maps = _maps(pack, tuple(shown.ids), tuple(methods), shown.side, texts)
    titles = [selection.table(pack).title(name) for name in shown.ids]
    if shown.seconds is not None:
        titles = [f"{seconds:.2f} s" for seconds in shown.seconds]
    components.answer(
        KEY,
        subject=f"{pack.id} {shown.ids[0]}",
        photos=[
            {
                "title": titles[i],
                "own": name == image_id and len(shown.ids) > 1,
                "src": photo_url(pack, name, shown.side),
                "aspect": _aspect(pack, shown.entries[i].index[0]),
                "maps": [[of.get(k) for k in range(len(answer.words))] for of in maps[i]],
            }
            for i, name in enumerate(shown.ids)
        ],
        clip=shown.seconds is not None,
        words=[_word(answer, i, methods) for i in range(len(answer.words))],
        after=answer.text[answer.words[-1].span[1] :],
        methods=[{"name": m, "title": pack.title_of(m)} for m in methods],
        prompt=answer.tokens[: answer.asked] if answer.asked else (answer.prompt,),
        word=word,
        method=methods.index(method),
        label="Words of the answer",
        on_pick=lambda: _picked(answer, methods),
    )
    if shown.frames_per_map > 1:
        st.caption(f"Each map covers {shown.frames_per_map} frames, of which the first is shown.")


def _texts(answer: AnswerFacts) -> tuple[str, ...]:
    return tuple(word.text for word in answer.words)


def _of_words(pack: Pack, image_id: str, words: tuple[str, ...]) -> pd.DataFrame:
    """The maps of words; a merged pack may also have maps of a classifier's classes."""
    entries = selection.table(pack).entries_of(image_id)
    return entries[entries["target"].map(dict(enumerate(words))) == entries["target_name"]]


def _asked(answer: AnswerFacts, methods: Sequence[str]) -> tuple[int, str]:
    """The word and the method in the URL, else the word that needs the image most and the first method."""
    words = answer.words
    most = max(range(len(words)), key=lambda i: words[i].lost)
    number, method = st.query_params.get("word", ""), st.query_params.get("method", "")
    word = int(number) if number.isascii() and number.isdigit() and len(number) < 6 else most
    return word if word < len(words) else most, method if method in methods else methods[0]


def _picked(answer: AnswerFacts, methods: Sequence[str]) -> None:
    chosen = components.sent_value(KEY, "pick")
    if not isinstance(chosen, dict):
        return
    word, method = chosen.get("word"), chosen.get("method")
    if isinstance(word, int) and 0 <= word < len(answer.words) and method in methods:
        st.query_params["word"] = str(word)
        st.query_params["method"] = str(method)


def _aspect(pack: Pack, entry_id: str) -> float:
    height, width = pack.view(entry_id).photo_size
    return width / height


@state.cache_by_version(entries=8)
def _maps(
    pack: Pack, ids: tuple[str, ...], methods: tuple[str, ...], side: int, words: tuple[str, ...]
) -> list[list[dict[int, dict[str, Any]]]]:
    """For each photo and method, the map of each explained word; all photos share one scale."""
    tables = [_of_words(pack, name, words) for name in ids]
    every = pd.concat(tables).groupby(["method", "target"])
    low, high = every["min"].min(), every["max"].max()
    found = []
    for table in tables:
        of_photo: list[dict[int, dict[str, Any]]] = [{} for _ in methods]
        for entry_id, method, word in zip(
            table.index, table["method"], table["target"], strict=True
        ):
            if method not in methods:
                continue
            look, limits = Look(side=side), (float(low[method, word]), float(high[method, word]))
            if len(ids) > 1:
                look = replace(look, scale="shared", limits=limits)
            try:
                cells = map_cells(pack.explanation(entry_id), False)
            except PackError:  # its picture says so
                cells = {"high": 0.0, "box": [0, 0, 1, 1]}
            of_photo[methods.index(method)][int(word)] = {
                **cells,
                "most": limits[1],
                "src": overlay_url(pack, entry_id, look),
            }
        found.append(of_photo)
    return found


def _word(answer: AnswerFacts, i: int, methods: Sequence[str]) -> dict[str, Any]:
    word = answer.words[i]
    before = answer.words[i - 1].span[1] if i else 0
    return {
        "number": i,
        "text": word.text,
        "before": answer.text[before : word.span[0]],
        "p": word.probability,
        "lost": word.lost,
        "shares": [_shares(word, m) for m in methods],
        "sources": [list(word.sources[m]) if m in word.sources else None for m in methods],
    }


def _shares(word: AnswerWord, method: str) -> str:
    if method not in word.shares:
        return ""
    image, prompt, said = word.shares[method]
    return f"{image:.0%} on the image, {prompt:.0%} on the prompt, {said:.0%} on the answer so far"


def _numbers(pack: Pack, answer: AnswerFacts) -> None:
    """Show the probabilities and losses of the words as a table."""
    columns: dict[str, list[Any]] = {
        "word": [word.text for word in answer.words],
        "p": [word.probability for word in answer.words],
        "nats lost without the image": [word.lost for word in answer.words],
    }
    for method in dict.fromkeys(m for word in answer.words for m in word.shares):
        title = pack.title_of(method)
        for k, part in enumerate(("image", "prompt", "answer")):
            columns[f"{title}: {part}"] = [
                word.shares[method][k] if method in word.shares else None for word in answer.words
            ]
    with st.expander("Numbers"):
        st.caption(
            plain(
                "A word that loses little without the image was not read from the image, even if "
                "its map looks convincing."
            )
        )
        st.dataframe(pd.DataFrame(columns).round(3), hide_index=True, width="stretch")


# ---------------------------------------------------------------------- what if


def _what_if(pack: Pack, shown: ShownPhotos, image_id: str, answer: AnswerFacts) -> None:
    """Let the person paint over a part of the photo and ask the model again, if the viewer has the
    model."""
    if shown.seconds is not None:
        return
    if state.settings().vlm is None:
        st.caption(
            "To paint over a part of the photo and see how the words' probabilities change, start "
            "the viewer with the model: `xattn app ROOT --vlm MODEL`"
        )
    elif not _all_there(pack, shown.ids, image_id):
        st.caption(
            "A part of the photo can be hidden only if all photos that were shown together are in "
            "this pack."
        )
    elif st.toggle("What if a part of the photo is hidden?", key=f"{KEY}whatif"):
        with st.spinner("Loading the model …"):
            vlm = models.vlm()
        _tried(pack, shown.ids, image_id, answer, vlm)


@st.fragment
def _tried(pack: Pack, ids: list[str], image_id: str, answer: AnswerFacts, vlm: VLM) -> None:
    """The part of the page that changes with a stroke; the rest does not run again."""
    try:
        _asked_again(pack, ids, image_id, answer, vlm)
    except ValueError as error:  # main.py catches errors only in the page's first run
        st.error(plain(error))


def _asked_again(pack: Pack, ids: list[str], image_id: str, answer: AnswerFacts, vlm: VLM) -> None:
    """Show the photo to paint on, and the words with their probabilities."""
    import torch

    from xattn.app.pages.whatif import page as whatif
    from xattn.app.pages.whatif.answer import FILLS, NetworkAnswer, fill_cells

    def ask(pixels: Tensor) -> Tensor:
        own = whatif.picture(pixels)
        photos = [own if name == image_id else pack.photo(name) for name in ids]
        with models.exclusive_pass("to ask the model again"):
            return probabilities(vlm, photos, answer)

    def see() -> NetworkAnswer:
        pixels = torch.from_numpy(np.array(pack.photo(image_id))).permute(2, 0, 1) / 255
        return NetworkAnswer(pixels, ask(pixels))

    subject = f"{pack.id} {pack.version} {image_id}"
    painting = whatif.painting_of((subject, vlm.name), see)
    kind = address.segmented("Fill", FILLS, "fill")
    pixels, after = painting.seen.pixels, None
    if painting.mask.any():
        pixels = fill_cells(pixels, painting.mask, kind, pixels.mean((1, 2)).tolist())
        changed = kind, painting.mask.tobytes()
        if changed not in painting.answered:  # any other click also runs the page again
            painting.answered = {changed: ask(pixels)}
        after = painting.answered[changed]
    st.html(_spoken(answer, painting.seen.answer, after))
    left, right = st.columns([5, 6], gap="large")
    with left:
        said = f"{painting.mask.mean():.0%} of the photo is hidden"
        whatif.canvas(painting, f"{KEY}canvas", subject, pixels, "The photo, to paint on", said)
    with right:
        st.caption(
            "Paint over a part of the photo. The number below each word is its probability."
            if after is None
            else f"{said}. Below each word stands its probability before and after."
        )
        st.caption(
            f"{plain(vlm.name)} was asked about the photo as it is stored in the pack (at most "
            "512 pixels per side)."
        )


def probabilities(vlm: VLM, photos: Sequence[Image.Image], answer: AnswerFacts) -> Tensor:
    """The probability (W,) of each word if the model sees ``photos``, as exp of the mean log p of its
    tokens.

    Raises:
        ValueError: the number of photos, the question or the words differ.
    """
    import torch

    from xattn.vlm.explainers.base import exclusive_use
    from xattn.vlm.words import token_texts, words_of

    ids = torch.tensor(vlm.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
    _, words = words_of(vlm.tokenizer, ids.tolist())
    if [word.text for word in words] != [word.text for word in answer.words]:
        raise ValueError(
            f"{vlm.name} has other words than the model that gave this answer; start the viewer with that"
        )
    with exclusive_use(vlm), torch.no_grad():
        inputs = vlm.inputs(photos, answer.prompt)
        forced = vlm.forced(inputs, ids)
        encoder = vlm.kind == "encoder"  # others hold the answer in the same sequence
        prompt = (inputs if encoder else forced.inputs)["input_ids"][0].cpu()
        prompt = prompt if encoder else prompt[: -len(ids)]
        text = np.delete(prompt.numpy(), vlm.image_places(prompt).numpy()).tolist()
        asked, added = token_texts(vlm.tokenizer, text), vlm.tokenizer.get_added_vocab()
        was = answer.tokens[: answer.asked]
        if was and _question(asked, added) != _question(was, added):
            raise ValueError(
                "The question was a list of chat messages, of which the pack has only the text; "
                "ask it in Python"
            )
        logits = vlm.logits(forced, vlm.entered(inputs))[0].cpu()
    own = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
    return torch.stack([own[list(word.tokens)].mean().exp() for word in words])


def _question(tokens: Iterable[str], added: Container[str]) -> str:
    """A prompt's text without the marks of photo parts and the white space, which depend on the photos'
    sizes."""
    return "".join("".join(t for t in tokens if t.strip() not in added).split())


def _spoken(answer: AnswerFacts, before: Tensor, after: Tensor | None) -> str:
    """The answer as HTML with a probability below each word; words whose probability fell are coloured."""
    parts, end = [], 0
    for i, word in enumerate(answer.words):
        p, falls = _percent(before[i]), 0.0
        if after is not None:
            p += f" → {_percent(after[i])}"
            falls = float((before[i].log() - after[i].log()) / MOST_FALL)
        parts.append(
            f"{html.escape(answer.text[end : word.span[0]])}"
            f'<span class="w" style="--falls:{min(max(falls, 0.0), 1.0):.0%}">{html.escape(word.text)}'
            f"<small>{p}</small></span>"
        )
        end = word.span[1]
    return (
        f'{_STYLE}<p class="again" dir="auto">{"".join(parts)}{html.escape(answer.text[end:])}</p>'
    )


def _percent(p: Tensor) -> str:
    return f"{p:.0%}" if p >= 0.1 else f"{p:.1%}"


_STYLE = """<style>
.again{margin:0;font-size:1.25rem;line-height:1.3}
.again .w{display:inline-flex;flex-direction:column;vertical-align:top;margin-bottom:.5rem;padding:0 2px;
border-radius:4px;background:color-mix(in srgb,var(--accent) calc(.5*var(--falls)),transparent)}
.again small{font-size:.75rem;font-variant-numeric:tabular-nums;white-space:nowrap}
</style>"""
