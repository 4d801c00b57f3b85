"""``make docs``: the pages and the API reference build without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--quiet", "--fail-on-warning", "--keep-going")  # of make docs


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_names_what_is_public(tmp_path):
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme"):
        pytest.importorskip(package)
    options = [*OPTIONS, "-d", str(tmp_path / "trees")]
    words = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "site")]
    build = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    page = (tmp_path / "site" / "api" / "1-xattn.html").read_text(encoding="utf-8")
    assert all(f'id="xattn.{name}"' in page for name in ("explain", "load_backbone", "fit"))
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert first.count('<img alt="') >= 3 and first.count("highlight-python") == 3
    notebook = (tmp_path / "site" / "notebooks" / "quick_start.html").read_text(encoding="utf-8")
    assert "tiger cat" in notebook  # a stored output
    pages = (tmp_path / "site" / "llms.txt").read_text(encoding="utf-8")
    assert pages.startswith("# xattn\n\n> ") and "](which-method.html): " in pages
    assert (tmp_path / "site" / "search.html").is_file()


def test_a_dead_link_fails_the_build(tmp_path):
    pytest.importorskip("myst_nb")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "conf.py").write_text('extensions = ["myst_nb"]\nroot_doc = "page"\n')
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n[nowhere](nowhere.md)\n")
    words = [
        sys.executable,
        "-m",
        "sphinx",
        *OPTIONS,
        str(tmp_path / "docs"),
        str(tmp_path / "site"),
    ]
    build = subprocess.run(words, capture_output=True, text=True)
    assert build.returncode != 0 and "nowhere.md" in build.stderr
