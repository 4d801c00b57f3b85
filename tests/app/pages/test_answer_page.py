"""The page Answer, walked in Chromium: words by pointer and keys, methods, two photos, the address."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("streamlit")

from small_explanations import SIZE, make, photo
from viewer_pages import served, shot

from xattn.app.library import Library
from xattn.packs.answers import AnswerFacts, AnswerWord
from xattn.packs.explanation import ImageFacts
from xattn.packs.writer import save_pack

WORDS = [("A", 0.0), ("red", 2.5), ("fork", 4.75), ("and", 0.02), ("a", 0.1), ("cup", 3.5)]
METHODS = ("attention", "occlusion")


def answer(methods=METHODS):
    text = "A red fork and a cup."
    words, at = [], 0
    for i, (word, lost) in enumerate(WORDS):
        start = text.index(word, at)
        at = start + len(word)
        shares = {methods[0]: (0.5, 0.3, 0.2)}
        sources = {methods[0]: [float(k == i % 4) for k in range(4)] + [0.0] * 6}
        words.append(AnswerWord(word, (start, at), -0.5, lost, 0.6, shares, sources))
    tokens = ("What", " is", " this", "?", *(w for w, _ in WORDS))
    return AnswerFacts("What is this?", text, tuple(words), tokens, 4)


def explained(image_id, seed, facts, methods=METHODS, words=(0, 1, 2, 3, 4, 5)):
    """A map a word and method whose one high place moves with the word."""
    made = []
    for m, method in enumerate(methods):
        for i in words:
            values = np.zeros((7, 5), np.float32)
            values[i, m] = 1 + seed
            one = make(image_id, i, method, "whole", seed, source=photo(seed, SIZE))
            made.append(
                replace(one, map=values, target_name=WORDS[i][0], facts=ImageFacts(answer=facts))
            )
    return made


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("answers") / "root"
    words = explained("photo.png", 0, answer())
    dog = replace(make("photo.png", 2, "gradcam", "whole"), facts=words[0].facts)
    save_pack(root / "one", [*words, dog], overlays=False)  # as merged with a classifier's pack
    pair = answer(METHODS[:1])
    together = [e for k in (1, 2) for e in explained(f"two#{k}", k, pair, METHODS[:1], (1, 2))]
    save_pack(root / "two", together, overlays=False)
    empty = AnswerFacts("What?", "", ())
    save_pack(root / "empty", explained("none.png", 0, empty, METHODS[:1], (0,)), overlays=False)
    ids = {info.name: info.id for info in Library(root).packs()}
    with served(root, log=tmp_path_factory.mktemp("log") / "log.txt") as base:
        yield lambda name, query="": f"{base}/answer?pack={ids[name]}{query}"


def word(page, text):
    return page.locator(".answer .word", has_text=re.compile(f"^{text}$"))


def picture(page, at=0):
    return page.locator(".answer .frame img").nth(at)


def test_words_show_their_maps_by_pointer_and_keys(address, open_page):
    page = open_page(address("one"))
    said = page.locator(".answer .said")
    said.get_by_text(re.compile("^fork: p 0.60 · loses 4.75 nats")).wait_for()  # needs it most
    first = picture(page).get_attribute("src")
    word(page, "red").hover()
    said.get_by_text(re.compile("^red: .*50% on the image, 30% on the prompt")).wait_for()
    assert picture(page).get_attribute("src") != first
    assert "word=" not in page.url  # pointing runs nothing
    page.mouse.move(5, 5)
    said.get_by_text(re.compile("^fork")).wait_for()
    word(page, "red").click()
    page.wait_for_url(re.compile("word=1&method=attention"))
    page.keyboard.press("End")
    said.get_by_text(re.compile("^cup")).wait_for()
    page.keyboard.press("ArrowLeft")
    said.get_by_text(re.compile("^a: ")).wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("word=4"))
    page.keyboard.press("2")
    page.wait_for_url(re.compile("word=4&method=occlusion"))
    shared = page.url
    page.reload()
    said.get_by_text(re.compile("^a: ")).wait_for()
    assert page.url == shared
    assert page.locator(".answer .method[aria-pressed=true]").inner_text() == "occlusion"
    assert page.locator(".answer .method").count() == len(METHODS)
    shot(page, "answer")


def test_a_place_of_the_photo_colours_the_words_whose_maps_have_it(address, open_page):
    page = open_page(address("one"))
    frame = page.locator(".answer .frame")
    frame.wait_for()
    box = frame.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 2.5 / 7)
    share = "element => element.style.getPropertyValue('--share')"
    word(page, "fork").and_(page.locator("[style*='--share: 1.000']")).wait_for()
    assert float(word(page, "cup").evaluate(share)) == 0
    page.mouse.move(5, 5)
    assert float(word(page, "fork").evaluate(share)) == 0


def test_photos_of_one_conversation_stand_side_by_side(address, open_page):
    page = open_page(address("two", "&image=two%232"))
    page.locator(".answer figure").nth(1).wait_for()
    assert page.locator(".answer figure").count() == 2
    assert "low=0.0&high=3.0" in picture(page).get_attribute("src")  # one scale for both
    word(page, "and").hover()
    page.locator(".said").get_by_text(re.compile("no map by this method$")).wait_for()
    page.get_by_text("Numbers").click()
    page.get_by_text("was not read off it, whatever its map shows").wait_for()
    shot(page, "answer-two")


def test_answers_stack_on_a_narrow_screen(address, open_page):
    page = open_page(address("one"))
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".answer .frame").wait_for()
    frame, words = (page.locator(f".answer .{name}").bounding_box() for name in ("frame", "words"))
    assert words["y"] >= frame["y"] + frame["height"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    word(page, "cup").click()
    page.locator(".said").get_by_text(re.compile("^cup")).wait_for()
    shot(page, "answer-narrow")


@pytest.mark.parametrize("query", ["word=99", "word=-1", "word=x&method=y", "word=1&word=2"])
def test_addresses_that_name_no_word_show_the_usual_one(address, open_page, query):
    page = open_page(address("one", f"&{query}"))
    page.locator(".answer .said").get_by_text(re.compile("^(fork|cup)")).wait_for()


def test_an_empty_answer_says_so(address, open_page):
    page = open_page(address("empty"))
    page.get_by_text("The model's answer on this photo is empty.").wait_for()
