"""Gallery, photo, map in Chromium, each in a session of its own; the menu's way back; and what a person
sees when the viewer itself fails."""

import re
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("streamlit")

import served_viewer
from synthetic_packs import CLASSES, described, explanation, picture, small_pack
from viewer_pages import choose_pack

from xattn.app import components
from xattn.app.components import theme
from xattn.app.components.theme import name_html
from xattn.app.demo import pack_job
from xattn.app.library import Library
from xattn.cli import main
from xattn.packs.writer import save_pack

LONG = "n01443537_goldfish_swimming_in-a-small_aquarium_0001.jpeg"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path") / "root"
    small_pack(folder / "one", 3)
    many = [
        explanation(i, method, target=(i + c) % len(CLASSES), source=picture(i), file_name=name)
        for i, name in enumerate((LONG, "b.jpg", "c.jpg"))
        for method in ("gradcam", "saliency")
        for c in range(5)
    ]
    save_pack(folder / "many", many, overlays=False, metrics=described())
    return folder


@pytest.fixture(scope="module")
def demo(root, tmp_path_factory):
    """The demo pack as its button makes it, but of fewer photos, methods and metrics."""
    if pack_job.missing():
        pytest.skip("the demo's packages are not installed")
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_job, "LIMIT", 1)
        patch.setattr(pack_job, "EXPLAINERS", ("gradcam",))
        patch.setattr(pack_job, "METRICS", ("masking",))
        pack_job.prepare(folder)
        assert main(pack_job.arguments(root / "demo", folder)) == 0


@pytest.fixture(scope="module")
def address(root, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log.txt"
    script = Path(__file__).with_name("failing_viewer.py")
    with served_viewer.served(root, log, run=[str(script)]) as (base, _):
        yield base


def gallery(root, address, name):
    ids = {info.name: info.id for info in Library(root).packs()}
    [found] = [ids[n] for n in ids if n.startswith(name)]
    return f"{address}/?pack={found}"


def open_photo(page):
    page.locator(".st-key-gallery-cells .frame.there").first.wait_for()
    page.locator(".st-key-gallery-cells .cell").first.click()
    page.wait_for_url(re.compile("/image"))
    page.locator(".st-key-maps .frame.there").nth(1).wait_for()


def open_map(page):
    """A map that is not in focus yet; it is then."""
    wanted = page.locator(".st-key-maps .cell:not([aria-current]):not([data-id^='photo '])").first
    name = wanted.get_attribute("data-id")
    wanted.click()
    page.wait_for_url(re.compile("entry="))
    page.locator(f".st-key-maps .cell[aria-current=true][data-id='{name}']").wait_for()


def test_from_the_demo_packs_gallery_to_a_photo_to_a_map(root, demo, address, open_page):
    page = open_page(gallery(root, address, "demo"))
    open_photo(page)
    open_map(page)


def test_maps_open_after_the_gallery_of_a_pack_with_one_class(root, address, open_page):
    page = open_page(gallery(root, address, "one"))
    page.locator(".cell .frame.there").first.wait_for()
    choose_pack(page, "many")
    open_photo(page)
    open_map(page)


def test_the_menu_leads_back_to_the_filtered_gallery(root, address, open_page):
    page = open_page(f"{gallery(root, address, 'many')}&q=b.jpg&sort=name")
    open_photo(page)
    for name, where in (
        ("Gallery", r"/\?.*q=b.jpg"),
        ("Compare", "/compare"),
        ("Image", r"/image.*view=.*q%3Db.jpg"),
        ("Gallery", r"/\?.*q=b.jpg"),
    ):
        page.get_by_role("link", name=name).first.click()
        page.wait_for_url(re.compile(where))
    page.get_by_text("1 map, filtered from 3", exact=True).wait_for()
    assert "sort=name" in page.url
    page.get_by_role("button", name="Clear all").click()
    page.wait_for_function("() => !location.search.includes('q=')")
    page.get_by_role("link", name="Compare").first.click()
    page.wait_for_url(re.compile("/compare"))
    page.get_by_role("link", name="Gallery").first.click()
    page.wait_for_url(re.compile("sort=name"))
    assert "q=" not in page.url


@pytest.mark.parametrize("part", ["body", "click"])
def test_an_error_is_one_sentence_with_a_way_on(root, address, open_page, part):
    page = open_page(gallery(root, address, "one"))
    open_photo(page)
    if part == "body":
        page.get_by_role("tab", name="Fidelity").click()
    else:
        page.locator(".st-key-classes .cell").first.click()
    page.get_by_role("alert").filter(has_text="Something went wrong on this page").wait_for()
    said = page.locator("body").inner_text()
    assert "Traceback" not in said and "RuntimeError" not in said and "wants it" not in said
    links = page.get_by_role("link").evaluate_all("found => found.map(link => link.href)")
    assert links and all(link.startswith(address) for link in links)
    page.get_by_role("link", name="Open the gallery").click()
    page.locator(".st-key-gallery-cells .frame.there").first.wait_for()


# ---------------------------------------------------------------------- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_empty_radio_button_stands_out_from_the_ground(root, address, open_page, scheme):
    page = open_page(gallery(root, address, "many"), scheme=scheme)
    page.get_by_role("button", name="Filters").click()
    option = page.get_by_test_id("stRadioOption").filter(has_text=re.compile("^Wrong$"))
    line, ground = option.evaluate(
        """option => {
          const circle = option.querySelector(":scope > div > div");
          let ground = option;
          while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)")
            ground = ground.parentElement;
          return [getComputedStyle(circle).borderTopColor, getComputedStyle(ground).backgroundColor];
        }"""
    )
    assert contrast(line, ground) >= 3


def contrast(one, other):
    """The contrast of two CSS colours ``rgb(r, g, b)`` as WCAG 2 defines it."""

    def luminance(colour):
        values = [
            int(v) / 255 for v in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()
        ]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", ["Sort by", "Order"])
def test_no_choice_of_a_list_is_cut_off(root, address, open_page, name):
    page = open_page(gallery(root, address, "many"))
    page.get_by_role("combobox", name=re.compile(name)).click()
    page.get_by_role("option").first.wait_for()
    names = page.get_by_role("option").evaluate_all(
        "found => found.map(e => e.firstElementChild).map(e => [e.scrollWidth, e.clientWidth])"
    )
    assert all(wanted <= there for wanted, there in names)
    box = served_viewer.box(page.get_by_role("listbox"))
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280


@pytest.mark.parametrize("path, where", [("", ".cell .line"), ("image", "h1")])
def test_a_long_file_name_breaks_behind_its_marks(root, address, open_page, path, where):
    url = gallery(root, address, "many").replace("/?", f"/{path}?")
    page = open_page(url, size="narrow")
    name = page.locator(where).filter(has_text=LONG).first
    name.wait_for()
    lines, rows = name.evaluate(
        """name => {
          const parts = [...name.childNodes].filter(part => part.nodeType === Node.TEXT_NODE);
          const tops = parts.map(part => {
            const range = document.createRange();
            range.selectNode(part);
            return [...range.getClientRects()].map(box => Math.round(box.top));
          });
          return [tops.map(found => found.length), new Set(tops.flat()).size];
        }"""
    )
    assert rows > 1 and set(lines) == {1}


@pytest.mark.parametrize("text", ["scores -0.25 to 1,000.5", "scores 1e-05 to 3.2e+04"])
def test_a_number_does_not_break(text):
    assert name_html(text) == f'<h1 class="name">{text}</h1>'


def test_the_grid_breaks_names_as_titles_do():
    script = (resources.files(components) / "grid.js").read_text(encoding="utf-8")
    assert f"/{theme._MARKS.pattern}/g" in script


def test_names_are_text():
    assert "<wbr>&lt;b&gt;.<wbr>jpg" in name_html("a_<b>.jpg")
