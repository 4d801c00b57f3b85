"""``make docs``: the pages and the API reference build without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_names_what_is_public(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-d", str(tmp_path / "trees")]
    words = [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs"), str(tmp_path / "site")]
    build = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    page = (tmp_path / "site" / "api" / "1-xattn.html").read_text(encoding="utf-8")
    assert all(f'id="xattn.{name}"' in page for name in ("explain", "load_backbone", "fit"))
