"""The attention page in Chromium: patches picked by pointer and keys, pictures that choose, the URL."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("streamlit")

from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from viewer_pages import served, vit_pack

SIDE = 5  # patches a side: 80 pixels in patches of 16


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The attention page over a pack of two photos."""
    folder = tmp_path_factory.mktemp("patches")
    options = vit_pack(folder, SIDE)
    with served(folder / "root", *options, log=folder / "log.txt") as base:
        yield f"{base}/attention"


@pytest.fixture
def page(address, open_page):
    opened = open_page(address)
    ready(opened, "from row 3, column 3")
    return opened


def ready(page, text):
    """Wait until the facts of the row say ``text``."""
    page.get_by_text(re.compile(f"^layer.*{re.escape(text)}$|^{re.escape(text)}$")).first.wait_for()


def picker(page):
    return of_picker(page, ".frame")


def of_picker(page, part):
    """A part of the large picture; rollout's is a picker, too, and may be there first."""
    return page.locator(f".st-key-attention-picker {part}")


def click(page, row, column):
    """On the middle of a patch, counted from 1."""
    box = picker(page).bounding_box()
    at = ((c - 0.5) / SIDE for c in (column, row))
    x, y = (share * side for share, side in zip(at, (box["width"], box["height"]), strict=True))
    picker(page).click(position={"x": x, "y": y})


def url(page, **wanted):
    """Wait until the address has these parameters."""
    for name, value in wanted.items():
        page.wait_for_url(re.compile(rf"[?&]{name}={re.escape(value)}(&|$)"))


def test_a_click_shows_the_attention_of_the_patch_and_a_reload_restores_it(page):
    before = of_picker(page, "img.map").get_attribute("src")
    click(page, 2, 4)
    ready(page, "from row 2, column 4")
    url(page, patch="2%2C4")
    after = of_picker(page, "img.map").get_attribute("src")
    assert after != before
    page.reload()
    ready(page, "from row 2, column 4")
    assert of_picker(page, "img.map").get_attribute("src") == after
    outline = of_picker(page, ".picked").evaluate("e => [e.style.top, e.style.left]")
    assert outline == ["20%", "60%"]


def test_arrow_keys_home_and_end_move_and_read_out_the_place(page):
    picker(page).focus()
    status = of_picker(page, ".status")
    for key, place in (
        ("ArrowRight", (3, 4)),
        ("ArrowUp", (2, 4)),
        ("End", (2, 5)),
        ("ArrowRight", (2, 5)),  # the edge holds
        ("Home", (2, 1)),
        ("Control+End", (5, 5)),
        ("Control+Home", (1, 1)),
        ("ArrowDown", (2, 1)),
    ):
        page.keyboard.press(key)
        assert status.text_content() == f"row {place[0]} of 5, column {place[1]} of 5"
    ready(page, "from row 2, column 1")
    url(page, patch="2%2C1")
    focused = page.evaluate(
        "() => { let a = document.activeElement;"
        " while (a.shadowRoot) a = a.shadowRoot.activeElement; return a.className; }"
    )
    assert focused == "frame"


def test_the_answer_to_an_earlier_key_does_not_move_the_cursor_back(address, open_page):
    page = open_page("about:blank")
    held: list = []
    holding = False

    def between(browser):
        server = browser.connect_to_server()
        server.on_message(lambda m: held.append((browser, m)) if holding else browser.send(m))

    page.route_web_socket("**/_stcore/stream", between)
    page.goto(address)
    ready(page, "from row 3, column 3")
    page.locator("[data-test-script-state=notRunning]").wait_for()
    holding = True
    picker(page).focus()
    page.keyboard.press("ArrowRight")
    while not any(
        ForwardMsg.FromString(m).WhichOneof("type") == "script_finished" for _, m in held
    ):
        page.wait_for_timeout(50)  # until the cursor rests and is answered
    page.keyboard.press("ArrowDown")
    holding = False
    for browser, message in held:
        browser.send(message)
    ready(page, "from row 4, column 4")
    url(page, patch="4%2C4")


def test_focus_is_to_be_seen_and_the_pointer_outlines_a_patch(page):
    frame = picker(page)
    page.keyboard.press("Tab")
    frame.focus()
    page.keyboard.press("ArrowLeft")
    assert frame.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
    cursor = of_picker(page, ".cursor")
    assert cursor.evaluate("e => [e.style.top, e.style.left]") == ["0%", "80%"]


def test_a_head_and_a_layer_are_chosen_by_their_pictures_one_after_the_other(page):
    page.locator(".cell", has_text="Head 1").click()
    # Streamlit drops a click when the next one arrives before its callback ran.
    page.get_by_text("head 1, from row 3, column 3").wait_for()
    page.locator(".cell", has_text="Layer 2").click()
    page.get_by_text("layer 2, head 1, from row 3, column 3").wait_for()
    url(page, layer="2", head="1")
    page.go_back()
    page.get_by_text("layer 2, head 1, from").wait_for(state="detached")


def test_a_bar_of_the_entropy_chart_shows_its_head(page):
    page.get_by_text("All layers", exact=True).click()
    bar = page.get_by_text("layer 0, head 1", exact=True)
    bar.wait_for()
    page.locator("[aria-roledescription=bar][aria-label*='layer 0, head 1']").click()
    ready(page, "layer 0, head 1, from row 3, column 3")
    url(page, layer="0", head="1")


def test_the_class_token_may_ask_and_the_next_photo_is_asked_the_same(page):
    page.get_by_text("Class token", exact=True).click()
    ready(page, "from the class token")
    page.get_by_role("button", name="Next").click()
    page.get_by_role("heading", name="photo-1.png").wait_for()
    ready(page, "from the class token")
    url(page, image="photo-1.png", patch="class-token")


@pytest.mark.parametrize("size, scheme", [("wide", "dark"), ("narrow", "light")])
def test_nothing_is_wider_than_the_screen(address, open_page, size, scheme):
    page = open_page(f"{address}?mechanism=gna&size=3", size=size, scheme=scheme)
    page.get_by_text("The figures as a table").wait_for()
    page.get_by_text("after a conversion without training").wait_for()
    wide = page.locator("[data-testid=stMain]").evaluate("e => e.scrollWidth - e.clientWidth")
    assert wide <= 0
