"""Push the heads that ship, with their cards, and the Space to an account on the Hugging Face Hub.

    python deploy/push.py ACCOUNT

Each head becomes the repository ``ACCOUNT/NAME``, tagged with xattn's version, from which
``xattn.load_head("ACCOUNT/NAME", backbone)`` reads it; the Space becomes ``ACCOUNT/xattn``. It needs
``huggingface_hub`` alone, and a token that may write: ``hf auth login``, or the variable ``HF_TOKEN``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from release import ROOT, absolute, current, read, repository


def head_names(root: Path) -> list[str]:
    return sorted(path.parent.name for path in (root / "models" / "heads").glob("*/config.json"))


def push(account: str, api: HfApi, root: Path = ROOT) -> list[str]:
    """The addresses of what was pushed. What has not changed there is not sent again.

    Raises:
        ValueError: the repository that cards link to has no owner yet.
        huggingface_hub.errors.HfHubHTTPError: the hub refuses, as without a token.
    """
    address, version = repository(root), current(root)
    pushed = []
    for name in head_names(root):
        place = f"models/heads/{name}"
        card = absolute(read(root, f"{place}/README.md"), place, address, version)
        files = {f: root / place / f for f in ("config.json", "model.safetensors")}
        url = api.create_repo(f"{account}/{name}", exist_ok=True)
        _commit(api, url.repo_id, "model", {"README.md": card.encode(), **files}, version)
        api.create_tag(url.repo_id, tag=f"v{version}", exist_ok=True)
        pushed.append(str(url))
    space = root / "deploy" / "space"
    url = api.create_repo(f"{account}/xattn", repo_type="space", space_sdk="docker", exist_ok=True)
    _commit(api, url.repo_id, "space", {p.name: p for p in space.iterdir() if p.is_file()}, version)
    return [*pushed, str(url)]


def _commit(
    api: HfApi, repo: str, kind: str, files: Mapping[str, Path | bytes], version: str
) -> None:
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(repo, additions, commit_message=f"xattn {version}", repo_type=kind)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        print("\n".join(push(sys.argv[1], HfApi())))
    except ValueError as error:
        sys.exit(f"push.py: error: {error}")
