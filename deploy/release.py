"""Prepare a release of xattn; docs/releasing.md says when to run what. Python alone is enough.

python deploy/release.py bump 0.2.0          version, date and changelog: one commit, and the tag v0.2.0
python deploy/release.py owner NAME          once: the account on GitHub that has the repository
python deploy/release.py notes               the newest section of the changelog, on the screen
python deploy/release.py readme              README.md with absolute links, for the page on PyPI
python deploy/release.py recipe FILE.tar.gz  the checksum of the sdist into the recipe for conda-forge
"""

from __future__ import annotations

import argparse
import hashlib
import posixpath
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNSET = "github.com/OWNER/"  # until `owner` was run
UNPUBLISHED = "not on PyPI yet"
ADDRESSES = ("github.com/OWNER/", "research.google.com/github/OWNER/", "//OWNER.github.io/")
VERSION = r"\d+\.\d+\.\d+(?:rc\d+)?"
# The files that name the version, each once: what stands there, and what takes its place.
PLACES = {
    "xattn/runtime/version.py": (rf'__version__ = "{VERSION}"', '__version__ = "{version}"'),
    "deploy/space/requirements.txt": (rf"(xattn\[.*\])=={VERSION}", r"\1=={version}"),
    "deploy/conda/recipe.yaml": (
        rf'^  version: "{VERSION}"((?:\n.*)*?\n  sha256: ).*',
        f'  version: "{{version}}"\\1"{"0" * 64}"',  # of an sdist that is not there yet
    ),
    "CITATION.cff": (
        rf"^version: {VERSION}\n(?:date-released: .*\n)?",
        "version: {version}\ndate-released: {today}\n",
    ),
    "CHANGELOG.md": (
        rf"^## \[Unreleased\]\n(?s:(.*?))^\[Unreleased\]: (\S+)/compare/v({VERSION})\.\.\.HEAD\n",
        "## [Unreleased]\n\n## [{version}] - {today}\n\\1[Unreleased]: \\2/compare/v{version}...HEAD\n"
        "[{version}]: \\2/compare/v\\3...v{version}\n",
    ),
}


def read(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {words[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def current(root: Path) -> str:
    """The version, from the one line of code that says it."""
    found = re.search(rf'__version__ = "({VERSION})"', read(root, "xattn/runtime/version.py"))
    assert found, "xattn/runtime/version.py has no version"
    return found[1]


def repository(root: Path) -> str:
    """The address of the repository, as pyproject.toml has it.

    Raises:
        ValueError: nobody has set its owner.
    """
    (address,) = re.findall(r'^Repository = "(.*)"', read(root, "pyproject.toml"), re.M)
    if UNSET in address:
        raise ValueError(
            "owner: nobody is named yet; run python deploy/release.py owner NAME, and commit"
        )
    return address


def section(root: Path, version: str) -> str:
    """What the changelog says of a version, or of "Unreleased"."""
    found = re.search(
        rf"^## \[{re.escape(version)}\].*?\n(.*?)(?=^## \[|^\[|\Z)",
        read(root, "CHANGELOG.md"),
        re.M | re.S,
    )
    return found[1].strip() if found else ""


def unpublished_pages(root: Path) -> list[str]:
    """The pages, apart from the one on releases, that say that xattn is not on PyPI yet."""
    names = git(root, "ls-files", "*.md", "*.rst", "*.ipynb").splitlines()
    return [n for n in names if n != "docs/releasing.md" and UNPUBLISHED in read(root, n)]


def order(version: str) -> list[float]:
    """0.2.0rc1 comes before 0.2.0."""
    numbers, _, candidate = version.partition("rc")
    return [*map(int, numbers.split(".")), float(candidate or "inf")]


def bump(root: Path, version: str, today: date) -> str:
    """Write the version everywhere, commit it and tag the commit; the line to run next.

    Raises:
        ValueError: the version is no newer one, or something is not ready; nothing is changed then.
    """
    if not re.fullmatch(VERSION, version):
        raise ValueError(f"version: got {version}; give X.Y.Z or X.Y.ZrcN")
    if order(version) <= order(current(root)):
        raise ValueError(f"version: got {version}; give one after {current(root)}")
    repository(root)
    if early := unpublished_pages(root):
        raise ValueError(f"{', '.join(early)}: says {UNPUBLISHED!r}; take that sentence out")
    if not section(root, "Unreleased"):
        raise ValueError("CHANGELOG.md: nothing stands under Unreleased; say what changed")
    if git(root, "status", "--porcelain"):
        raise ValueError("git: there are changes that are not committed; commit them")
    if git(root, "tag", "--list", f"v{version}"):
        raise ValueError(
            f"version: the tag v{version} is there already; delete it, or go on to the next"
        )
    changed: dict[str, str] = {}
    for name, (pattern, text) in PLACES.items():
        new = text.format(version=version, today=today.isoformat())
        changed[name], count = re.subn(pattern, new, read(root, name), flags=re.M)
        if count != 1:
            raise ValueError(f"{name}: names the version {count} times; see PLACES in release.py")
    git(root, "var", "GIT_COMMITTER_IDENT")  # fails where git does not know who commits
    for name, page in changed.items():
        (root / name).write_text(page, encoding="utf-8", newline="\n")
    git(root, "commit", "-qam", f"Release {version}")
    git(root, "tag", "-a", f"v{version}", "-m", f"xattn {version}")
    return f"git push origin HEAD v{version}"


def set_owner(root: Path, name: str) -> list[str]:
    """Put the owner into every address of the repository; the files that changed."""
    if not re.fullmatch(r"[A-Za-z0-9](?:-?[A-Za-z0-9])*", name):
        raise ValueError(f"owner: got {name!r}; give the name of an account on GitHub")
    changed = []
    found = git(root, "grep", "-lIF", *(f"-e{address}" for address in ADDRESSES))
    for file in found.splitlines():
        if file.startswith(("deploy/release.py", "tests/")):
            continue
        text = read(root, file).replace("- OWNER", f"- {name}")
        for address in ADDRESSES:
            text = text.replace(address, address.replace("OWNER", name))
        (root / file).write_text(text, encoding="utf-8", newline="\n")
        changed.append(file)
    return changed


def absolute(text: str, folder: str, address: str, version: str) -> str:
    """A page of Markdown with links that work outside the repository.

    Args:
        folder: where the page lies, relative to the root.
        address: of the repository.
    """

    def link(match: re.Match[str]) -> str:
        path, mark, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        kind = "raw" if path.endswith((".jpg", ".png", ".svg")) else "blob"
        return f"]({address}/{kind}/v{version}/{path}{mark}{anchor})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    relative = r"\]\((?!https?:|mailto:|#)([^)\s]+)\)"
    return "".join(p if p.startswith("```") else re.sub(relative, link, p) for p in parts)


def fill_recipe(root: Path, sdist: Path) -> None:
    """Write the checksum of the sdist into the recipe for conda-forge."""
    if sdist.name != f"xattn-{current(root)}.tar.gz":
        raise ValueError(f"recipe: got {sdist.name}; give the sdist of xattn {current(root)}")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    path = root / "deploy" / "conda" / "recipe.yaml"
    text = re.sub(r"sha256: .*", f'sha256: "{digest}"', path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8", newline="\n")


def main(words: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("bump").add_argument("version")
    jobs.add_parser("owner").add_argument("name")
    jobs.add_parser("notes")
    jobs.add_parser("readme")
    jobs.add_parser("recipe").add_argument("sdist", type=Path)
    given = parser.parse_args(words)
    try:
        if given.job == "bump":
            print(bump(root, given.version, date.today()))
        elif given.job == "owner":
            print("\n".join(set_owner(root, given.name)))
        elif given.job == "notes":
            print(section(root, current(root)))
        elif given.job == "readme":
            page = absolute(read(root, "README.md"), "", repository(root), current(root))
            (root / "README.md").write_text(page, encoding="utf-8", newline="\n")
        else:
            fill_recipe(root, given.sdist)
    except (ValueError, OSError) as error:
        print(f"release.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
