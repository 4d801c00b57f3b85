"""What an installed package adds is found by name in every command, beside a package that is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOYS = """
from dataclasses import dataclass

import torch
from xattn.eval.metrics import Column, MetricGroup, MetricInfo, PerturbationMetric
from xattn.explainers import Explainer
from xattn.heads.probing.gap import Gap
from xattn.heads.maps.ttame import TTame
from xattn.training.attention_training import Perturbation, RandomPerturbation


class ToyHead(TTame):
    def __init__(self, backbone, skip: bool = True):
        super().__init__(backbone, "classifier", skip=skip)
        self.options = {"skip": skip}


class ToyMap(Explainer):
    def _attribute(self, images, target):
        return images.mean(1, keepdim=True)


class ToyChange(RandomPerturbation):
    pass


@dataclass(frozen=True)
class ToyMetric(PerturbationMetric):
    @property
    def columns(self):
        return (Column("toy_metric"),)

    def measure(self, sample):
        yield from ()
        return lambda scores: {Column("toy_metric"): float(sample.grey.mean())}


TOY_GROUP = MetricGroup("toy_group", ToyMetric, {"toy_metric": MetricInfo("mean of m", True)})
"""
PROBES = """
from xattn.heads import register_head
from xattn.heads.probing.efficient_probe import EfficientProbe


@register_head("toy_probe", cases=({"queries": 2},))
class ToyMetric(EfficientProbe):
    pass
"""
MIXERS = """
from xattn.attention import SoftmaxOperator, Mechanism, register_attention
from xattn.blocks import Block, register_block


@register_attention("toy_attention", paper="none", complexity="N^2 D")
class ToyAttention(Mechanism):
    def operator(self, inputs):
        return SoftmaxOperator(inputs.q, inputs.k, inputs.scale)


@register_block("toy_block", paper="none", complexity="N C")
class ToyBlock(Block):
    def run(self, x, grid, prefix):
        return 2 * x
"""
POINTS = """
[xattn.attention]
toy_attention = toy_mixers:ToyAttention
[xattn.blocks]
toy_block = toy_mixers
[xattn.heads]
toy_head = toys:ToyHead
toy_probe = toy_probes
[xattn.explainers]
toy_map = toys:ToyMap
[xattn.perturbations]
toy_change = toys:ToyChange
[xattn.metrics]
toy_group = toys:TOY_GROUP
"""
JOB = """
import sys
from xattn.cli import main

photos, out = sys.argv[1:]
model = ["--weights", "random", "--input-size", "64", "--device", "cpu"]
cnn, vit = (["--backbone", name, *model] for name in ("test_efficientnet", "test_vit"))
map_, quick = ["toy_map"], ["--workers", "0", "--batch-size", "2"]
print("codes:", [
    main(["list"]),
    main(["explain", photos, *cnn, "--explainers", "toy_map", "--output", f"{out}/explained"]),
    main(["train", photos, *cnn, "--head", "toy_head", "--options", "skip=false",
          "--epochs", "1", *quick, "--output", f"{out}/trained"]),
    main(["evaluate", photos, *cnn, "--explainers", "toy_map", "--metrics", "toy_group",
          "--output", f"{out}/evaluated"]),
    main(["probe", photos, *vit, "--heads", "toy_probe", "--attention", "toy_change",
          "--epochs", "1", "--batch-size", "4", "--output", f"{out}/probed"]),
    main(["explain", photos, *cnn, "--explainers", "lost", "--output", f"{out}/no"]),
])
wrong = ["--attention", "toy_chang", "--output", f"{out}/no"]
sys.exit(main(["probe", photos, *vit, *wrong]))
"""


def install(folder: Path, name: str, points: str, **modules: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("packages")
    install(root / "site", "toys", POINTS, toys=TOYS, toy_probes=PROBES, toy_mixers=MIXERS)
    install(root / "site", "broken", "[xattn.explainers]\nlost = lost_module:Lost\n")
    for i in range(10):
        folder = root / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    path = os.pathsep.join([str(root / "site"), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-c", JOB, str(root / "photos"), str(root / "out")]
    found = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 2, found.stderr  # of the last command
    return root / "out", found.stdout, found.stderr


def test_every_command_finds_them(run):
    out, stdout, stderr = run
    assert "codes: [0, 0, 0, 0, 0, 2]" in stdout, stderr
    assert '"toy_head"' in (out / "trained/head/config.json").read_text()
    assert '"skip": false' in (out / "trained/head/config.json").read_text()
    assert "toy_metric" in (out / "evaluated/results.csv").read_text()
    assert '"toy_probe"' in (out / "probed/toy_probe/head/config.json").read_text()


def test_the_list_has_them_and_one_line_for_the_broken_package(run):
    lines = [line.split(": ", 1) for line in run[1].splitlines() if ": " in line]
    rows = dict(lines)
    for title, name in (
        ("heads to train", "toy_head"),
        ("heads to train", "toy_probe"),
        ("explainers", "toy_map"),
        ("attention mechanisms", "toy_attention"),
        ("blocks", "toy_block"),
        ("attention training", "toy_change"),
        ("metrics", "toy_metric"),
        ("groups of metrics", "toy_group"),
    ):
        assert name in rows[title].split(", "), title
    expected = "entry point 'lost' (lost_module:Lost) of broken failed (ModuleNotFoundError: "
    broken = [why for title, why in lines if title == "not loaded, xattn.explainers"]
    assert sum(why.startswith(expected) for why in broken) == 1


def test_a_name_that_is_not_there_is_one_line(run):
    reason = "explainers: explainer 'lost' cannot be loaded: entry point 'lost' (lost_module:Lost)"
    assert sum(reason in line for line in run[2].splitlines()) == 1
    unknown = "unknown 'toy_chang'; did you mean toy_change?"
    assert sum(unknown in line for line in run[2].splitlines()) == 1
