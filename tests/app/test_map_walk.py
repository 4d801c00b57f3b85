"""The map in Chromium, as a person would use it: from the gallery to a lasso, a photo, its like, and a group."""

from __future__ import annotations

import re

import pytest
import served_viewer

pytest.importorskip("streamlit")

from corner_photos import COUNT, photo
from synthetic_packs import described
from viewer_pages import served, shot

from xattn.packs.writer import save_pack


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    save_pack(
        folder / "root" / "corners", map(photo, range(COUNT)), overlays=False, metrics=described()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with served(folder / "root", log=folder / "log.txt") as base:
            yield base


def drawn(page, corners):
    """Draw on the map along ``corners``, shares of its width and height."""
    plane = page.locator(".drawing")
    plane.scroll_into_view_if_needed()
    box = served_viewer.box(plane)
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def chosen(page):
    """How many photos the map says are chosen."""
    return int(re.match(r"\d+", page.locator(".scatter .count").inner_text())[0])


def test_from_the_gallery_to_chosen_photos_to_one_and_its_like(address, open_page):
    page = open_page(address)
    page.locator(".cell .frame.there").first.wait_for()
    page.get_by_role("link", name="Map", exact=True).last.click()
    page.get_by_text(f"{COUNT} photos", exact=True).wait_for()
    shot(page, "map")

    drawn(page, [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)])
    page.get_by_text(f"{COUNT} of {COUNT} chosen").wait_for()
    page.get_by_role("button", name="Rectangle").click()
    drawn(page, [(0.02, 0.02), (0.5, 0.98)])
    page.wait_for_function(f"() => !document.body.innerText.includes('{COUNT} photos,')")
    assert 0 < chosen(page) < COUNT

    legend = page.locator(".legend button").first
    legend.click()
    own = int(legend.locator("span").last.inner_text())
    page.get_by_text(re.compile(rf"^{own} photos, 100% predicted as ")).wait_for()
    shot(page, "map-chosen")
    page.locator(".drawing").focus()
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowRight")
    page.locator(".hint img").wait_for()
    page.keyboard.press("Space")
    page.get_by_text(re.compile("^1 photo, ")).wait_for()

    page.get_by_role("button", name="More like this").click()
    page.wait_for_url(re.compile(r"/image\?.*tab=Similar"))
    page.locator(".st-key-similar .frame.there").nth(1).wait_for()
    page.get_by_text(re.compile("^distance 0")).first.wait_for()
    shot(page, "similar")
    page.go_back()
    page.get_by_text("1 of 48 chosen").wait_for()
    page.get_by_role("tab", name="Groups").click()
    page.locator(".st-key-photomap-groups .cell", has_text="Bottom right corner").wait_for()
    page.locator(".st-key-photomap-groups .cell").nth(1).click()
    page.wait_for_url(re.compile("group=2"))
    page.get_by_role("heading", name=re.compile("^Group 2: ")).wait_for()
    shot(page, "groups")
    page.reload()
    page.get_by_role("heading", name=re.compile("^Group 2: ")).wait_for()
    page.locator(".st-key-photomap-group .cell").first.click()
    page.wait_for_url(re.compile(r"/image\?.*image=photo-"))
