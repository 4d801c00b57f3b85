"""Programs import torch with threads that sleep while they wait; the library leaves that to its caller."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

# Runs a program up to its first import of torch, and says what OpenMP would then read.
UNTIL_TORCH = """
import os, runpy, sys
class Hook:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch sees", os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Hook())
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def seen(words, tmp_path, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", UNTIL_TORCH, *words], cwd=tmp_path, env={**env, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.fixture
def words(request, tmp_path):
    """The command line of a program, and what it needs in its folder."""
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    (tmp_path / "arguments.json").write_text(json.dumps(["explain", "photo.png"]))
    return request.param


PROGRAMS = [
    ["xattn", "explain", "photo.png"],
    ["xattn.app.demo"],
    ["xattn.app.jobs.child", "."],
]


@pytest.mark.parametrize("words", PROGRAMS, indirect=True, ids=lambda words: words[0])
def test_a_program_imports_torch_with_threads_that_sleep(words, tmp_path):
    assert seen(words, tmp_path) == "torch sees passive"
    assert seen(words, tmp_path, OMP_WAIT_POLICY="active") == "torch sees active"


def test_the_library_leaves_the_setting_to_the_program(tmp_path):
    (tmp_path / "mine.py").write_text("import xattn\nxattn.load_backbone\n")
    assert seen(["mine"], tmp_path, PYTHONPATH=str(tmp_path)) == "torch sees None"
