"""Builds of the pages go into a folder for each version, and the switch between versions knows all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "deploy" / "publish_docs.py"
URL = "https://some-body.github.io/xattn"


@pytest.fixture
def build(tmp_path):
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "index.html").write_text("one")
    (tmp_path / "build" / "llms.txt").write_text("# xattn")
    return tmp_path / "build"


def published(build: Path, version: str) -> subprocess.CompletedProcess:
    words = [str(build), str(build.parent / "site"), "--version", version, "--url", URL + "/"]
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True)


def test_versions_stand_in_order_and_the_newest_release_is_preferred(build):
    for version in ("0.2.0", "0.10.0", "latest", "0.11.0rc1"):
        assert published(build, version).returncode == 0
    site = build.parent / "site"
    entries = json.loads((site / "switcher.json").read_text())
    assert [e["version"] for e in entries] == ["latest", "0.11.0rc1", "0.10.0", "0.2.0"]
    assert [e["version"] for e in entries if e.get("preferred")] == ["0.10.0"]
    assert entries[2] == {
        "name": "0.10.0 (stable)",
        "version": "0.10.0",
        "url": f"{URL}/0.10.0/",
        "preferred": True,
    }
    assert "latest/" in (site / "index.html").read_text() and (site / ".nojekyll").is_file()
    assert (site / "llms.txt").read_text() == "# xattn"


def test_a_version_is_replaced_whole_and_others_stay(build):
    published(build, "0.2.0")
    published(build, "latest")
    (build / "index.html").write_text("two")
    (build / "llms.txt").unlink()
    published(build, "latest")
    site = build.parent / "site"
    assert (site / "latest" / "index.html").read_text() == "two"
    assert not (site / "latest" / "llms.txt").exists()
    assert (site / "0.2.0" / "index.html").read_text() == "one"


@pytest.mark.parametrize("version", ["main", "0.2", "../x"])
def test_an_unknown_version_is_refused(build, version):
    refused = published(build, version)
    assert refused.returncode == 1 and refused.stderr.startswith("publish_docs: error: version: ")


def test_a_folder_without_pages_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused = published(tmp_path / "empty", "latest")
    assert refused.returncode == 1 and "run make docs" in refused.stderr
