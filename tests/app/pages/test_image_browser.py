"""The image page in Chromium: keys, the slider, pictures that stay while others load, downloads."""

import re
from urllib.parse import parse_qs, urlparse

import pytest
import served_viewer

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import downloaded, served, shot


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    small_pack(folder / "root" / "pack", 4)
    with served(folder / "root", log=folder / "log.txt") as base:
        yield f"{base}/image"


@pytest.fixture
def page(address, open_page):
    opened = open_page(address)
    loaded(opened)
    return opened


def loaded(page):
    """Wait until the pictures in sight are there."""
    page.locator(".st-key-maps .frame.there img").nth(2).wait_for()


def query(page):
    return {name: value[-1] for name, value in parse_qs(urlparse(page.url).query).items()}


def wait_for(page, pattern):
    page.wait_for_url(re.compile(pattern))


def test_keys_lead_to_the_next_photo_and_back(page):
    page.keyboard.press("Shift+ArrowRight")
    wait_for(page, "image=photo-00001")
    page.get_by_text("2 of 4", exact=True).wait_for()
    page.keyboard.press("Shift+ArrowLeft")
    wait_for(page, "image=photo-00000")
    page.get_by_text("1 of 4", exact=True).wait_for()
    assert page.get_by_role("button", name="Previous").is_disabled()


def test_the_slider_follows_keys_and_pointer(page):
    page.get_by_role("tab", name="Before and after").click()
    slider = page.get_by_role("slider", name="How much of the Grad-CAM map is shown")
    slider.wait_for()
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "55 % Grad-CAM"
    page.keyboard.press("Shift+ArrowRight")  # not the page's shortcut while the slider has the keys
    page.locator(".slide img").first.scroll_into_view_if_needed()
    box = served_viewer.box(page.locator(".slide .frame"))
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    assert abs(int(slider.input_value()) - 25) <= 1
    share = page.locator(".slide .after").evaluate("e => getComputedStyle(e).clipPath")
    assert share.startswith("inset(0"), share
    assert "image" not in query(page)


def test_an_opened_map_is_in_focus_and_survives_a_reload(page):
    page.locator(".st-key-maps .cell").nth(2).click()
    wait_for(page, "entry=")
    page.locator(".st-key-maps .cell[aria-current=true][data-id*=saliency]").wait_for()
    page.reload()
    page.locator(".st-key-maps .cell[aria-current=true][data-id*=saliency]").wait_for()


def test_a_picture_stays_until_its_successor_is_there(page):
    frame = page.locator(".st-key-maps .frame").nth(1)
    frame.evaluate("e => { e.marked = true }")
    page.get_by_role("button", name="Look").click()
    slider = page.get_by_role("slider", name="Opacity")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    wait_for(page, "opacity=0.5")
    page.locator(".st-key-maps img[src*='opacity=0.5']").first.wait_for()
    assert page.locator(".st-key-maps .frame").nth(1).evaluate("e => e.marked === true")


def zoomed(page):
    """The zoom and the corner of all pictures, as they are drawn."""
    shapes = page.locator(".st-key-maps .frame img").evaluate_all(
        "all => all.map(e => new DOMMatrix(getComputedStyle(e).transform)).map(m => [m.a, m.e, m.f])"
    )
    for shape in shapes:
        assert shape == pytest.approx(shapes[0], abs=0.1), shapes
    return shapes[0]


def centred(frame):
    """A frame's box and middle, after the page has brought it into its own."""
    frame.evaluate("e => e.scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = served_viewer.box(frame)
    return box, (box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])


def test_all_maps_zoom_and_move_together_and_tell_their_values(page):
    frames = page.locator(".st-key-maps .frame")
    box, middle = centred(frames.nth(1))
    page.mouse.move(*middle)
    told = page.locator(".st-key-maps .value").all_inner_texts()
    assert told[0] == "" and len(told) == 3
    assert all(
        re.fullmatch(r"0\.\d+ · \d+% of max\nrow \d+, column \d+", text) for text in told[1:]
    )
    assert [t.split("\n")[1] for t in told[1:]] == ["row 4, column 4", "row 15, column 15"]
    page.mouse.move(box["x"] + 2, middle[1])
    assert page.locator(".st-key-maps .value").nth(1).inner_text() == "not seen by the network"
    whole = zoomed(page)
    main = page.get_by_test_id("stMain")
    above = main.evaluate("e => Math.max(e.scrollTop - 100, 0)")
    page.mouse.wheel(0, -100)  # the page's own, while nothing is zoomed
    page.wait_for_function(
        "([e, above]) => Math.abs(e.scrollTop - above) < 1", arg=[main.element_handle(), above]
    )
    assert zoomed(page) == whole
    _, middle = centred(frames.nth(1))
    page.mouse.move(*middle)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.locator(".st-key-maps .zoomed").wait_for()
    near = zoomed(page)
    shot(page, "zoom")
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1] + 20, steps=3)
    page.mouse.up()
    assert zoomed(page) != near
    assert "entry" not in query(page)  # a drag opens nothing
    page.locator(".st-key-maps .cell").nth(1).focus()
    page.keyboard.press("ArrowRight")  # moves the maps, not the focus
    focused = page.locator(".st-key-maps .cell:focus")
    assert focused.get_attribute("data-id").endswith("gradcam")
    page.keyboard.press("0")
    assert zoomed(page) == whole
    page.keyboard.press("ArrowRight")
    assert focused.get_attribute("data-id").endswith("saliency")
    page.keyboard.press("+")
    page.get_by_role("button", name="Show the whole photo again").click()
    assert zoomed(page) == whole


def test_exports_are_downloaded(page):
    page.get_by_role("tab", name="Export").click()
    for name, start in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("HTML", b"<!doc")):
        file = downloaded(page, page.get_by_role("button", name=re.compile(f", {name}$")))
        assert file.suggested_filename == f"photo-00000.{name.lower()}"
        assert file.path().read_bytes().startswith(start)


@pytest.mark.parametrize(("size", "scheme"), [("desk", "light"), ("narrow", "dark")])
def test_photo_and_maps_are_on_the_first_screen(address, open_page, size, scheme):
    page = open_page(
        address.replace("/image", "/image?methods=gradcam&methods=saliency"), size, scheme
    )
    loaded(page)
    height = page.evaluate("() => innerHeight")
    below = 64 if size == "narrow" else 0  # the bar of pages
    for frame in page.locator(".st-key-maps .cell").all():
        box = served_viewer.box(frame)
        assert box["y"] + box["height"] <= height - below
    assert served_viewer.box(page.locator(".st-key-maps .cell").first)["x"] >= 0
    shot(page, f"photo-{size}")


def test_a_question_mark_lists_the_keys_and_a_slash_searches(page):
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog", name="Keys")
    dialog.get_by_text("undo, redo").wait_for()
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    page.keyboard.press("/")
    page.locator("input[aria-label=Search]:focus").wait_for()
    page.keyboard.type("/?")  # text, not keys
    assert page.locator("input[aria-label=Search]").input_value() == "/?"
    assert not page.get_by_role("dialog").count()
