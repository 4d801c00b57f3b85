"""The frame in Chromium, as a person goes: the first run and its doors; the chip; the bar on a narrow screen."""

import re

import pytest
import served_viewer

pytest.importorskip("streamlit")

from synthetic_packs import picture, small_pack
from viewer_pages import choose_pack, served, shot

from xattn.app.demo import pack_job
from xattn.app.navigation import frame
from xattn.app.pages import first_run
from xattn.app.state import PAGES

LONG = "n01443537_goldfish_swimming_in-a-small_aquarium_of_the_institute_2026-11-27"


def test_the_doors_of_the_first_run(tmp_path, open_page):
    """The photo goes to Live, the command line is there to copy, and the demo can be asked for."""
    photo = tmp_path / "wren.png"
    picture(1).save(photo)
    (tmp_path / "root").mkdir()
    with served(tmp_path / "root", log=tmp_path / "log") as address:
        page = open_page(address, "narrow", "dark")
        page.get_by_role("heading", name=first_run.AIM).wait_for()
        page.get_by_text(f"--features --output {tmp_path / 'root' / 'first'}").wait_for()
        if pack_job.missing() is None:
            page.get_by_role("button", name="Make the demo pack").wait_for()
        shot(page, "first-run")
        page.locator("input[type=file]").set_input_files(photo)
        page.wait_for_url(re.compile("/live"))
        page.get_by_text("Ready: wren.png.").wait_for()
        page.get_by_role("button", name="Explain", exact=True).wait_for()
        page.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("frame") / "root"
    for name in (*(f"pack-{i}" for i in range(9)), LONG):  # the newest is shown first
        small_pack(root / name, 2, ("gradcam",))
    with served(root, log=tmp_path_factory.mktemp("log") / "log.txt") as base:
        yield base


def test_another_pack_by_the_keyboard(address, open_page):
    page = open_page(address)
    page.get_by_role("heading", name=LONG).wait_for()
    page.locator(".st-key-pack-chip button").press("Enter")
    field = page.get_by_role("searchbox", name="Search packs")
    page.wait_for_function(
        "() => [...document.querySelectorAll('*')].some(e => e.shadowRoot?.activeElement?.type === 'search')"
    )
    assert page.locator(".pack .thumb").count() == 10
    shot(page, "chip")
    field.fill("pack-3")
    assert page.locator(".pack:visible").count() == 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("pack=pack-3-"))
    page.get_by_role("heading", name="pack-3").wait_for()
    page.locator(".packs").wait_for(state="hidden")
    page.go_back()
    page.get_by_role("heading", name=LONG).wait_for()


def test_the_bar_of_a_narrow_screen_leads_to_every_page(address, open_page):
    page = open_page(address, "narrow", "dark")
    page.locator(".cell .frame.there").first.wait_for()
    bar = page.locator(".st-key-bottom-bar")
    box = served_viewer.box(bar)
    assert box["x"] == 0 and box["width"] == 390 and round(box["y"] + box["height"]) == 844
    for target in bar.locator("a, button").all():
        size = served_viewer.box(target)
        assert size["width"] >= 44 and size["height"] >= 44
    assert not page.get_by_test_id("stSidebar").is_visible()
    last = page.locator(".st-key-gallery-cells")
    page.get_by_test_id("stMain").evaluate("e => e.scrollTo(0, e.scrollHeight)")
    under = served_viewer.box(last)
    assert under["y"] + under["height"] <= box["y"], "hidden behind the bar"
    bar.get_by_role("link", name="Mistakes").click()
    page.wait_for_url(re.compile("/mistakes"))
    choose_pack(page, "pack-2")
    bar.get_by_role("button", name="More").click()
    page.get_by_role("link", name="Train").wait_for()
    shot(page, "bar")
    page.get_by_role("link", name="Train").click()
    page.wait_for_url(re.compile(r"/train\?.*pack=pack-2-"))
    page.get_by_role("heading", name="Train a head").wait_for()
    bar.get_by_role("link", name="Gallery").click()
    page.get_by_role("heading", name="pack-2").wait_for()


@pytest.mark.parametrize(("size", "scheme"), [("wide", "light"), ("narrow", "dark")])
def test_the_frame_fits_a_long_name_and_every_page(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    page.locator(".cell .frame.there").first.wait_for()
    shot(page, f"long-name-{size}-{scheme}")
    button = page.locator(".st-key-pack-chip button")
    chip = served_viewer.box(button)
    assert chip["x"] >= 0 and chip["x"] + chip["width"] <= page.viewport_size["width"]
    parts = button.locator("p, [data-testid]").all()
    assert len(parts) > 2
    for box in served_viewer.boxes(*parts):
        assert chip["x"] <= box["x"] and box["x"] + box["width"] <= chip["x"] + chip["width"]
    if size == "wide":
        links = page.get_by_test_id("stTopNavLink").all()
        assert len(links) == len(PAGES)
        ends = served_viewer.boxes(*links)
        assert max(box["x"] + box["width"] for box in ends) <= chip["x"]
    else:
        page.get_by_role("button", name="More").click()
        others = page.get_by_test_id("stPopoverBody").get_by_role("link")
        others.last.wait_for()
        assert others.count() == len(PAGES) - len(frame.FIRST)
        for box in served_viewer.boxes(*others.all()):
            assert box["height"] >= 44 and 0 <= box["y"] <= 844 - box["height"]
