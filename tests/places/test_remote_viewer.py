"""A viewer on a folder of an object store, walked in Chromium; screenshots go to ``XATTN_SCREENS``."""

import os
from pathlib import Path

import pytest

pytest.importorskip("streamlit")
pytest.importorskip("playwright.sync_api")

import served_viewer
from object_stores import upload
from synthetic_packs import small_pack


def test_packs_of_a_store_are_walked_from_the_gallery_to_a_map(s3_bucket, tmp_path, browser):
    small_pack(tmp_path / "runs/measured", 12, ("gradcam", "saliency"))
    url = upload(tmp_path / "runs", f"{s3_bucket}/runs")
    shots = Path(os.environ.get("XATTN_SCREENS", tmp_path))
    with served_viewer.served(url, tmp_path / "log.txt") as (address, _):
        page, wrong = browser.new_page(viewport={"width": 390, "height": 900}), []
        page.set_default_timeout(300_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else 0)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.locator(".cell .frame.there").first.wait_for()
        page.screenshot(path=shots / "remote-gallery.png")
        page.locator(".cell").first.click()
        page.wait_for_url("**/image**")
        page.locator(".st-key-maps .frame.there").nth(1).wait_for()
        page.screenshot(path=shots / "remote-image.png")
        page.goto(f"{address}/train")
        page.get_by_text("Training is off, because this viewer shows").wait_for()
        page.screenshot(path=shots / "remote-train.png")
        assert page.locator("[data-testid=stException]").count() == 0
        page.close()
    assert not wrong, wrong
