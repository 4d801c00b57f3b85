"""``deploy/release.py``: a release in a copy of the repository, and what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
import release

ROOT = Path(__file__).resolve().parents[2]
DAY = date(2031, 2, 3)
COPIED = [*release.PLACES, "pyproject.toml", "README.md", "CONTRIBUTING.md", ".zenodo.json"]


def git(root: Path, *words: str) -> str:
    return release.git(root, "-c", "user.name=a", "-c", "user.email=a@example.org", *words)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The files that a release reads, ready for one; nobody owns the repository."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    for name in COPIED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text(encoding="utf-8")
        own = release.read(ROOT, "pyproject.toml").split("github.com/")[1].split("/")[0]
        text = text.replace(f"github.com/{own}/", release.UNSET).replace(
            release.UNPUBLISHED, "here"
        )
        (tmp_path / name).write_text(text, encoding="utf-8", newline="\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "Start")
    return tmp_path


@pytest.fixture
def owned(clone):
    release.set_owner(clone, "some-body")
    git(clone, "commit", "-qam", "Owner")
    return clone


def test_the_owner_is_put_into_every_address(clone):
    assert "pyproject.toml" in release.set_owner(clone, "some-body")
    assert not re.search(r"github\.com/OWNER", "".join(release.read(clone, n) for n in COPIED))
    assert release.repository(clone) == "https://github.com/some-body/xattn"
    assert "    - some-body\n" in release.read(clone, "deploy/conda/recipe.yaml")
    with pytest.raises(ValueError, match=r"^owner: got 'a/b'"):
        release.set_owner(clone, "a/b")


def test_addresses_of_notebooks_and_pages_get_the_owner_too(clone):
    links = "https://colab.research.google.com/github/OWNER/xattn https://OWNER.github.io/xattn"
    (clone / "page.md").write_text(links)
    git(clone, "add", ".")
    assert "page.md" in release.set_owner(clone, "some-body")
    assert (clone / "page.md").read_text() == links.replace("OWNER", "some-body")


@pytest.mark.parametrize("candidate", [False, True])
def test_a_release_writes_the_version_everywhere_and_tags_one_commit(owned, candidate):
    old = release.current(owned)
    new = f"{int(old.split('.')[0]) + 1}.0.0" + ("rc1" if candidate else "")
    notes = release.section(owned, "Unreleased")
    assert release.bump(owned, new, DAY) == f"git push origin HEAD v{new}"
    assert release.current(owned) == new and not git(owned, "status", "--porcelain")
    assert git(owned, "describe", "--exact-match").strip() == f"v{new}"
    assert git(owned, "log", "-1", "--format=%s").strip() == f"Release {new}"
    for name in release.PLACES:
        assert new in release.read(owned, name), name
    assert f"date-released: {DAY.isoformat()}" in release.read(owned, "CITATION.cff")
    changes = release.read(owned, "CHANGELOG.md")
    assert f"## [Unreleased]\n\n## [{new}] - {DAY.isoformat()}\n\n### " in changes
    address = "https://github.com/some-body/xattn/compare"
    assert (
        f"\n[Unreleased]: {address}/v{new}...HEAD\n[{new}]: {address}/v{old}...v{new}\n" in changes
    )
    assert release.section(owned, new) == notes and not release.section(owned, "Unreleased")
    with pytest.raises(ValueError, match="nothing stands under Unreleased"):
        release.bump(owned, f"{int(new.split('.')[0]) + 1}.0.0", DAY)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.2", "version: got 1.2; give X.Y.Z"),
        ("v9.0.0", "version: got v9.0.0; give X.Y.Z"),
        ("0.0.1", "version: got 0.0.1; give one after"),
    ],
)
def test_a_wrong_version_is_refused(owned, version, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        release.bump(owned, version, DAY)


def test_a_candidate_comes_before_its_release():
    order = ["0.9.0", "0.10.0rc1", "0.10.0rc2", "0.10.0", "0.10.1", "1.0.0"]
    assert sorted(reversed(order), key=release.order) == order


def test_what_is_not_ready_is_refused_and_nothing_is_changed(clone, monkeypatch, capsys):
    def refused(said: str) -> None:
        before = git(clone, "rev-parse", "HEAD"), release.read(clone, "CHANGELOG.md")
        assert release.main(["bump", "99.0.0"], clone) == 2
        assert capsys.readouterr().err.startswith(f"release.py: error: {said}")
        assert (git(clone, "rev-parse", "HEAD"), release.read(clone, "CHANGELOG.md")) == before
        assert not git(clone, "tag")

    refused("owner: nobody is named yet")
    release.set_owner(clone, "some-body")
    refused("git: there are changes")
    git(clone, "commit", "-qam", "Owner")
    (clone / "docs").mkdir(exist_ok=True)
    for name in ("docs/index.rst", "docs/releasing.md", "start.ipynb"):
        (clone / name).write_text("# not on PyPI yet")
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "Pages")
    refused("docs/index.rst, start.ipynb: says 'not on PyPI yet'")
    git(clone, "revert", "--no-edit", "HEAD")
    with (clone / "CITATION.cff").open("a", encoding="utf-8") as file:
        file.write("version: 3.0.0\n")
    git(clone, "commit", "-qam", "Twice")
    refused("CITATION.cff: names the version 2 times")
    git(clone, "revert", "--no-edit", "HEAD")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.delenv(f"GIT_{name}_NAME")
        monkeypatch.delenv(f"GIT_{name}_EMAIL")
    for name in ("user.useConfigOnly=true", "user.name=", "user.email="):
        key, _, value = name.partition("=")
        git(clone, "config", key, value)
    refused("git var: ")
    assert not git(clone, "status", "--porcelain")


def test_every_place_says_the_same_version():
    for name, (pattern, _) in release.PLACES.items():
        (match,) = re.finditer(pattern, release.read(ROOT, name), flags=re.M)
        said = re.findall(release.VERSION, match[0])
        assert name == "CHANGELOG.md" or said == [release.current(ROOT)], name


def test_the_changelog_keeps_its_form():
    text = release.read(ROOT, "CHANGELOG.md")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads[0] == "[Unreleased]"
    dated = [re.fullmatch(rf"\[({release.VERSION})\] - (\d{{4}}-\d\d-\d\d)", h) for h in heads[1:]]
    assert all(dated)
    assert [m[1] for m in dated] == sorted([m[1] for m in dated], key=release.order, reverse=True)
    assert dated[0][1] == release.current(ROOT)
    assert [m[2] for m in dated] == sorted([m[2] for m in dated], reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.M)) <= kinds
    linked = re.findall(r"^\[(.*?)\]: \S+$", text, re.M)
    assert linked == [h.split("]")[0][1:] for h in heads]


@pytest.mark.parametrize(
    "name", ["README.md", "models/heads/evidence-efficientnet-lite0/README.md"]
)
def test_pages_elsewhere_have_links_that_lead_back_to_files(name):
    address = "https://github.com/some-body/xattn"
    text = release.read(ROOT, name)
    folder = str(Path(name).parent)
    page = release.absolute(text, "" if folder == "." else folder, address, "1.2.3")
    links = re.findall(
        r"\]\((?!https://(?:img|pypi|arxiv|github\.com/(?:hugg|OWNER)))(.*?)\)", page
    )
    assert len(links) == len(re.findall(r"\]\((?!https?:)", text)) > 0
    for link in links:
        kind, version, path = link.removeprefix(f"{address}/").split("/", 2)
        assert version == "v1.2.3" and (ROOT / path.partition("#")[0]).exists(), link
        assert kind == ("raw" if path.endswith((".jpg", ".png")) else "blob")


def test_code_is_no_link():
    assert release.absolute("```\n[a](b.md)\n```\n", "", "x", "1") == "```\n[a](b.md)\n```\n"


def test_the_recipe_takes_the_checksum_of_its_own_sdist(owned, capsys):
    sdist = owned / f"xattn-{release.current(owned)}.tar.gz"
    sdist.write_bytes(b"")
    assert release.main(["recipe", str(sdist)], owned) == 0
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert f'sha256: "{empty}"\n' in release.read(owned, "deploy/conda/recipe.yaml")
    shutil.move(sdist, other := owned / "xattn-9.9.9.tar.gz")
    assert release.main(["recipe", str(other)], owned) == 2
    assert "recipe: got xattn-9.9.9.tar.gz" in capsys.readouterr().err
    other.unlink()
    git(owned, "commit", "-qam", "Recipe")
    release.bump(owned, "99.0.0", DAY)  # whose sdist is another file
    assert f'sha256: "{"0" * 64}"\n' in release.read(owned, "deploy/conda/recipe.yaml")


def test_notes_and_the_readme_are_those_of_the_version(owned, capsys):
    assert release.main(["notes"], owned) == 0
    assert capsys.readouterr().out.strip() == release.section(owned, release.current(owned))
    assert release.main(["readme"], owned) == 0
    version = release.current(owned)
    link = f"](https://github.com/some-body/xattn/raw/v{version}/docs/sheet.jpg)"
    assert link in release.read(owned, "README.md")


def test_the_script_runs_by_itself():
    script = str(ROOT / "deploy" / "release.py")
    done = subprocess.run([sys.executable, "-S", script, "notes"], capture_output=True, text=True)
    assert done.returncode == 0 and "### Added" in done.stdout, done.stderr
