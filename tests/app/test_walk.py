"""The main path in Chromium, from the gallery to an exported file; every page at two widths, with screenshots
in the folder that ``XATTN_SCREENS`` names; and patches of the attention page, picked by pointer and keys."""

import re
import shutil

import pytest
import served_viewer

pytest.importorskip("streamlit")

from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from synthetic_packs import small_pack
from viewer_pages import (
    answer,
    choose_option,
    choose_pack,
    downloaded,
    of_words,
    served,
    shot,
    vit_pack,
)

from xattn.app.library import Library
from xattn.packs.writer import save_pack

SIDE = 5  # patches a side: 80 pixels in patches of 16
PAGES = {  # name: the pack, and a text that is there when the page is
    "gallery": ("measured", "Look"),
    "image": ("measured", "Look"),
    "attention": ("vit", "The figures as a table"),
    "answer": ("spoken", "xattn app ROOT --vlm MODEL"),
    "whatif": ("vit", "Fill"),
    "mistakes": ("measured", "Classes"),
    "photomap": ("measured", "Groups"),
    "runs": ("measured", "30 photos, explained by two methods."),
    "live": ("measured", "Explain"),
    "compare": ("measured", "There is no comparison yet."),
    "train": ("measured", "Train a head"),
}
FOLDED = (
    "attention",
    "answer",
    "compare",
    "train",
)  # there, or begin without any


# Whether every picture in sight is there, those in the shadow roots of grids included.
ALL_LOADED = """() => {
  const roots = root => [root, ...[...root.querySelectorAll("*")].filter(e => e.shadowRoot)
    .flatMap(e => roots(e.shadowRoot))];
  return roots(document).flatMap(root => [...root.querySelectorAll("img")]).every(i =>
    i.getBoundingClientRect().top > innerHeight || (i.complete && i.naturalWidth > 0));
}"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A viewer's root: a pack with metrics and one of a ViT, whose weights the viewer was given."""
    folder = tmp_path_factory.mktemp("walk")
    options = vit_pack(folder, SIDE)
    small_pack(folder / "root" / "measured", 30, ("gradcam", "saliency"))
    save_pack(folder / "root" / "spoken", of_words("photo.png", 0, answer()), overlays=False)
    return folder / "root", options


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    with served(root[0], *root[1], log=tmp_path_factory.mktemp("log") / "log.txt") as base:
        yield base


def test_gallery_to_image_to_a_patch_to_a_shared_address_to_a_file(address, open_page):
    page = open_page(address)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "vit")
    choose_option(page, page.get_by_role("combobox", name=re.compile("Sort by")), "Predicted class")
    page.wait_for_url(re.compile("sort=predicted"))
    page.locator('.cell[data-id^="photo-1.png@"]').click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-1\.png&view=sort"))
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()

    page.get_by_role("button", name="Attention").click()
    page.wait_for_url(re.compile(r"/attention\?.*image=photo-1\.png&view=sort"))
    frame = page.locator(".st-key-attention-picker .frame")
    frame.wait_for()
    box = served_viewer.box(frame)
    frame.click(position={"x": box["width"] * 0.7, "y": box["height"] * 0.3})
    page.get_by_text(re.compile("from row 2, column 4$")).first.wait_for()
    page.wait_for_url(re.compile(r"patch=2%2C4"))

    shared = page.url
    other = open_page(shared)
    other.get_by_text(re.compile("from row 2, column 4$")).first.wait_for()
    other.reload()
    other.get_by_text(re.compile("from row 2, column 4$")).first.wait_for()
    assert other.url == shared

    page.goto(shared.replace("/attention", "/image"))
    page.get_by_role("tab", name="Export").click()
    figure = downloaded(page, page.get_by_role("button", name=re.compile(", PNG$")))
    assert figure.path().read_bytes().startswith(b"\x89PNG")


def test_from_the_gallery_to_a_photo_that_is_painted_on_and_back(address, open_page):
    page = open_page(address)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "vit")
    page.locator('.cell[data-id^="photo-1.png@"]').click()
    page.get_by_role("button", name="What if").click()
    page.wait_for_url(re.compile(r"/whatif\?.*image=photo-1"))
    canvas = page.locator(".st-key-whatif-canvas .canvas")
    canvas.wait_for()
    page.get_by_text("Paint over a part of the photo").wait_for()
    canvas.scroll_into_view_if_needed()
    box = served_viewer.box(canvas)
    at = [(box["x"] + x * box["width"], box["y"] + 0.5 * box["height"]) for x in (0.2, 0.8)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    hidden = page.get_by_text(re.compile(r"^\d+\.\d% of the picture is hidden\.$"))
    hidden.wait_for()
    assert page.locator(".answers tbody tr").first.locator("td").count() == 4
    brushed = hidden.inner_text()
    shot(page, "whatif-painted")
    page.get_by_role("button", name="Superpixel").click()
    page.mouse.click(at[0][0], box["y"] + 0.1 * box["height"])
    page.get_by_text(brushed).wait_for(state="detached")
    page.reload()  # the mask belongs to the session, which a reload ends
    page.get_by_text("Paint over a part of the photo").wait_for()
    canvas.focus()
    page.keyboard.press("Enter")
    hidden.wait_for()
    page.keyboard.press("Control+z")
    page.get_by_text("Paint over a part of the photo").wait_for()
    page.get_by_role("button", name="Keep only the top 20%").click()
    page.get_by_text("80.0% of the picture is hidden, the rest is kept.").wait_for()
    page.wait_for_url(re.compile("paint=kept"))
    page.get_by_role("button", name="Image", exact=True).click()
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()
    page.get_by_role("button", name="What if").click()
    page.get_by_text("20.0% of the picture is hidden.").wait_for()  # the paint is still there
    page.get_by_role("button", name="Image", exact=True).click()
    page.get_by_role("button", name="Gallery").click()
    page.locator(".cell .frame.there").first.wait_for()


def test_each_view_is_one_press_of_back(root, address, open_page):
    ids = {info.name: info.id for info in Library(root[0]).packs()}
    page = open_page(f"{address}/?pack={ids['measured']}")
    page.locator('.cell[data-id^="photo-00002@"]').click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-00002"))
    page.get_by_role("button", name="Next").click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-00003"))
    page.go_back()
    page.get_by_role("heading", name="photo-00002").wait_for()
    page.go_back()
    page.wait_for_url(f"{address}/?pack={ids['measured']}")
    page.locator(".cell .frame.there").first.wait_for()
    page.go_forward()
    page.get_by_role("heading", name="photo-00002").wait_for()
    page.get_by_role("link", name="Compare").first.click()
    page.wait_for_url(re.compile(r"/compare\?pack="))
    page.go_back()
    page.get_by_role("heading", name="photo-00002").wait_for()


def test_from_the_gallery_to_a_mistake_to_its_photo_and_back(address, open_page):
    page = open_page(address, "narrow", "dark")
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "measured")
    page.get_by_role("link", name="Mistakes").filter(visible=True).first.click()
    page.locator(".matrix .wrong").first.click()
    page.wait_for_url(re.compile(r"/mistakes\?.*cell=\d+\.\d+"))
    page.keyboard.press("ArrowRight")
    page.locator(".st-key-mistakes-cells .frame.there").nth(1).wait_for()
    shot(page, "mistakes-cell")
    page.locator(".st-key-mistakes-cells .cell").nth(1).click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-"))
    page.get_by_role("heading", name=re.compile(", true: ")).wait_for()
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()
    shot(page, "mistake")
    page.get_by_role("button", name="Gallery").click()
    page.get_by_text(re.compile(r"^\d maps?, filtered from 30$")).wait_for()
    page.go_back()
    page.go_back()
    page.locator(".matrix .wrong[aria-current]").wait_for()


@pytest.mark.parametrize(("size", "popover"), [("wide", "measured"), ("narrow", "Filters")])
def test_another_page_opens_while_a_popover_is_open(address, open_page, popover, size):
    page = open_page(address, size)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "measured")
    page.get_by_test_id("stPopoverBody").wait_for(state="detached")
    page.get_by_test_id("stPopoverButton").filter(has_text=popover).click()
    page.get_by_test_id("stPopoverBody").wait_for()
    links = page.get_by_role("link", name="Mistakes").filter(visible=True)
    links.first.click()
    page.get_by_role("heading", name="Mistakes", exact=True).wait_for()
    page.locator(".matrix .wrong").first.wait_for()


def test_from_a_photo_to_its_maps_in_two_runs_and_back(address, open_page):
    page = open_page(address)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "measured")
    page.locator('.cell[data-id^="photo-00002@"]').click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-00002"))
    page.get_by_role("button", name="Two runs").click()
    page.wait_for_url(re.compile(r"/runs\?.*image=photo-00002"))
    page.get_by_role("heading", name="photo-00002").wait_for()
    page.get_by_text("Difference", exact=True).wait_for()
    shot(page, "two-runs")
    page.get_by_role("button", name="All photos").click()
    page.locator(".st-key-runs-pairs .cell").nth(3).click()
    page.get_by_text("2 of 30").wait_for()
    page.locator(".st-key-runs-maps-0 .cell").nth(1).click()
    page.wait_for_url(re.compile(r"/image\?.*entry="))
    page.go_back()
    page.get_by_text("Difference", exact=True).wait_for()


def test_the_first_address_is_one_entry_of_the_history(address, open_page):
    page = open_page("about:blank")
    page.goto(address)
    page.wait_for_url(re.compile(r"/\?pack="))
    page.locator(".cell .frame.there").first.wait_for()
    page.go_back()
    assert page.url == "about:blank"


def test_a_photos_attention_opens_anew_after_another_page(address, open_page):
    page = open_page(address)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "vit")
    page.locator('.cell[data-id^="photo-1.png@"]').click()
    page.get_by_role("button", name="Attention").click()
    page.locator(".cell", has_text="Layer 2").click()
    page.wait_for_url(re.compile("layer=2"))
    page.get_by_role("button", name="Image", exact=True).click()
    page.get_by_role("button", name="Attention", exact=True).click()
    page.get_by_text(re.compile("^layer 5, mean of all heads, from row 3, column 3$")).wait_for()
    assert "layer" not in page.url
    page.go_back()
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()
    page.go_back()
    page.get_by_text(re.compile("^layer 2, mean of all heads, from row 3, column 3$")).wait_for()


# What is chosen in every widget in sight, in their order.
CHOSEN = """() => [...document.querySelectorAll(
  "[data-testid=stMain] :is([role=radio], [role=combobox], [role=slider], [role=tab], input, [data-tag])"
)].filter(e => e.checkVisibility()).map(e => [
  e.ariaLabel ?? e.textContent, e.ariaChecked ?? e.ariaSelected ?? e.checked ?? null, e.value ?? null,
].join(" ")).sort()"""


@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_wide_and_narrow_screens_and_offer_the_same_there(root, address, open_page, name):
    pack, text = PAGES[name]
    ids = {info.name: info.id for info in Library(root[0]).packs()}
    path = "" if name == "gallery" else name
    pages = {
        size: open_page(f"{address}/{path}?pack={ids[pack]}", size, scheme)
        for size, scheme in (("wide", "light"), ("narrow", "dark"))
    }
    for size, page in pages.items():
        page.get_by_test_id("stMain").get_by_text(text, exact=True).first.wait_for()
        page.locator("[data-test-script-state=notRunning]").wait_for()
        page.wait_for_load_state("networkidle")
        page.wait_for_function(ALL_LOADED)
        shot(page, f"{name}-{size}")
    if name not in FOLDED:
        one, other = pages.values()
        one.wait_for_function(f"() => ({CHOSEN})().length > 0")
        shown = one.evaluate(CHOSEN)
        other.wait_for_function(f"shown => ({CHOSEN})().join() === shown.join()", arg=shown)


def test_a_pack_that_goes_or_changes_while_it_is_shown_is_a_message(root, address, open_page):
    pack = root[0] / "leaving"
    small_pack(pack, 3, ("gradcam",))
    page = open_page(address, replaced=True)
    choose_pack(page, "leaving")
    page.locator(".cell").nth(2).wait_for()
    shutil.rmtree(pack)
    page.locator(".cell").nth(1).click()
    page.get_by_role("alert").first.wait_for()
    page.get_by_role("link", name="Gallery").first.click()
    page.locator(".cell .frame.there").first.wait_for()


# ---------------------------------------------------------------------- patches of the attention page


@pytest.fixture
def attention(root, address):
    """The attention page of the ViT's pack."""
    ids = {info.name: info.id for info in Library(root[0]).packs()}
    return f"{address}/attention?pack={ids['vit']}"


@pytest.fixture
def page(attention, open_page):
    opened = open_page(attention)
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
    box = served_viewer.box(picker(page))
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


def test_the_answer_to_an_earlier_key_does_not_move_the_cursor_back(attention, open_page):
    page = open_page("about:blank")
    held: list = []
    holding = False

    def between(browser):
        server = browser.connect_to_server()
        server.on_message(lambda m: held.append((browser, m)) if holding else browser.send(m))

    page.route_web_socket("**/_stcore/stream", between)
    page.goto(attention)
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
    box = served_viewer.box(frame)
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


def test_nothing_of_a_conversion_is_wider_than_a_narrow_screen(attention, open_page):
    page = open_page(f"{attention}&mechanism=gna&size=3", "narrow")
    page.get_by_text("The figures as a table").wait_for()
    page.get_by_text("after a conversion without training").wait_for()
    shot(page, "attention-converted")
