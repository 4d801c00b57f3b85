"""Put a build of the pages into the folder of its version, and write what switches between versions.

python deploy/publish_docs.py build/docs site --version latest --url https://OWNER.github.io/xattn
python deploy/publish_docs.py build/docs site --version 0.2.0 --url https://OWNER.github.io/xattn

``site`` is what GitHub Pages serves: a folder for each version, ``switcher.json``, and a first page that
leads to ``latest``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

VERSION = re.compile(r"\d+\.\d+\.\d+(?:rc\d+)?")
LATEST = "latest"
REDIRECT = """\
<!doctype html>
<meta charset="utf-8">
<title>xattn</title>
<meta http-equiv="refresh" content="0; url=latest/">
<a href="latest/">xattn</a>
"""


def order(version: str) -> tuple[float, ...]:
    """What sorts versions, a release candidate before its release.

    >>> sorted(["0.10.0", "0.2.0", "0.10.0rc1"], key=order)
    ['0.2.0', '0.10.0rc1', '0.10.0']
    """
    release, _, candidate = version.partition("rc")
    return (*map(int, release.split(".")), int(candidate) if candidate else float("inf"))


def switcher(versions: list[str], url: str) -> list[dict[str, object]]:
    """The entries of ``switcher.json``: the latest, then each release, newest first.

    The newest release that is no candidate is preferred: pages of others point to it.
    """
    releases = sorted((v for v in versions if v != LATEST), key=order, reverse=True)
    stable = next((v for v in releases if "rc" not in v), None)
    entries: list[dict[str, object]] = []
    for version in [LATEST] * (LATEST in versions) + releases:
        name = f"{version} (stable)" if version == stable else version
        entry: dict[str, object] = {"name": name, "version": version, "url": f"{url}/{version}/"}
        entries.append(entry | ({"preferred": True} if version == stable else {}))
    return entries


def publish(build: Path, site: Path, version: str, url: str) -> list[str]:
    """Put ``build`` into ``site`` as ``version``; returns all versions that are there.

    Raises:
        ValueError: no pages in ``build``, or an unknown version.
    """
    if not (build / "index.html").is_file():
        raise ValueError(f"build: {build} holds no index.html; run make docs")
    if version != LATEST and not VERSION.fullmatch(version):
        raise ValueError(f"version: got {version!r}; give {LATEST} or X.Y.Z")
    target = site / version
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(build, target)
    found = [p.name for p in site.iterdir() if p.name == LATEST or VERSION.fullmatch(p.name)]
    entries = json.dumps(switcher(found, url.rstrip("/")), indent=2)
    (site / "switcher.json").write_text(entries + "\n", encoding="utf-8")
    (site / "index.html").write_text(REDIRECT, encoding="utf-8")
    (site / ".nojekyll").touch()  # or Pages leaves out folders that begin with _
    if version == LATEST and (build / "llms.txt").is_file():
        shutil.copy(build / "llms.txt", site / "llms.txt")
    return found


def main() -> int:
    """Publish what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("site", type=Path)
    parser.add_argument("--version", default=LATEST)
    parser.add_argument("--url", required=True)
    given = parser.parse_args()
    try:
        print(*publish(given.build, given.site, given.version, given.url))
    except ValueError as error:
        print(f"publish_docs: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
