"""The gallery's filters in Chromium: chips, lists of classes with counts, the brush over a histogram, and
the CSV of what is left."""

import csv
import re

import pytest

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import SCREENS, choose_option, served


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    small_pack(folder / "root" / "pack", 60, ("gradcam", "random"))
    with served(folder / "root", log=folder / "log.txt") as base:
        yield base


@pytest.mark.parametrize(("size", "scheme"), SCREENS)
def test_a_person_filters_the_gallery_and_takes_the_filters_away(address, open_page, size, scheme):
    page = open_page(f"{address}/?right=wrong", size, scheme)
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
    box = bars.bounding_box()
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
    csv_link = page.get_by_role("link", name="CSV of the selection")
    with page.expect_download() as download:
        csv_link.evaluate("link => { link.target = ''; link.click(); }")
    lines = list(csv.reader(download.value.path().read_text().splitlines()))
    assert len(lines) == 16
    chips.get_by_role("button", name="Clear all").click()
    page.get_by_text("1 to 24 of 60 maps", exact=True).wait_for()
    assert chips.count() == 0
