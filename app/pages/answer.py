"""What a vision-language model said of a photo: a map of every word, and whether it needs the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from xattn.app import components
from xattn.app.navigation import last_view
from xattn.app.pages.image.shown import SIDE
from xattn.app.pictures.rendering import Look, map_cells, overlay_url, photo_url
from xattn.app.state import Context, plain
from xattn.app.triage import selection
from xattn.packs.answers import AnswerFacts, AnswerWord
from xattn.packs.contained_files import PackError

if TYPE_CHECKING:
    from xattn.packs.reader import Pack

KEY = "answer"  # of the component
MOST_PHOTOS = 16  # that are shown together


def page(context: Context) -> None:
    """Show the answer on the photo that the URL names, or on the first of the pack."""
    pack = context.pack
    assert pack is not None, "main.py calls this page with a pack"
    image_id = last_view.photo_bar(
        pack, "answer", "answer_", lambda: {"method": st.query_params.get("method")}
    )
    answer = pack.facts_of(image_id).answer
    if answer is None or not answer.words:
        st.info(
            "No answer of a vision-language model is on this photo."
            if answer is None
            else "The model's answer on this photo is empty."
        )
        st.caption("A pack of answers is made by:")
        components.command('xattn caption photos/ --vlm transformers:OWNER/NAME --prompt "..."')
        return
    _answer(pack, _together(pack, image_id), answer)
    _numbers(pack, answer)


def _together(pack: Pack, image_id: str) -> list[str]:
    """The photos that were shown in one conversation, photo#1, photo#2, ..., or the photo alone."""
    stem, mark, number = image_id.rpartition("#")
    if not (mark and number.isdigit()):
        return [image_id]
    table = selection.table(pack)
    found = [f"{stem}#{i + 1}" for i in range(MOST_PHOTOS)]
    return [name for name in found if table.image(name) is not None]


def _answer(pack: Pack, photos: Sequence[str], answer: AnswerFacts) -> None:
    entries = {name: _of_words(selection.table(pack).entries_of(name), answer) for name in photos}
    own = entries[photos[0]]
    methods = list(dict.fromkeys(own["method"]))
    places = {
        name: {(m, int(t)): i for i, m, t in zip(e.index, e["method"], e["target"], strict=True)}
        for name, e in entries.items()
    }
    if not methods:
        st.info("No word of this answer has a map.")
        return
    word, method = _asked(answer, methods)
    prompt = answer.tokens[: answer.asked]
    components.answer(
        KEY,
        subject=f"{pack.id} {photos[0]}",
        photos=[
            {
                "title": selection.table(pack).title(name),
                "src": photo_url(pack, name, SIDE),
                "aspect": _aspect(pack, entries[name].index[0]),
                "maps": [
                    [_map(pack, entries, places, name, m, i) for i in range(len(answer.words))]
                    for m in methods
                ],
            }
            for name in photos
        ],
        words=[_word(answer, i, methods) for i in range(len(answer.words))],
        after=answer.text[answer.words[-1].span[1] :],
        methods=[{"name": m, "title": pack.title_of(m)} for m in methods],
        prompt=prompt if answer.asked else (answer.prompt,),
        word=word,
        method=methods.index(method),
        label="Words of the answer",
        on_pick=lambda: _picked(answer, methods),
    )


def _of_words(entries: pd.DataFrame, answer: AnswerFacts) -> pd.DataFrame:
    """The maps of words; a merged pack may have maps of a classifier's classes, too."""
    words = dict(enumerate(word.text for word in answer.words))
    return entries[entries["target"].map(words) == entries["target_name"]]


def _asked(answer: AnswerFacts, methods: Sequence[str]) -> tuple[int, str]:
    """The word and the method of the URL, else the word that needs the image most and the first method."""
    words = answer.words
    most = max(range(len(words)), key=lambda i: words[i].lost)
    number, method = st.query_params.get("word", ""), st.query_params.get("method", "")
    word = int(number) if number.isascii() and number.isdigit() and len(number) < 6 else most
    return word if word < len(words) else most, method if method in methods else methods[0]


def _picked(answer: AnswerFacts, methods: Sequence[str]) -> None:
    chosen = components.sent(KEY, "pick")
    if not isinstance(chosen, dict):
        return
    word, method = chosen.get("word"), chosen.get("method")
    if isinstance(word, int) and 0 <= word < len(answer.words) and method in methods:
        st.query_params["word"] = str(word)
        st.query_params["method"] = str(method)


def _aspect(pack: Pack, entry_id: str) -> float:
    height, width = pack.view(entry_id).photo_size
    return width / height


def _map(
    pack: Pack,
    entries: dict[str, pd.DataFrame],
    places: dict[str, dict[tuple[str, int], Any]],
    name: str,
    method: str,
    word: int,
) -> dict[str, Any] | None:
    """A word's map on one of the photos, all photos on one scale; None where it was not explained."""
    entry_id = places[name].get((method, word))
    if entry_id is None:
        return None
    look = Look(side=SIDE)
    if len(entries) > 1:
        found = [
            rows.loc[places[n][method, word]]
            for n, rows in entries.items()
            if (method, word) in places[n]
        ]
        limits = min(float(r["min"]) for r in found), max(float(r["max"]) for r in found)
        look = Look(side=SIDE, scale="shared", limits=limits)
    try:
        cells = map_cells(pack.explanation(entry_id), False)
    except PackError:  # its picture says so
        cells = {"high": 0.0, "box": [0, 0, 1, 1]}
    return {**cells, "src": overlay_url(pack, entry_id, look)}


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
    """The same as a table."""
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
                "A word that loses little without the image was not read off it, whatever its map shows."
            )
        )
        st.dataframe(pd.DataFrame(columns).round(3), hide_index=True, width="stretch")
