"""Files that trainers write, and folders of models that timm has saved, as backbones."""

import argparse
import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision

from xattn import load_backbone

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


def prefixed(model, prefix):
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def loss():
    return {"criterion.weight": torch.ones(3), "accuracy.total": torch.zeros(())}


FILES = {
    "lightning.ckpt": lambda m: {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed(m, "model."), **loss()},
        "hyper_parameters": {"lr": 0.1, "classes": ["a", "b", "c"]},
    },
    "net.ckpt": lambda m: {"state_dict": {**prefixed(m, "net._orig_mod."), **loss()}},
    "two.ckpt": lambda m: {"state_dict": {**prefixed(m, "teacher."), **prefixed(m, "model.")}},
    "own-name.ckpt": lambda m: {"state_dict": {**prefixed(m, "my_classifier."), **loss()}},
    "distributed.pth": lambda m: {"model_state_dict": prefixed(m, "module.")},
    "backbone.pth": lambda m: prefixed(m, "backbone."),
    "average.pth": lambda m: {"epoch": 3, "model_ema": prefixed(m, "module.")},
    "timm.pth.tar": lambda m: {
        "arch": "test_resnet",
        "args": argparse.Namespace(lr=0.1),
        "state_dict": m.state_dict(),
        "state_dict_ema": {k: torch.zeros_like(v) for k, v in m.state_dict().items()},
    },
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_trainers_are_read_with_their_number_of_classes(model, tmp_path, name):
    torch.save(FILES[name](model), tmp_path / name)
    backbone = load_backbone("test_resnet", tmp_path / name, input_size=64)
    assert backbone.class_names == ["class 0", "class 1", "class 2"]
    assert torch.equal(backbone.logits(IMAGES), model(backbone.normalize(IMAGES)))


def test_a_lightning_file_of_torchvisions_resnet(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=4).eval()
    torch.save({"state_dict": {**prefixed(net, "model."), **loss()}}, tmp_path / "mine.ckpt")
    backbone = load_backbone("torchvision/resnet18", tmp_path / "mine.ckpt", input_size=64)
    assert torch.allclose(backbone.logits(IMAGES), net(backbone.normalize(IMAGES)), atol=1e-5)


class Hyper:
    """What a Lightning file may hold beside its tensors."""


def test_objects_in_a_lightning_file_are_not_made_and_the_remedy_is_said(model, tmp_path):
    content = {"state_dict": prefixed(model, "model."), "hyper_parameters": Hyper()}
    torch.save(content, tmp_path / "mine.ckpt")
    with pytest.raises(ValueError, match=r"weights: .*Hyper.*rejected.*training code, torch.save"):
        load_backbone("test_resnet", tmp_path / "mine.ckpt")


def test_a_file_of_two_networks_says_which(model, tmp_path):
    state = {**prefixed(model, "teacher."), **prefixed(model, "student.")}
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"weights: .*several such networks, 'teacher\.', 'stud"):
        load_backbone("test_resnet", tmp_path / "mine.pth")


def test_a_folder_that_timm_saved_says_its_classes_and_preprocessing(model, tmp_path):
    saved = copy.deepcopy(model)
    saved.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    names = {"label_names": ["ant", "bee", "cat"]}
    timm.models.save_for_hf(saved, tmp_path / "mine", model_config=names, safe_serialization=True)
    backbone = load_backbone(f"local-dir:{tmp_path / 'mine'}", input_size=64)
    assert backbone.class_names == ["ant", "bee", "cat"]
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3) and backbone.preprocessing_record() == {}
    assert torch.equal(backbone.logits(IMAGES), model(backbone.normalize(IMAGES)))
    other = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    again = load_backbone(f"local-dir:{tmp_path / 'mine'}", tmp_path / "other.pth", input_size=64)
    assert again.num_classes == 3 and again.fingerprint != backbone.fingerprint


FROM_CACHE = """
import sys, torch, xattn
backbone = xattn.load_backbone("hf-hub:somebody/beetles", input_size=64)
local = xattn.load_backbone("local-dir:" + sys.argv[1], input_size=64)
assert backbone.class_names == local.class_names == ["ant", "bee", "cat"]
assert backbone.fingerprint == local.fingerprint
"""


def test_a_model_of_the_hub_comes_through_the_hubs_own_cache(tmp_path):
    model = timm.create_model("test_resnet", num_classes=3)
    snapshot = tmp_path / "hub/models--somebody--beetles/snapshots" / ("0" * 40)
    config = {"label_names": ["ant", "bee", "cat"]}
    timm.models.save_for_hf(model, snapshot, model_config=config, safe_serialization=True)
    (tmp_path / "hub/models--somebody--beetles/refs").mkdir()
    (tmp_path / "hub/models--somebody--beetles/refs/main").write_text("0" * 40)
    run = subprocess.run(
        [sys.executable, "-c", FROM_CACHE, str(snapshot)],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
