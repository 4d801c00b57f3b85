"""Links between the documentation pages resolve, and the results' index names every page."""

import csv
import re
from itertools import count
from pathlib import Path

import pytest

from xattn.attention.base import mechanism_class
from xattn.eval.studies.attention_maps import LARGEST, with_maps

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
LARGEST_VALUES = 500_000  # bytes of a file of raw values
KEEP = "python -c \"from xattn.eval import read_json; read_json('{0}').to_csv('{1}-values.csv', True)\""
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("models/heads/*/README.md")),
]


def text_of(page: Path) -> str:
    """The page without its code blocks, where # starts no heading."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def links_of(page: Path) -> list[str]:
    """Targets of the page's links and pictures that are not web addresses, code spans aside."""
    text = re.sub(r"`[^`\n]*`", "code", text_of(page))
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text)


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings by GitHub's rule; repeated headings get -1, -2, ..."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", text_of(page), re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        numbered = (f"{anchor}-{n}" for n in count(1))
        anchors.add(
            anchor if anchor not in anchors else next(a for a in numbered if a not in anchors)
        )
    return anchors


def target_of(page: Path, link: str) -> tuple[Path, str]:
    path, _, anchor = link.partition("#")
    return (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page):
    for link in links_of(page):
        target, anchor = target_of(page, link)
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors_of(target), link


def test_anchors_follow_githubs_rule(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What's `a_b`, in-line?\n## [Linked](x.md) & more\n## Same\n## Same\n```\n# no\n```\n"
    )
    assert anchors_of(page) == {"whats-a_b-in-line", "linked--more", "same", "same-1"}


def test_the_index_links_every_page_of_results():
    index = RESULTS / "README.md"
    linked = {target_of(index, link)[0] for link in links_of(index)}
    assert set(RESULTS.glob("*.md")) - {index} <= linked


def test_every_file_beside_the_results_is_linked_from_a_page():
    linked = {target_of(page, link)[0] for page in RESULTS.glob("*.md") for link in links_of(page)}
    assert {file for file in RESULTS.iterdir() if file.suffix != ".md"} <= linked


@pytest.mark.parametrize("page", sorted({page.stem for page in RESULTS.glob("*.md")} - {"README"}))
def test_a_page_of_results_links_the_raw_values_beside_it(page):
    values = set(RESULTS.glob(f"{page}-values*.csv"))
    linked = {
        target_of(RESULTS / f"{page}.md", link)[0] for link in links_of(RESULTS / f"{page}.md")
    }
    shared = {file for file in linked if "-values" in file.stem}
    assert shared and values <= linked, f"{page} links no {page}-values.csv"
    for file in values:
        assert file.stat().st_size <= LARGEST_VALUES, f"{file.name}: make it a file of the release"
        lines = file.read_text(encoding="utf-8").splitlines()
        assert len(lines) > 2 and lines[0].count(",") > 0, file.name


@pytest.mark.parametrize("kind", ["timm", "clips", "detectors", "segmenters"])
def test_an_error_recommends_a_method_that_runs_on_the_same_family(kind):
    """The table of families holds the error of every method that does not run."""
    table = csv.DictReader((ROOT / "docs" / "explainers-by-family.csv").read_text().splitlines())
    rows = [row for row in table if row["kind"] == kind]
    runs = {(row["family"], row["explainer"]) for row in rows if row["result"] != "no"}
    for row in rows:
        for advice in re.findall(r"(?:;|, or) (?:or )?use (.*)$", row["reason"]):
            named = re.findall(r"'(\w+)'", advice)
            assert any((row["family"], name) in runs for name in named), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    folders = "app|docs|eval|models|tests|xattn"
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"(?<![\w./])(?:{folders})/[\w/.-]*\.(?:py|md)\b", text):
        assert (ROOT / name).is_file(), name


def test_every_mechanism_with_maps_has_a_page_with_a_small_picture_of_them():
    """``python -m xattn.eval.studies attention-maps`` draws them. Controls share the page of their module."""
    own = [n for n in with_maps() if mechanism_class(n).__module__.startswith("xattn.")]
    for name in own:
        cls = mechanism_class(name)
        shared = cls.__module__.rpartition(".")[2] if cls.entry.control else name
        page = ROOT / "docs" / "attention" / f"{shared}.md"
        picture = page.with_name(f"{name}.jpg")
        assert picture in {target_of(page, link)[0] for link in links_of(page)}, name
        assert 0 < picture.stat().st_size <= LARGEST, name
