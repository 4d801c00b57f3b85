"""A pack of detections in Chromium: a click or a key on a box opens its maps; a drawn box asks for what is missed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import served_viewer
from PIL import Image

pytest.importorskip("streamlit")

from viewer_pages import only, served, shot

import xattn
from xattn.app.pages.image.boxes import _shares, boxes_of

MADE = """
import sys
sys.path.insert(0, {tests!r})
from small_detectors import torchvision_detector
from xattn import load_detector


def make():
    return load_detector(torchvision_detector("fcos"), class_names=["cat", "dog", "cow", "hen"])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A file that makes a detector, the detector, and the root of a pack by it."""
    folder = tmp_path_factory.mktemp("boxes")
    file = folder / "mine.py"
    file.write_text(MADE.format(tests=str(Path(__file__).parents[1])))
    own: dict = {}
    exec(file.read_text(), own)
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((480, 320)).save(folder / "photo.png")
    detector = own["make"]()
    xattn.explain_detections(
        folder / "photo.png", detector, ["odam", "box"], threshold=0.3, most=4,
        missed=[("cow", (40, 40, 300, 300))], output=folder / "root" / "boxes", overlays=False,
    )  # fmt: skip
    return file, detector, folder / "root"


@pytest.fixture(scope="module")
def address(made, tmp_path_factory):
    file, _, root = made
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with served(root, "--detector", f"{file}:make", "--device", "cpu", log=log) as base:
        yield base


def wanted(page, number):
    """The box of a detection, of a page that shows its map."""
    box = page.locator(f".boxes .box[data-id='{number}'][aria-pressed=true]")
    box.wait_for()
    page.locator("[data-test-script-state=notRunning]").wait_for()
    return box


@pytest.mark.parametrize("size", ["wide", "narrow"])
def test_a_click_or_a_key_on_a_box_opens_its_maps(address, made, open_page, size):
    pack = only(made[2])
    found = boxes_of(pack, pack.images.index[0])
    assert [box.target for box in found] == [0, 1, 2, 3, 4] and found[4].kind == "missed"
    page = open_page(f"{address}/image?class=1", size)
    one = wanted(page, 1)
    photo, place = served_viewer.boxes(page.locator(".boxes .frame"), one)
    shares = [
        (place["x"] - photo["x"]) / photo["width"],
        (place["y"] - photo["y"]) / photo["height"],
    ]
    assert shares == pytest.approx(found[1].at[:2], abs=0.01)
    page.get_by_text("5 detections", exact=True).wait_for()
    assert page.locator(".st-key-maps .cell").count() == 2
    corner = f"{found[1].at[0]:.4g},{found[1].at[1]:.4g} "
    assert page.locator(".outlines .over.own").first.get_attribute("points").startswith(corner)
    one.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("class=2"))
    wanted(page, 2)
    page.locator(".boxes .box[data-id='4']").dispatch_event("click")  # others may lie over it
    page.wait_for_url(re.compile("class=4"))
    wanted(page, 4)
    page.locator(".st-key-maps .line", has_text="missed cow").first.wait_for()
    shot(page, f"boxes-{size}")


def test_a_drawn_box_asks_for_a_missed_object(address, made, open_page):
    page = open_page(f"{address}/whatif")
    page.locator(".boxes .box").nth(4).wait_for()
    assert page.get_by_role("button", name="Explain").is_disabled()
    frame = served_viewer.box(page.locator(".boxes .frame"))
    at = [
        (frame["x"] + x * frame["width"], frame["y"] + y * frame["height"])
        for x, y in ((0.25, 0.25), (0.75, 1))
    ]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    numbers = page.get_by_label(re.compile("^Box: left, top"))
    page.wait_for_function(
        "() => !document.querySelector('.stButton button[kind=primary]').disabled"
    )
    box = [float(v) for v in numbers.input_value().split(",")]
    assert box == pytest.approx([120, 80, 360, 320], abs=3)
    page.get_by_role("button", name="Explain").click()
    photo = only(made[2]).photo("photo.png")
    title = made[1].missed(photo, "cat", box).title
    page.get_by_text(f"{title}, the best candidate in the box").wait_for()
    shot(page, "missed")
    page.locator(".boxes .box[data-id='2']").focus()
    page.keyboard.press("Enter")  # takes that box
    at = boxes_of(only(made[2]), "photo.png")[2].at
    sides = [round(v * side) for v, side in zip(at, (480, 320, 480, 320), strict=True)]
    page.wait_for_function(
        "value => [...document.querySelectorAll('input')].some(i => i.value === value)",
        arg=", ".join(map(str, sides)),
    )


@pytest.mark.parametrize(
    "record", [None, {}, {"box": [1, 2, 3]}, {"box": [0, 0, float("nan"), 4]}, {"box": "1234"}]
)
def test_what_is_no_box_is_not_drawn(record):
    assert _shares(record, (10, 20)) is None
    assert _shares({"box": [-5, 2, 10, 30]}, (10, 20)) == (0, 0.2, 0.5, 1)
