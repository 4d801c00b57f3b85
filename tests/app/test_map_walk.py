"""The map in Chromium, as a person would use it: from the gallery to a lasso, a photo, its like, and a group."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import served_viewer

pytest.importorskip("streamlit")

from corner_photos import COUNT, photo
from synthetic_packs import described
from viewer_pages import served, shot

from xattn.app.library import Library
from xattn.app.triage.tag_files import store_of
from xattn.packs.writer import save_pack

OFF = ["photo-00000", "photo-00001"]  # photos of the pack "some" whose constant maps are no points


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("map") / "root"
    some = [photo(i, features=False) for i in range(8)]
    some[:2] = [replace(one, map=np.ones((7, 7), np.float32)) for one in some[:2]]
    save_pack(root / "some", some, overlays=False)
    save_pack(root / "corners", map(photo, range(COUNT)), overlays=False, metrics=described())
    return root


@pytest.fixture(scope="module")
def address(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root.parent / "cache"))
        with served(root, log=root.parent / "log.txt") as base:
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


def test_a_lasso_with_shift_keeps_photos_that_are_not_on_the_map(root, address, open_page):
    library = Library(root)
    [pack_id] = [info.id for info in library.packs() if info.name == "some"]
    store = store_of(library.open(pack_id))
    page = open_page(f"{address}/photomap?pack={pack_id}&chosen={store.keep_set(OFF)}")
    bar = page.locator(".st-key-chosen-bar")
    bar.get_by_text("2 chosen", exact=True).wait_for()
    page.keyboard.down("Shift")
    drawn(page, [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)])
    page.keyboard.up("Shift")
    bar.get_by_text("8 chosen", exact=True).wait_for()
    page.locator(".drawing").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    bar.get_by_text("7 chosen", exact=True).wait_for()
    assert set(OFF) < set(store.set_of())
    drawn(page, [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98)])
    bar.get_by_text("6 chosen", exact=True).wait_for()

    page.set_viewport_size({"width": 390, "height": 844})
    bar.get_by_role("button", name="One by one").wait_for()
    names = ("Gallery", "One by one", "Tag", "Export", "Clear")
    places = served_viewer.boxes(*(bar.get_by_role("button", name=name) for name in names))
    assert all(0 <= at["x"] and at["x"] + at["width"] <= 390 for at in places)
    assert len({round(at["y"]) for at in places}) <= 2
