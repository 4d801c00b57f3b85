"""Triage by keys in Chromium: choose three photos, tag, move, undo, filter."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

from conftest import served

from xattn.app.library import Library
from xattn.app.synthetic_packs import small_pack
from xattn.app.triage import tag_files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    small_pack(root / "first", 26, ("gradcam",))
    return root


@pytest.fixture(scope="module")
def address(root):
    with served(root, log=root / "log") as address:
        yield address


@pytest.fixture(autouse=True)
def clean(root):
    yield
    for left in root.glob("*.sqlite"):
        left.unlink()


def cell(page, number):
    return page.locator(f'.cell[data-id^="photo-{number:05}@"]')


def screenshot(page, name):
    screens = os.environ.get("XATTN_SCREENS")
    if screens:
        Path(screens).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(screens, f"{name}.png"), animations="disabled")


@pytest.mark.parametrize("size, scheme", [("wide", "light"), ("narrow", "dark")])
def test_choose_tag_move_undo_filter(address, open_page, size, scheme):
    page = open_page(address, size, scheme)
    cell(page, 0).locator(".frame.there").wait_for()
    cell(page, 0).focus()
    page.keyboard.press("x")
    cell(page, 2).click(modifiers=["Shift"])
    page.get_by_role("button", name="3 photos chosen").wait_for()
    page.keyboard.press("1")
    page.locator(".mark", has_text="look again").nth(2).wait_for()
    cell(page, 2).focus()
    page.keyboard.press("j")
    assert cell(page, 3).evaluate("e => e === e.getRootNode().activeElement")
    page.keyboard.press("z")
    page.locator(".mark").first.wait_for(state="detached")
    page.keyboard.press("Shift+Z")
    page.locator(".mark").nth(2).wait_for()
    page.keyboard.press("Escape")
    page.locator(".chosen").first.wait_for(state="detached")
    for key in "2j2j2":  # faster than the script runs: none may be lost
        page.keyboard.press(key)
    page.locator(".mark", has_text="wrong label").nth(2).wait_for()
    search = page.get_by_label("Search")
    search.fill("photo-0000")
    search.press("1")  # typing marks nothing
    search.press("Backspace")
    search.press("Enter")
    page.get_by_text("10 maps, filtered from 26").wait_for()
    assert page.locator(".mark", has_text="look again").count() == 3
    screenshot(page, f"triage-{size}-{scheme}")
    if size == "narrow":
        return
    page.goto(f"{address}/?tag=wrong+label")
    page.get_by_text("3 maps, filtered from 26").wait_for()
    cell(page, 5).wait_for()
    assert [cell(page, n).count() for n in (2, 3, 4, 5)] == [0, 1, 1, 1]
    page.get_by_role("button", name="Export").click()
    with page.expect_download() as got:
        page.get_by_role("button", name="List of photos").click()
    names = got.value.path().read_text(encoding="utf-8").splitlines()[1:]
    assert names == [f"photo-0000{n}.jpg" for n in (3, 4, 5)]


def test_j_turns_the_page_and_chosen_photos_stay_chosen(address, open_page):
    page = open_page(address)
    cell(page, 23).locator(".box").click(force=True)
    page.get_by_role("button", name="1 photo chosen").wait_for()
    cell(page, 23).focus()
    page.keyboard.press("j")
    cell(page, 24).wait_for()
    page.wait_for_function("""() => {
      let at = document.activeElement;
      while (at?.shadowRoot) at = at.shadowRoot.activeElement;
      return at?.dataset.id?.startsWith("photo-00024@");
    }""")
    page.keyboard.press("x")
    page.get_by_role("button", name="2 photos chosen").wait_for()
    page.keyboard.press("1")
    cell(page, 24).locator(".mark").wait_for()
    page.keyboard.press("k")
    cell(page, 23).locator(".mark").wait_for()
    assert cell(page, 22).locator(".mark").count() == 0


def test_on_a_photo_keys_tag_and_move_and_a_note_is_kept(address, open_page, root):
    page = open_page(f"{address}/?q=photo-0000")
    cell(page, 3).locator(".frame.there").wait_for()
    cell(page, 3).click()
    page.wait_for_url(re.compile("image=photo-00003"))
    page.locator(".st-key-maps .frame.there").first.wait_for()
    page.locator(".keys[data-keys]").wait_for(state="attached")
    for key in "1j2j13":  # faster than the script runs
        page.keyboard.press(key)
    page.get_by_role("heading", name="photo-00005").wait_for()
    page.locator("[data-tag]", has_text="looks elsewhere").wait_for()
    note = page.get_by_label("Note")
    note.fill("a note")
    note.press_sequentially(" 12jk")  # typing is no key
    note.blur()
    page.keyboard.press("k")
    page.get_by_role("heading", name="photo-00004").wait_for()
    page.wait_for_url(re.compile("image=photo-00004"))
    screenshot(page, "triage-image")
    page.get_by_role("button", name="Gallery").click()
    cell(page, 5).locator(".mark").first.wait_for()
    assert cell(page, 3).locator(".mark").all_inner_texts() == ["look again"]
    assert cell(page, 4).locator(".mark").all_inner_texts() == ["wrong label"]
    assert cell(page, 5).locator(".mark").all_inner_texts() == [
        "look again",
        "looks elsewhere",
        "note",
    ]
    pack = Library(root).open(Library(root).packs()[0].id)
    assert tag_files.store_of(pack).marks(["photo-00005"])["photo-00005"].note == "a note 12jk"
