"""Triage in Chromium: choose photos, tag by keys, undo, filter, save a slice, export, compare the slices."""

import os
import re

import pytest
import served_viewer

pytest.importorskip("streamlit")

from synthetic_packs import small_pack
from viewer_pages import choose_option, downloaded, served, shot

from xattn.app.library import Library
from xattn.app.triage import tag_files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    small_pack(root / "first", 26, ("gradcam",))
    return root


# As much of fiftyone as is used: a data set's file is its number of photos.
FIFTYONE = """
class types: FiftyOneDataset = None
class Sample(dict):
    def __init__(self, **fields): self.update(fields)
Classification = Heatmap = Sample
class Dataset(list):
    add_samples = list.extend
    def export(self, export_dir, **options):
        open(export_dir + "/samples.json", "w").write(str(len(self)))
    def delete(self): pass
"""


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    packages = tmp_path_factory.mktemp("packages")
    (packages / "fiftyone.py").write_text(FIFTYONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(packages), prepend=os.pathsep)
        with served(root, log=root / "log") as address:
            yield address


@pytest.fixture(autouse=True)
def clean(root):
    yield
    for left in root.glob("*.sqlite"):
        left.unlink()


def cell(page, number):
    return page.locator(f'.cell[data-id^="photo-{number:05}@"]')


def test_choose_tag_undo_filter_save_and_export(address, open_page, root):
    page = open_page(address)
    cell(page, 0).locator(".frame.there").wait_for()
    cell(page, 0).focus()
    page.keyboard.press("x")
    cell(page, 2).click(modifiers=["Shift"])
    page.get_by_text("3 chosen", exact=True).wait_for()
    page.wait_for_url(re.compile("chosen=[0-9a-f]{10}"))
    page.reload()
    page.get_by_text("3 chosen", exact=True).wait_for()
    cell(page, 2).locator(".frame.there").wait_for()
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
    shot(page, "triage")

    search.fill("")
    search.press("Enter")
    page.get_by_text("1 to 24 of 26 maps").wait_for()
    page.get_by_role("button", name="Filters").click()
    tags = page.get_by_test_id("stPopoverBody").get_by_role("combobox", name="Tags")
    tags.scroll_into_view_if_needed()
    chart = page.locator(".st-key-gallery-histogram [data-testid=stVegaLiteChart]")
    chart.locator("canvas, svg").first.wait_for()  # it moves what is below it
    choose_option(page, tags, "wrong label (3)")
    page.wait_for_url(re.compile(r"tag=wrong\+label"))
    shot(page, "triage-filters")
    page.keyboard.press("Escape")  # closes the list of tags
    page.keyboard.press("Escape")
    page.get_by_test_id("stPopoverBody").wait_for(state="detached")
    page.get_by_text("3 maps, filtered from 26").wait_for()
    cell(page, 5).wait_for()
    assert [cell(page, n).count() for n in (2, 3, 4, 5)] == [0, 1, 1, 1]

    page.get_by_role("button", name="Slices").click()
    page.get_by_label("Save this view as").fill("to be told anew")
    page.get_by_label("Save this view as").press("Enter")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Saved: to be told anew").wait_for()
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Export").click()
    listed = downloaded(page, page.get_by_role("button", name="List of photos"))
    names = listed.path().read_text(encoding="utf-8").splitlines()[1:]
    assert names == [f"photo-0000{n}" for n in (3, 4, 5)]
    page.get_by_label("Name of a new folder").fill("set")
    page.get_by_label("Name of a new folder").press("Enter")
    page.get_by_role("button", name="Write a FiftyOne data set").click()
    page.get_by_text("set is written: 3 photos.").wait_for()
    assert (root / "set" / "samples.json").read_text() == "3"

    page.get_by_role("link", name="Mistakes").filter(visible=True).first.click()
    page.get_by_role("tab", name="Slices").click()
    table = page.get_by_test_id("stDataFrame")
    table.locator("canvas").first.wait_for()
    table.scroll_into_view_if_needed()
    table.get_by_text("to be told anew").wait_for(state="attached")
    shot(page, "slices")
    box = served_viewer.box(table)
    page.mouse.click(box["x"] + 20, box["y"] + 52)  # the box of the first row
    page.wait_for_url(re.compile(r"^[^?]*/\?.*tag=wrong\+label"))
    page.get_by_text("3 maps, filtered from 26").wait_for()


def test_j_turns_the_page_and_chosen_photos_stay_chosen(address, open_page):
    page = open_page(address)
    cell(page, 23).hover()  # its box is shown, and all pictures above it have their places
    cell(page, 23).get_by_role("checkbox").click()
    page.get_by_text("1 chosen", exact=True).wait_for()
    cell(page, 23).focus()
    page.keyboard.press("j")
    cell(page, 24).wait_for()
    page.wait_for_function("""() => {
      let at = document.activeElement;
      while (at?.shadowRoot) at = at.shadowRoot.activeElement;
      return at?.dataset.id?.startsWith("photo-00024@");
    }""")
    page.keyboard.press("x")
    page.get_by_text("2 chosen", exact=True).wait_for()
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
    page.locator("[data-test-script-state=notRunning]").wait_for()
    for key in "1j2j13":  # faster than the script runs
        page.keyboard.press(key)
    page.get_by_role("heading", name="photo-00005").wait_for()
    page.locator("[data-tag]", has_text="looks elsewhere").wait_for()
    page.wait_for_function("""() => document.querySelectorAll("[aria-label=Note]").length === 1""")
    note = page.get_by_label("Note")
    note.fill("a note")
    note.press_sequentially(" 12jk")  # typing is no key
    note.blur()
    page.keyboard.press("k")
    page.get_by_role("heading", name="photo-00004").wait_for()
    page.wait_for_url(re.compile("image=photo-00004"))
    shot(page, "triage-image")
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
