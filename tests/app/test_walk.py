"""The main path in Chromium, from the gallery to an exported file; and every page at two widths and in
two themes, with screenshots in the folder that ``XATTN_SCREENS`` names."""

import re
import shutil

import pytest

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import SCREENS, choose_option, choose_pack, served, shot, vit_pack

from xattn.app.library import Library

SIDE = 5  # patches a side: 80 pixels in patches of 16
PAGES = {  # name: the pack, and a text that is there when the page is
    "gallery": ("measured", "Look"),
    "image": ("measured", "Look"),
    "attention": ("vit", "The figures as a table"),
    "whatif": ("vit", "Fill"),
    "mistakes": ("measured", "Classes"),
    "photomap": ("measured", "Groups"),
    "runs": ("measured", "30 photos, explained by two methods."),
    "live": ("measured", "Explain"),
    "compare": ("measured", "There is no comparison yet."),
    "train": ("measured", "Train a head"),
}


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
    box = frame.bounding_box()
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
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile(", PNG$")).click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_from_the_gallery_to_a_photo_that_is_painted_on_and_back(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "vit")
    page.locator('.cell[data-id^="photo-1.png@"]').click()
    page.get_by_role("button", name="What if").click()
    page.wait_for_url(re.compile(r"/whatif\?.*image=photo-1"))
    canvas = page.locator(".st-key-whatif-canvas .canvas")
    canvas.wait_for()
    page.get_by_text("Paint over a part of the photo").wait_for()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + 0.5 * box["height"]) for x in (0.2, 0.8)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    hidden = page.get_by_text(re.compile(r"^\d+\.\d% of the picture is hidden\.$"))
    hidden.wait_for()
    assert page.locator(".answers tbody tr").first.locator("td").count() == 4
    brushed = hidden.inner_text()
    shot(page, f"whatif-painted-{size}-{scheme}")
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
    page.get_by_role("button", name="Hide all but it").click()
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


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_from_the_gallery_to_a_mistake_to_its_photo_and_back(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "measured")
    page.get_by_role("link", name="Mistakes").filter(visible=True).first.click()
    page.locator(".matrix .wrong").first.click()
    page.wait_for_url(re.compile(r"/mistakes\?.*cell=\d+\.\d+"))
    page.keyboard.press("ArrowRight")
    page.locator(".st-key-mistakes-cells .frame.there").nth(1).wait_for()
    shot(page, f"mistakes-cell-{size}-{scheme}")
    page.locator(".st-key-mistakes-cells .cell").nth(1).click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-"))
    page.get_by_role("heading", name=re.compile(", true: ")).wait_for()
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()
    shot(page, f"mistake-{size}-{scheme}")
    page.get_by_role("button", name="Gallery").click()
    page.get_by_text(re.compile(r"^\d maps?, filtered from 30$")).wait_for()
    page.go_back()
    page.go_back()
    page.locator(".matrix .wrong[aria-current]").wait_for()


@pytest.mark.parametrize("size", ["wide", "narrow"])
@pytest.mark.parametrize("popover", ["measured", "Filters"])
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


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_from_a_photo_to_its_maps_in_two_runs_and_back(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "measured")
    page.locator('.cell[data-id^="photo-00002@"]').click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-00002"))
    page.get_by_role("button", name="Two runs").click()
    page.wait_for_url(re.compile(r"/runs\?.*image=photo-00002"))
    page.get_by_role("heading", name="photo-00002").wait_for()
    page.get_by_text("Difference", exact=True).wait_for()
    shot(page, f"two-runs-{size}-{scheme}")
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


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_the_screen(root, address, open_page, name, size, scheme):
    pack, text = PAGES[name]
    ids = {info.name: info.id for info in Library(root[0]).packs()}
    path = "" if name == "gallery" else name
    page = open_page(f"{address}/{path}?pack={ids[pack]}", size, scheme)
    page.get_by_test_id("stMain").get_by_text(text, exact=True).first.wait_for()
    page.wait_for_load_state("networkidle")
    page.wait_for_function(ALL_LOADED)
    shot(page, f"{name}-{size}-{scheme}")


# What is chosen in every widget in sight, in their order.
CHOSEN = """() => [...document.querySelectorAll(
  "[data-testid=stMain] :is([role=radio], [role=combobox], [role=slider], [role=tab], input, [data-tag])"
)].filter(e => e.checkVisibility()).map(e => [
  e.ariaLabel ?? e.textContent, e.ariaChecked ?? e.ariaSelected ?? e.checked ?? null, e.value ?? null,
].join(" ")).sort()"""


@pytest.mark.parametrize("name", ["whatif", "mistakes", "photomap", "runs", "live", "train"])
def test_a_narrow_screen_shows_the_same_choices(root, address, open_page, name):
    pack, text = PAGES[name]
    ids = {info.name: info.id for info in Library(root[0]).packs()}
    pages = [open_page(f"{address}/{name}?pack={ids[pack]}", size) for size in ("wide", "narrow")]
    for page in pages:
        page.get_by_test_id("stMain").get_by_text(text, exact=True).first.wait_for()
        page.locator("[data-test-script-state=notRunning]").wait_for()
        page.wait_for_load_state("networkidle")
    for _ in range(600):  # widgets come one by one
        shown = [page.evaluate(CHOSEN) for page in pages]
        if shown[0] == shown[1] and (shown[0] or name == "train"):  # which begins without any
            break
        pages[0].wait_for_timeout(500)
    assert shown[0] == shown[1]
    assert bool(shown[0]) == (name != "train")


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
