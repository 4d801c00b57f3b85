"""docs/methods.md has a section for every explainer, with its cost, its pitfall and its picture."""

import re
from pathlib import Path

import pytest
from PIL import Image

from xattn.explainers.base import EXPLAINERS, explainer_class

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "methods.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^#{2,3} |\Z)", TEXT, re.S | re.M))
OURS = [n for n in EXPLAINERS.names() if explainer_class(n).__module__.startswith("xattn.")]
MOST = 2_000_000  # bytes of the gallery


def test_every_explainer_has_a_section_and_no_section_is_of_another():
    assert set(SECTIONS) == set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_a_section_says_what_the_method_is_costs_needs_and_when_it_misleads(name):
    section = SECTIONS.get(name, "")
    assert section.strip().startswith("**") and "```text\n" in section
    for part in ("Cost", "Needs", "When to use it", "Pitfalls"):
        assert f"* **{part}**: " in section, part
    assert f"](gallery/{name}.jpg)" in section


@pytest.mark.parametrize("name", OURS)
def test_an_explainer_has_a_picture_in_the_gallery(name):
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert f"](gallery/{name}.jpg)" in page
    with Image.open(DOCS / "gallery" / f"{name}.jpg") as picture:
        assert picture.height >= 100 and picture.width >= picture.height


def test_the_gallery_is_small_and_has_no_other_pictures():
    files = list((DOCS / "gallery").iterdir())
    assert sum(file.stat().st_size for file in files) < MOST
    pages = TEXT + (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert all(f"gallery/{file.name})" in pages for file in files)
