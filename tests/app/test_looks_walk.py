"""The looks in Chromium as a person goes: a photo under the pointer, an outline, the page of the photo."""

import pytest

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import SCREENS, served

SHOWN = "cell => Number(getComputedStyle(cell.querySelector('.bare')).opacity) === 1"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    small_pack(root / "pack", 6, ("gradcam",))
    with served(root, log=root / "log") as address:
        yield address


def wait_shown(page, cell):
    cell.locator(".bare").wait_for(state="attached")
    page.wait_for_function(f"cell => ({SHOWN})(cell)", arg=cell.element_handle())


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_from_the_gallery_to_an_outline_on_the_photos_page(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    first, second = (page.locator(".cell").nth(i) for i in (0, 1))
    first.locator(".frame.there").wait_for()
    box, beside = first.locator(".frame").bounding_box(), second.locator(".frame").bounding_box()
    assert abs(box["width"] - box["height"]) < 1
    if size == "narrow":
        assert beside["y"] == box["y"] and beside["x"] + beside["width"] > 390 - 20
    first.focus()
    page.keyboard.press("ArrowRight")
    wait_shown(page, second)
    assert first.locator(".frame").bounding_box() == box, "nothing moves"
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
