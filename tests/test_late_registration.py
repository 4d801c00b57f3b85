"""A toy that a plugin registers is tested by the tests of every head and explainer, with no other edit."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PATH = filter(None, [os.environ.get("PYTHONPATH")])
PLUGIN = """
from xattn.explainers import Explainer, register_explainer
from xattn.heads import register_head
from xattn.heads.probing.efficient_probe import EfficientProbe
from xattn.runtime.option_checks import Count


@register_head("toy_head", cases=({"queries": 4}, {"queries": 2}))
class ToyHead(EfficientProbe):
    def __init__(self, backbone, queries: Count = 8, **shared):
        super().__init__(backbone, queries=queries, **shared)


@register_explainer("toy_map", networks=("vit",))
class ToyMap(Explainer):
    def _attribute(self, images, target):
        return images.mean(1, keepdim=True)
"""


def test_the_tests_of_every_head_and_explainer_run_toys(tmp_path):
    (tmp_path / "toy_plugin.py").write_text(PLUGIN)
    files = [
        str(TESTS / name)
        for name in ("heads/test_every_attentive_head.py", "test_default_device.py")
    ]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "toy_plugin", *files, "-rA", "-q",
            "-k", "toy_ and (test_shares or test_explainers or test_heads)",
            "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *PATH])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    passed = [line.split("::")[1] for line in run.stdout.splitlines() if line.startswith("PASSED")]
    assert "test_explainers[toy_map-vit]" in passed and "test_heads[toy_head]" in passed
    assert "test_explainers[toy_map-cnn]" not in passed
    assert sum("queries': 2" in name for name in passed) > 0, "the second case, too"
