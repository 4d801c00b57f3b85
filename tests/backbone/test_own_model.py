"""A user's fine-tuned model and folder of mixed photos, by the commands of docs/usage.md."""

import re
import shlex
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import xattn
from xattn.cli import main

USAGE = Path(__file__).resolve().parents[2] / "docs" / "usage.md"


def test_a_network_of_three_classes_is_trained_for_explained_and_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save({"state_dict": model.state_dict()}, "mine.pth")
    Path("classes.txt").write_text("ant\nbee\ncat\n")
    Path("photos/deep").mkdir(parents=True)
    for i, size in enumerate([(300, 200), (64, 64), (200, 500), (33, 700), (224, 224)]):
        noise = np.random.default_rng(i).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(f"photos/{'deep/' if i % 2 else ''}{i}.png")
    Path("photos/broken.jpg").write_bytes(b"no photo")

    block = re.search(
        r"```sh\nMODEL=\"([^\"]*)\"\n(.*?)```", USAGE.read_text(encoding="utf-8"), re.S
    )
    lines = [line for line in block[2].splitlines() if line]
    assert [line.split()[1] for line in lines] == ["train", "explain", "evaluate"]
    assert "--backbone resnet18 " in block[1]
    network = block[1].replace("resnet18", "test_resnet")  # of few layers
    quick = {
        "train": "--epochs 1 --workers 0",
        "explain": "--top 2",
        "evaluate": "--batch-size 4",
    }
    for line in lines:
        arguments = shlex.split(line.replace("$MODEL", network))[1:]
        assert main([*arguments, *quick[arguments[0]].split(), "--device", "cpu"]) == 0
    pack = xattn.load_pack("runs/explained")
    assert len(pack) == 10 and {e.target_name for e in pack} <= {"ant", "bee", "cat"}
    assert Path("runs/evaluation/results.json").is_file()
