"""The gallery in Chromium: keys move, open and turn the page; Back restores; text stays text; filters and
looks as a person uses them."""

import csv
import re
from urllib.parse import parse_qs, urlsplit

import pytest
import served_viewer

pytest.importorskip("streamlit")

from synthetic_packs import explanation, picture, small_pack
from viewer_pages import choose_option, choose_pack, downloaded, served

from xattn.packs.writer import save_pack

FOCUSED = """() => {
  let at = document.activeElement;
  while (at.shadowRoot) at = at.shadowRoot.activeElement;
  return at.dataset.id ?? null;
}"""
SHOWN = "cell => Number(getComputedStyle(cell.querySelector('.bare')).opacity) === 1"
NAME = "<img src=x onerror=\"document.title='run'\"> 😀 تصویر"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    odd = [explanation(0, file_name=NAME, source=picture(0))]
    save_pack(root / "odd", odd, overlays=False)
    small_pack(root / "filtered", 60, ("gradcam", "random"))
    small_pack(
        root / "first", 30, ("gradcam",)
    )  # the newest is what an address without a pack shows
    with served(root, log=root / "log") as address:
        yield address


def query(page):
    return parse_qs(urlsplit(page.url).query)


def cell(page, number):
    return page.locator(f'.cell[data-id="photo-{number:05}@{number % 10}.gradcam"]')


def test_arrow_keys_move_and_enter_opens_and_back_returns(address, open_page):
    page = open_page(f"{address}/?sort=name&size=24")
    cell(page, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(FOCUSED) == "photo-00001@1.gradcam"
    top = served_viewer.box(cell(page, 1))
    page.keyboard.press("ArrowDown")
    below = served_viewer.box(page.locator(".cell:focus"))
    assert below["x"] == top["x"]
    assert below["y"] > top["y"]
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_url("**/image?**")
    assert query(page)["image"] == ["photo-00000"]
    assert query(page)["view"] == ["sort=name"]
    page.get_by_text("photo-00000.jpg").first.wait_for()
    page.go_back()
    cell(page, 0).wait_for()
    assert cell(page, 0).get_attribute("aria-current") == "true"


def test_one_cell_is_in_the_tab_order(address, open_page):
    page = open_page(address)
    cell(page, 3).wait_for()
    cell(page, 3).focus()
    inside = page.locator(".cell").evaluate_all("all => all.filter(c => c.tabIndex === 0).length")
    assert inside == 1


@pytest.mark.parametrize("keys", ["PageDown", "End ArrowRight"])
def test_keys_turn_the_page_and_the_focus_goes_with_them(address, open_page, keys):
    page = open_page(address)
    cell(page, 0).focus()
    for key in keys.split():
        page.keyboard.press(key)
    cell(page, 24).wait_for()
    assert page.evaluate(FOCUSED) == "photo-00024@4.gradcam"
    page.wait_for_url("**page=2**")
    page.keyboard.press("ArrowLeft")
    cell(page, 23).wait_for()
    page.wait_for_function(f"({FOCUSED})() === 'photo-00023@3.gradcam'")


def test_the_shortcut_turns_the_page_and_the_url_restores_it(address, open_page):
    page = open_page(address)
    cell(page, 0).wait_for()
    page.get_by_role("button", name="Next").wait_for()  # whose shortcut it is
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_url("**page=2**")
    page.reload()
    cell(page, 24).wait_for()
    assert page.locator(".cell").count() == 6


def test_back_undoes_one_change_at_a_time(address, open_page):
    page = open_page(f"{address}/?sort=name")
    cell(page, 0).wait_for()
    page.get_by_role("button", name="Look").click()
    page.get_by_role("radio", name="Photo", exact=True).click()
    page.wait_for_url("**show=photo**")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Next").click()
    page.wait_for_url("**page=2**")
    page.go_back()
    cell(page, 0).wait_for()
    assert query(page)["show"] == ["photo"]
    page.go_back()
    page.locator('.cell img[src*="/xattn/overlay"]').first.wait_for()
    assert "show" not in query(page)


def test_a_name_with_markup_is_text(address, open_page):
    page = open_page(address)
    choose_pack(page, "odd")
    cell(page, 1).wait_for(state="detached")
    assert page.locator(".cell .line").last.text_content() == NAME
    assert page.title() != "run"


def test_pictures_out_of_sight_are_not_loaded(address, open_page):
    page = open_page(address, "narrow")
    cell(page, 0).locator("img").wait_for()
    page.wait_for_function(
        "() => performance.getEntriesByType('resource').some(e => e.name.includes('/xattn/overlay'))"
    )
    loaded = page.evaluate(
        "() => performance.getEntriesByType('resource').filter(e => e.name.includes('/xattn/overlay')).length"
    )
    assert 0 < loaded < 24


def test_files_of_the_selection_are_made_when_they_are_asked_for(address, open_page):
    page = open_page(f"{address}/?q=tench&sort=name")
    cell(page, 0).wait_for()
    page.get_by_role("button", name="Export").click()
    link = page.get_by_role("link", name="CSV")
    lines = downloaded(page, link).path().read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + page.locator(".cell").count()
    assert all("tench" in line for line in lines[1:])
    button = page.get_by_role("button", name="HTML")
    report = downloaded(page, button).path().read_text(encoding="utf-8")
    assert report.startswith("<!doctype html>")
    assert 'src="data:image' in report


def wait_shown(page, cell):
    cell.locator(".bare").wait_for(state="attached")
    page.wait_for_function(f"cell => ({SHOWN})(cell)", arg=cell.element_handle())


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("narrow", "dark")])
def test_from_the_gallery_to_an_outline_on_the_photos_page(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    first, second = (page.locator(".cell").nth(i) for i in (0, 1))
    first.locator(".frame.there").wait_for()
    box, beside = served_viewer.boxes(first.locator(".frame"), second.locator(".frame"))
    assert abs(box["width"] - box["height"]) < 1
    if size == "narrow":
        assert beside["y"] == box["y"] and beside["x"] + beside["width"] > 390 - 20
    first.focus()
    page.keyboard.press("ArrowRight")
    wait_shown(page, second)
    assert served_viewer.box(first.locator(".frame")) == box, "nothing moves"
    if size == "wide":
        first.hover()
        wait_shown(page, first)
    page.get_by_role("button", name="Look").click()
    assert page.get_by_role("radio", name="Overlay").is_checked()
    page.get_by_role("radio", name="Outline").click()
    page.wait_for_url("**show=outline**")
    page.keyboard.press("Escape")
    page.locator('.cell img[src*="style=outline"]').first.wait_for()
    first.click()
    page.wait_for_url("**/image?**")
    page.locator('.st-key-maps img[src*="style=outline"]').first.wait_for()


def test_a_person_filters_the_gallery_and_takes_the_filters_away(address, open_page):
    page = open_page(address, "narrow", "dark")
    choose_pack(page, "filtered")
    page.get_by_text("1 to 24 of 60 maps", exact=True).wait_for()
    page.goto(f"{page.url}&right=wrong")
    chips = page.locator(".st-key-gallery-chips")
    chips.get_by_role("button", name="Wrong").wait_for()
    page.get_by_text("15 maps, filtered from 60", exact=True).wait_for()
    page.get_by_role("button", name="Filters").click()
    assert page.get_by_role("radio", name="Wrong", exact=True).is_checked()
    choose_option(page, page.get_by_role("combobox", name="True class"), "hen (")
    page.wait_for_url(re.compile("label=2"))
    page.keyboard.press("Escape")
    page.get_by_role("option").first.wait_for(state="hidden")  # it lay over the chart
    chips.get_by_role("button", name="true: hen").wait_for()
    bars = page.locator(".st-key-gallery-histogram [data-testid=stVegaLiteChart]")
    bars.scroll_into_view_if_needed()
    bars.locator("canvas, svg").first.wait_for()
    box = served_viewer.box(bars)
    at = [(box["x"] + x * box["width"], box["y"] + 30) for x in (0.1, 0.5, 0.9)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.move(*at[2], steps=4)
    page.mouse.up()
    page.wait_for_url(re.compile(r"low=.*high="))
    chips.get_by_role("button", name="Confidence").wait_for()
    low, high = (float(re.search(rf"{name}=([^&]+)", page.url)[1]) for name in ("low", "high"))
    assert 0.3 < low < high < 0.9  # confidences of the made-up maps
    page.keyboard.press("Escape")
    overflow = "() => document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    chips.get_by_role("button", name="Confidence").click()
    page.wait_for_url(re.compile("^(?!.*low=)"))
    chips.get_by_role("button", name="true: hen").click()
    page.wait_for_url(re.compile("^(?!.*label=)"))
    page.get_by_text("15 maps, filtered from 60", exact=True).wait_for()
    page.get_by_role("button", name="Export").click()
    csv_link = page.get_by_role("link", name="CSV")
    csv_link.evaluate("link => { link.target = ''; }")
    lines = list(csv.reader(downloaded(page, csv_link).path().read_text().splitlines()))
    assert len(lines) == 16
    chips.get_by_role("button", name="Clear all").click()
    page.get_by_text("1 to 24 of 60 maps", exact=True).wait_for()
    assert chips.count() == 0
