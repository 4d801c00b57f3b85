"""A page by AppTest, a viewer in a process of its own, and what a person does in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import served_viewer
import torch
from safetensors.torch import save_file
from small_explanations import SIZE, make
from synthetic_packs import picture

from xattn.backbone import load_backbone
from xattn.explaining.photos import explain
from xattn.packs.answers import AnswerFacts, AnswerWord
from xattn.packs.explanation import ImageFacts
from xattn.packs.writer import save_pack


def opened(script: Callable[[], None], **params: str) -> Any:
    """The ``AppTest`` of a page's script, run once with these parameters in its URL, without an exception."""
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_function(script, default_timeout=600)
    for name, value in params.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception, page.exception
    return page


def run_viewer(**params: Any) -> Any:
    """The ``AppTest`` of the whole viewer at an address with these parameters."""
    from streamlit.testing.v1 import AppTest

    from xattn.app import state

    app = AppTest.from_file(state.SCRIPT, default_timeout=600)
    app.query_params.update(params)
    return checked(app.run())


def checked(app: Any) -> Any:
    """The same page, without an exception."""
    assert not app.exception, [e.value for e in app.exception]
    return app


def cells(app: Any) -> list[Any]:
    """What the first grid of a page was given, [] where there is none."""
    grids = [e for e in app.get("bidi_component") if "cells" in e.proto.json]
    return json.loads(grids[0].proto.json)["cells"] if grids else []


def only(root: Path) -> Any:
    """The one pack of a root, opened."""
    from xattn.app.library import Library

    library = Library(root)
    (info,) = library.packs()
    return library.open(info.id)


@contextmanager
def served(root: Path, *arguments: str, log: Path) -> Iterator[str]:
    """The address of ``xattn app root``, which runs until the block ends."""
    with served_viewer.served(root, log, *arguments) as (address, _):
        yield address


def vit_pack(folder: Path, side: int) -> list[str]:
    """A pack of two photos in ``folder/root/vit`` by a tiny ViT of ``side`` x ``side`` patches; returns
    the options by which the viewer is given that network."""
    pixels = side * 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = load_backbone("test_vit", weights=None, input_size=pixels)
    weights = folder / "vit.safetensors"
    save_file({k: v.contiguous() for k, v in backbone.model.state_dict().items()}, weights)
    photos = folder / "photos"
    photos.mkdir()
    for i in range(2):
        picture(i).save(photos / f"photo-{i}.png")
    save_pack(folder / "root" / "vit", explain(photos, backbone, explainer="rollout"))
    options = f"--backbone test_vit --weights {weights} --input-size {pixels} --device cpu"
    return options.split()


WORDS = [("A", 0.0), ("red", 2.5), ("fork", 4.75), ("and", 0.02), ("a", 0.1), ("cup", 3.5)]
SPOKEN = ("attention", "occlusion")  # methods that explain the words


def answer(methods: Sequence[str] = SPOKEN) -> AnswerFacts:
    """A red fork and a cup: words, of which each takes most from another token of the question."""
    text = "A red fork and a cup."
    words, at = [], 0
    for i, (word, lost) in enumerate(WORDS):
        start = text.index(word, at)
        at = start + len(word)
        shares = {methods[0]: (0.5, 0.3, 0.2)}
        sources = {methods[0]: tuple(float(k == i % 4) for k in range(4)) + (0.0,) * 6}
        words.append(AnswerWord(word, (start, at), -0.5, lost, 0.6, shares, sources))
    tokens = ("What", " is", " this", "?", *(w for w, _ in WORDS))
    return AnswerFacts("What is this?", text, tuple(words), tokens, 4)


def of_words(
    image_id: str,
    seed: int,
    facts: AnswerFacts,
    methods: Sequence[str] = SPOKEN,
    words: Sequence[int] = range(len(WORDS)),
    **protocol: Any,
) -> list[Any]:
    """A map a word and method whose one high place moves with the word."""
    made = []
    for m, method in enumerate(methods):
        for i in words:
            values = np.zeros((7, 5), np.float32)
            values[i, m] = 1 + seed
            one = make(image_id, i, method, "whole", seed, source=picture(seed, SIZE[::-1]))
            told = {"facts": ImageFacts(answer=facts), "protocol": {**one.protocol, **protocol}}
            made.append(replace(one, map=values, target_name=WORDS[i][0], **told))
    return made


def of_clip(frames: int, facts: AnswerFacts) -> list[Any]:
    """Every third of a clip's frames, at 12 frames a second, each with a map for two."""
    numbers = [3 * i for i in range(frames)]
    video = {"fps": 12.0, "frames": numbers, "frames_per_map": 2}
    return [
        one
        for i, number in enumerate(numbers)
        for one in of_words(f"walk.mp4#frame-{number:06d}", i, facts, SPOKEN[:1], video=video)
    ]


def choose_pack(page: Any, name: str) -> None:
    """Open another pack by the chip in the header."""
    page.locator(".st-key-pack-chip button").click()
    page.locator(".pack .title").get_by_text(name, exact=True).click()
    page.wait_for_url(re.compile(rf"pack={name}-"))  # what the next click is sent with
    page.locator(".st-key-pack-chip").get_by_text(name, exact=True).wait_for()
    if urlsplit(page.url).path == "/":
        page.get_by_role("heading", name=name, exact=True).wait_for()


def choose_option(page: Any, box: Any, name: str) -> None:
    """Open a list and click an option of it.

    The list closes when a run ends, so none may be under way.
    """
    page.locator("[data-test-script-state=notRunning]").wait_for()
    box.click()
    served_viewer.pointed_at(page, name).click()


def downloaded(page: Any, button: Any) -> Any:
    """What a click on a button downloads.

    The viewer makes the file after the click and forgets it with the run that made the button, so no run
    may be under way.
    """
    button.wait_for()
    page.locator("[data-test-script-state=notRunning]").wait_for()
    with page.expect_download() as got:
        button.click()
    return got.value


def data(app: Any, key: str) -> Any:
    """What the component with this key was given, of an ``AppTest``."""
    [element] = [e for e in app.get("bidi_component") if e.proto.id.endswith(f"-{key}")]
    return json.loads(element.proto.json)


def shot(page: Any, name: str) -> None:
    """The page is no wider than its screen; a screenshot goes into the folder that XATTN_SCREENS names."""
    wide = page.get_by_test_id("stMain").evaluate("e => e.scrollWidth - e.clientWidth")
    assert wide <= 0
    if folder := os.environ.get("XATTN_SCREENS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(800)
        page.screenshot(path=Path(folder, f"{name}.png"), animations="disabled")
