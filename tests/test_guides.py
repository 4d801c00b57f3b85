"""What docs/coming-from.md and docs/which-method.md claim: lines of code, names, and figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_page_examples import BLOCK

from xattn.eval import GROUPS
from xattn.explainers import list_explainers
from xattn.heads import list_heads

ROOT = Path(__file__).resolve().parents[1]
COMING, WHICH = ROOT / "docs" / "coming-from.md", ROOT / "docs" / "which-method.md"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The cells of the text's tables, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def line_count(block: str) -> int:
    return sum(bool(line.strip()) for line in block.splitlines())


def test_the_same_task_takes_at_most_seven_lines_here_and_thirteen_to_sixteen_there():
    section = text_of(COMING).partition("## One photo, all of it")[2].partition("\n## ")[0]
    (ours,) = BLOCK.findall(section)
    theirs = re.findall(r"^```text\n(.*?)^```", section, re.S | re.M)
    assert line_count(ours) <= 7 and ";" not in ours
    assert all(len(line) <= 108 for line in ours.splitlines())
    assert [line_count(block) for block in theirs] == [16, 13]
    for part in ("overlay()", '"masking"', '"insertion-deletion"', '"road"'):
        assert part in ours


def test_the_methods_of_the_tables_exist():
    known = {*list_explainers(), *list_heads()}
    named = rows(text_of(WHICH).partition("## Which metric")[0])
    for first, second, *third in named:
        for name in re.findall(r"`([a-z_]+)`", second if third else first):
            assert name in known, name
    assert len(named) >= 13


@pytest.mark.parametrize("page", [COMING, WHICH], ids=lambda page: page.stem)
def test_the_groups_of_metrics_exist(page):
    found = re.findall(r"(?:metrics|groups) ?= ?\[([^\]]*)\]", text_of(page))
    assert found
    for names in found:
        assert {name.strip('" ') for name in names.split(",")} <= set(GROUPS), names


@pytest.mark.parametrize("page", [WHICH, ROOT / "README.md"], ids=lambda page: page.stem)
def test_figures_stand_in_the_page_of_results_that_is_linked_beside_them(page):
    text = re.sub(r"\n  ", " ", text_of(page))  # items of a list that go on
    checked = 0
    for line in text.splitlines():
        links = re.findall(r"\]\(((?:docs/)?results/[\w-]+\.md)", line)
        if not links or not line.startswith(("| ", "* ")):
            continue
        said = " ".join(text_of(page.parent / link) for link in links)
        said = said.replace(",", "")
        plain = re.sub(r"`[^`]*`|\]\([^)]*\)|ViT-\S+", "", line).replace(",", "")
        for figure in re.findall(r"(?<![\w./-])\d+\.\d+|1/\d+\.\d", plain):
            assert figure in said, (figure, line)
            checked += 1
    assert checked >= 5
