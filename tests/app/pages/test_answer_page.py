"""The page Answer, walked in Chromium: words by pointer and keys, methods, two photos, a clip, the address;
painting over a photo asks the model again."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import served_viewer

pytest.importorskip("streamlit")
pytest.importorskip("transformers")

import vlm_models
from small_explanations import make
from synthetic_packs import small_pack
from viewer_pages import SPOKEN, answer, of_clip, of_words, opened, served, shot

from xattn.app import models, state
from xattn.app.library import Library
from xattn.app.pages import answer as page_of_answer
from xattn.packs.answers import AnswerFacts
from xattn.packs.writer import save_pack
from xattn.vlm.explain import explain_tokens
from xattn.vlm.loading import load_vlm

SAID = "a red fork and"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a small model."""
    return vlm_models.save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("answers") / "root"
    words = of_words("photo.png", 0, answer())
    dog = replace(make("photo.png", 2, "gradcam", "whole"), facts=words[0].facts)
    save_pack(root / "one", [*words, dog], overlays=False)  # as merged with a classifier's pack
    pair = answer(SPOKEN[:1])
    together = [e for k in (1, 2) for e in of_words(f"two#{k}", k, pair, SPOKEN[:1], (1, 2))]
    save_pack(root / "two", together, overlays=False)
    save_pack(root / "clip", of_clip(8, pair), overlays=False)
    empty = AnswerFacts("What?", "", ())
    save_pack(root / "empty", of_words("none.png", 0, empty, SPOKEN[:1], (0,)), overlays=False)
    photos = (vlm_models.photo(0, 48, 64), vlm_models.photo(1, 64, 48))
    explain_tokens(photos, load_vlm(model), "what is it ?", SAID, output=root / "said")
    small_pack(root / "classes", 1, ("gradcam",))
    return root


@pytest.fixture(scope="module")
def address(root, model, tmp_path_factory):
    ids = {info.name: info.id for info in Library(root).packs()}
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with served(root, "--vlm", str(model), "--device", "cpu", log=log) as base:
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
    assert page.locator(".answer .method").count() == len(SPOKEN)
    shot(page, "answer")


def place(page, at, x, y):
    """Point at a place of a photo, in shares of it."""
    frame = page.locator(".answer .frame").nth(at)
    frame.scroll_into_view_if_needed()
    box = served_viewer.box(frame)
    page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)


def coloured(page, text, share):
    """Wait until a word is coloured by this share."""
    word(page, text).and_(page.locator(f"[style*='--share: {share}']")).wait_for()


def test_a_place_of_the_photo_colours_the_words_whose_maps_have_it(address, open_page):
    page = open_page(address("one"))
    page.locator(".answer .frame").wait_for()
    place(page, 0, 0.1, 2.5 / 7)
    share = "element => element.style.getPropertyValue('--share')"
    coloured(page, "fork", "1.000")
    assert float(word(page, "cup").evaluate(share)) == 0
    page.mouse.move(5, 5)
    assert float(word(page, "fork").evaluate(share)) == 0
    tokens = page.locator(".answer .token")
    shades = tokens.evaluate_all(f"all => all.map({share})")
    assert [float(shade) for shade in shades] == [0, 0, 1, 0]  # fork is word 2 of the answer


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_photos_of_one_conversation_are_walked_together(address, open_page, size):
    page = open_page(address("two", "&image=two%232"), size, "dark")
    frames = page.locator(".answer .frame")
    frames.nth(1).wait_for()
    assert frames.count() == 2
    one, other = served_viewer.boxes(frames.nth(0), frames.nth(1))
    assert one["x"] + one["width"] < other["x"] if size == "wide" else one["y"] < other["y"]
    assert "low=0.0&high=3.0" in picture(page).get_attribute("src")  # one scale for both
    said = page.locator(".said")
    word(page, "and").hover()
    said.get_by_text(re.compile("no map by this method$")).wait_for()
    word(page, "red").focus()
    page.keyboard.press("ArrowRight")
    said.get_by_text(re.compile("^fork")).wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("word=2"))
    place(page, 1, 0.1, 2.5 / 7)
    coloured(page, "fork", "1.000")
    place(page, 0, 0.1, 2.5 / 7)
    coloured(page, "fork", "0.667")  # of the greatest value on both
    page.get_by_text("Numbers").click()
    page.get_by_text("was not read from the image, even if its map looks convincing").wait_for()
    shot(page, f"answer-two-{size}")


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_frames_of_a_clip_are_a_strip(address, open_page, size):
    page = open_page(address("clip", "&image=walk.mp4%23frame-000003"), size)
    said, strip = page.locator(".said"), page.locator(".answer .photos")
    said.get_by_text(re.compile("^fork")).wait_for()
    assert page.locator(".answer figcaption").all_inner_texts()[:3] == [
        "0.00 s",
        "0.25 s",
        "0.50 s",
    ]
    page.get_by_text("Each map covers 2 frames, of which the first is shown.").wait_for()
    boxes = served_viewer.boxes(*(page.locator(".answer .frame").nth(i) for i in (0, 7)))
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert page.locator(".answer .own").all_inner_texts() == ["0.25 s"]  # the frame of the address
    before = picture(page, 7).get_attribute("src")
    word(page, "cup").hover()
    said.get_by_text(re.compile("^cup")).wait_for()
    assert picture(page, 7).get_attribute("src") != before
    place(page, 1, 0.1, 5.5 / 7)
    coloured(page, "cup", "0.250")
    strip.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "strip => strip.scrollLeft > 0 || strip.scrollWidth <= strip.clientWidth",
        arg=strip.element_handle(),
    )
    page.mouse.move(5, 5)
    word(page, "red").focus()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("word=1"))
    shot(page, f"answer-clip-{size}")


def test_answers_stack_on_a_narrow_screen(address, open_page):
    page = open_page(address("one"), "narrow")
    page.locator(".answer .frame").wait_for()
    parts = (page.locator(f".answer .{name}") for name in ("frame", "words"))
    frame, words = served_viewer.boxes(*parts)
    assert words["y"] >= frame["y"] + frame["height"]
    word(page, "cup").click()
    page.locator(".said").get_by_text(re.compile("^cup")).wait_for()
    shot(page, "answer-narrow-stacked")


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_painting_over_a_photo_asks_the_model_again(address, open_page, size):
    page = open_page(address("said"), size, "dark" if size == "narrow" else "light")
    page.get_by_text("What if a part of the photo is hidden?").click()
    canvas = page.locator(f".st-key-{page_of_answer.KEY}canvas .canvas")
    canvas.wait_for()
    page.get_by_text("Paint over a part of the photo. The number below each word is its").wait_for()
    spoken = page.locator(".again .w")
    assert [text.split("\n")[0] for text in spoken.all_inner_texts()] == SAID.split()
    canvas.focus()
    for key in ("ArrowUp", "Enter", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    page.get_by_text(re.compile("of the photo is hidden. Below each word stands")).wait_for()
    box = served_viewer.box(canvas)
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.4 * box["height"], steps=4)
    page.mouse.up()
    page.locator("[data-test-script-state=notRunning]").wait_for()
    assert all(re.search(r"\d% → [\d.]+%", text) for text in spoken.all_inner_texts())
    shot(page, f"answer-whatif-{size}")


def test_the_model_is_asked_about_the_changed_photos(root, model, monkeypatch):
    vlm = load_vlm(model)
    library = Library(root)
    pack = library.open({info.name: info.id for info in library.packs()}["said"])
    told, photos = pack.facts_of(pack.image_ids[0]).answer, [vlm_models.photo(i) for i in range(2)]
    [again] = explain_tokens([tuple(photos)], vlm, told.prompt, told.text)
    found = page_of_answer.probabilities(vlm, photos, told)
    assert found.tolist() == pytest.approx(again.probabilities.tolist(), rel=1e-4)
    other = replace(told, text="a blue fork and")
    with pytest.raises(ValueError, match="has other words"):
        page_of_answer.probabilities(vlm, photos, other)


def test_a_question_of_chat_messages_is_asked_again_or_refused(model):
    vlm, photo = load_vlm(model), vlm_models.photo()
    asked = {"type": "text", "text": "what is it ?"}
    user = {"role": "user", "content": [asked, {"type": "image"}, asked]}
    [said] = explain_tokens(photo, vlm, [user], SAID)
    told = said.of(0).explanations[0].facts.answer
    found = page_of_answer.probabilities(vlm, [photo], told)
    assert found.tolist() == pytest.approx(said.probabilities.tolist(), rel=1e-4)
    roles = "{% for message in messages %}{{ 'the ' if message['role'] == 'system' else '' }}"
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("{% for message in messages %}", roles)
    system = {"role": "system", "content": [{"type": "text", "text": "describe the dog"}]}
    [said] = explain_tokens(photo, vlm, [system, user], SAID)
    told = said.of(0).explanations[0].facts.answer
    with pytest.raises(ValueError, match="The question was a list of chat messages"):
        page_of_answer.probabilities(vlm, [photo], told)


def test_maps_of_a_classifier_are_no_words(tmp_path, monkeypatch):
    facts = answer(SPOKEN[:1])
    words = of_words("photo.png", 0, facts, ("rise",), (1, 2))
    save_pack(tmp_path / "p", [make("photo.png", 5, "rise", "whole"), *words], overlays=False)
    pack = opened_pack(tmp_path)
    texts = tuple(word.text for word in facts.words)
    maps = page_of_answer._maps(pack, ("photo.png",), ("rise",), 64, texts)
    assert sorted(maps[0][0]) == [1, 2]


def test_photos_and_frames_beyond_those_shown(tmp_path):
    facts = answer(SPOKEN[:1])
    many = [e for k in range(1, 41) for e in of_words(f"two#{k}", k, facts, SPOKEN[:1], (1,))]
    lacks = [e for k in (2, 3) for e in of_words(f"few#{k}", k, facts, SPOKEN[:1], (1,))]
    classes = [make(f"walk.mp4#frame-{3 * i:06d}", 1, "rise", "whole") for i in range(48)]
    save_pack(tmp_path / "p", [*many, *lacks, *classes, *of_clip(48, facts)], overlays=False)
    pack = opened_pack(tmp_path)

    def shown(name):
        return page_of_answer._together(pack, name, facts).ids

    assert shown("two#40")[-2:] == ["two#32", "two#40"]
    for name in ("two#40", "two#1", "few#2"):
        assert not page_of_answer._all_there(pack, shown(name), name)
    assert page_of_answer._all_there(pack, ["two#1"], "few.png") is False
    frames = shown("walk.mp4#frame-000003")
    assert frames[:3] == [f"walk.mp4#frame-{n:06d}" for n in (0, 3, 6)] and len(frames) == 25


def opened_pack(root):
    library = Library(root)
    return library.open(library.packs()[0].id)


@pytest.mark.parametrize("query", ["word=99", "word=-1", "word=x&method=y", "word=1&word=2"])
def test_addresses_that_name_no_word_show_the_usual_one(address, open_page, query):
    page = open_page(address("one", f"&{query}"))
    page.locator(".answer .said").get_by_text(re.compile("^(fork|cup)")).wait_for()


def test_an_empty_answer_says_so(address, open_page):
    page = open_page(address("empty"))
    page.get_by_text("The model's answer on this photo is empty.").wait_for()


def test_a_pack_without_answers_says_how_to_make_one(root, monkeypatch):
    monkeypatch.setattr(state, "_settings", state.Settings(root=root))
    library = Library(root)
    monkeypatch.setattr(state, "library", lambda: library)
    pack = library.open({info.name: info.id for info in library.packs()}["classes"])
    monkeypatch.setattr(models, "vlm", lambda: pytest.fail("nothing asks the model"))
    app = opened(script, pack=pack.id)
    assert "no answer of a vision-language model" in app.info[0].value
    assert app.code[0].value.startswith("xattn caption")


def script() -> None:
    import streamlit as st

    from xattn.app import main

    st.session_state["_page"] = "answer"
    main._run("answer")
