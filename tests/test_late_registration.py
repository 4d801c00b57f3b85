"""A toy that a test registers is created by name like the package's own, with no other edit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import made

from xattn.explainers import (
    Explainer,
    create_explainer,
    explainer_entry,
    list_explainers,
    register_explainer,
)
from xattn.explainers.base import EXPLAINERS
from xattn.heads import create_head, head_entry, head_options, list_heads, register_head
from xattn.heads.base import HEADS
from xattn.heads.probing.gap import Gap
from xattn.runtime.option_checks import Count
from xattn.training.attention_training import (
    METHODS,
    PERTURBATIONS,
    RandomPerturbation,
    create_perturbation,
    register_perturbation,
)

TESTS = Path(__file__).resolve().parent
PATH = filter(None, [os.environ.get("PYTHONPATH")])


def test_a_head():
    try:

        @register_head("toy", cases=({"times": 2},))
        class Toy(Gap):
            def __init__(self, backbone, times: Count = 1, **shared):
                super().__init__(backbone, **shared)
                self.options["times"] = times

        assert "toy" in list_heads() and head_entry("toy").cases[0] == {"times": 2}
        assert head_options("toy")[0] == "times" and "classes" in head_options("toy")
        head = create_head("toy", made("vit"), times=3, classes=2)
        assert isinstance(head, Toy) and head.name == "toy" and head.options["times"] == 3
        with pytest.raises(ValueError, match="^times: got 'x'; give an int of at least 1"):
            create_head("toy", made("vit"), times="x")
        with pytest.raises(ValueError, match=r"toy does not take that option \(time\).*mean times"):
            create_head("toy", made("vit"), time=3)
        with pytest.raises(ValueError, match="^name: 'toy' is taken by .*Toy; choose another"):
            register_head("toy")(Gap)
        assert Gap.name == "gap"
    finally:
        HEADS.remove("toy")
    with pytest.raises(ValueError, match="^head: unknown head 'toy'; choose one of "):
        create_head("toy", made("vit"))


def test_an_explainer():
    try:

        @register_explainer("toy", networks=("vit",))
        class Toy(Explainer):
            def _attribute(self, images, target):
                return images.mean(1, keepdim=True)

        assert "toy" in list_explainers() and explainer_entry("toy").networks == ("vit",)
        images = torch.rand(2, 3, 32, 32)
        maps = create_explainer("toy", made("vit")).attribute(images, 1)
        torch.testing.assert_close(maps, images.mean(1, keepdim=True))
        with pytest.raises(ValueError, match="^explainer: toy does not take that option"):
            create_explainer("toy", made("vit"), seeds=1)
    finally:
        EXPLAINERS.remove("toy")
    assert "toy" not in list_explainers()


def test_a_change_of_attention_scores():
    try:
        toy = register_perturbation("toy")(type("Toy", (RandomPerturbation,), {}))
        assert PERTURBATIONS["toy"] is toy and toy.name == "toy"
        assert create_perturbation("toy", epsilon=2.0).epsilon == 2.0
        with pytest.raises(ValueError, match="attention training: toy refuses xi; its options"):
            create_perturbation("toy", epsilon=1.0, xi=0.1)
    finally:
        METHODS.remove("toy")
    assert RandomPerturbation.name == "random" and "toy" not in PERTURBATIONS


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
    files = [str(TESTS / name) for name in ("heads/test_reliability.py", "test_default_device.py")]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-p", "toy_plugin", *files, "-k", "toy_", "-rA", "-q",
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
