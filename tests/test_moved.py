"""Import paths of earlier versions still lead to what they named."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from xattn.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_every_name_of_a_moved_module_is_found_by_its_old_path(old):
    module = importlib.import_module(old)
    earlier: list[str] = []  # a name in two places is the first one's
    for place in MOVED[old]:
        new = importlib.import_module(place)
        own = [n for n, v in vars(new).items() if getattr(v, "__module__", "") == place]
        assert own, place
        for name in own:
            if not any(hasattr(importlib.import_module(p), name) for p in earlier):
                assert getattr(module, name) is getattr(new, name), f"{place}.{name}"
        earlier.append(place)
    with pytest.raises(AttributeError, match=f"{old}.*no_such_name"):
        module.no_such_name  # noqa: B018


def test_old_paths_work_in_a_fresh_process_in_every_form():
    code = (
        "import xattn.memory, xattn.video\n"
        "from xattn.images import View, list_images, prepare\n"
        "from xattn.explanation import load_pack, save_pack, Explanation\n"
        "from xattn import allocator, probed\n"
        "import pickle\n"
        "assert allocator.keep_memory and probed.probed and xattn.memory.ForwardBatches\n"
        "assert pickle.loads(b'cxattn.images\\nView\\n.') is View\n"
        "assert xattn.video.explain_video is xattn.explain_video\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("old", ["xattn.eval.folds", "xattn.eval.groups"])
def test_an_old_path_runs_as_a_program(old):
    command = [sys.executable, "-m", old, "--data", "no/such/folder"]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert usage.returncode == 0 and f"usage: python -m {MOVED[old][0]}" in usage.stdout
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "no/such/folder" in run.stderr
