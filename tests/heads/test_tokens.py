"""The head tokens: untrained it is token_path, and it reads taps of its own wherever it goes."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from training_runs import write_photos

import xattn
from xattn.backbone.taps import block_taps
from xattn.cli import main
from xattn.explainers import create_explainer
from xattn.explaining.exporting import ExplainedClassifier
from xattn.heads import create_head, load_head, save_head
from xattn.heads.maps.tokens import Norm
from xattn.heads.probed import probed

IMAGES, TARGET = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, input_size=64, num_classes=5)


def test_the_derivative_of_a_norm_is_that_of_autograd():
    """Of tokens whose mean is not 0."""
    norm = torch.nn.LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x, g = 3 + torch.rand(2, 6).double(), torch.randn(2, 4, 6).double()
    x.requires_grad_()
    y = norm(x)
    expected = [torch.autograd.grad(y, x, g[:, m], retain_graph=True)[0] for m in range(4)]
    torch.testing.assert_close(Norm(norm).pull_back(g, x.detach()), torch.stack(expected, 1))


def moved(head):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += torch.randn_like(parameter)
    return head


def test_the_untrained_head_is_the_explainer(vit):
    head = create_head("tokens", vit).eval()
    assert head.backbone_taps == block_taps(vit.depth) != list(vit.taps)
    with torch.no_grad():
        found = head(head.tapped(vit)(IMAGES), TARGET[:, None])
        every = head(head.tapped(vit)(IMAGES))
    torch.testing.assert_close(found, create_explainer("token_path", vit).attribute(IMAGES, TARGET))
    torch.testing.assert_close(every[[0, 1], TARGET], found[:, 0])
    alone = create_explainer("token_path", vit, cam=False).attribute(IMAGES, TARGET)
    with torch.no_grad():
        head.rows.zero_()
        without_rows = head(head.tapped(vit)(IMAGES), TARGET[:, None])
        head.rows[1, 1] = 3
        rows = head.paths(head.tapped(vit)(IMAGES), TARGET[:, None], "multiclass", 5).row
        expected = (
            3
            * rows[:, :, 1, 1]
            / rows[:, :, -3:].sum((2, 3)).std((2, 3), correction=0)[..., None, None]
        )
        torch.testing.assert_close(
            head(head.tapped(vit)(IMAGES), TARGET[:, None]) - alone, expected, rtol=1e-3, atol=1e-4
        )
        head.rows.zero_()
        head.attention[1, 0] = 2
        looked = head(head.tapped(vit)(IMAGES), TARGET[:, None]) - alone
    torch.testing.assert_close(without_rows, alone)
    torch.testing.assert_close(looked.std((2, 3), correction=0), torch.full((2, 1), 2.0))


def test_numbers_are_pulled_to_their_start(vit):
    head = create_head("tokens", vit)
    assert head.auxiliary_loss() == 0
    with torch.no_grad():
        head.rows[0, 0] += 2
        head.attention[1, 0] -= 1
    assert float(head.auxiliary_loss().detach()) == pytest.approx(0.03 * 5)


def test_other_networks_are_refused(vit):
    for name in ("test_resnet", "deit_tiny_distilled_patch16_224"):
        network = xattn.load_backbone(name, None, input_size=64)
        with pytest.raises(ValueError, match="'tokens' follows the class token"):
            create_head("tokens", network)
    with pytest.raises(ValueError, match=r"taps: got .* reads \['norm1"):
        create_head("tokens", probed(vit, create_head("gap", vit)))


@pytest.mark.parametrize("name", ["tokens", "ttame"])
def test_a_head_is_explained_exported_and_loaded_on_a_backbone_with_other_taps(vit, name, tmp_path):
    theirs = vit.with_taps(["norm1.2", "norm1.5"])
    head = moved(create_head(name, theirs)).eval()
    with torch.no_grad():
        expected = head.explanation(head.tapped(theirs)(IMAGES), TARGET[:, None])
    save_head(head, tmp_path / "head")
    again = load_head(tmp_path / "head", vit)
    for own in (head, again):
        maps = create_explainer("head", vit, own).attribute(IMAGES, TARGET)
        torch.testing.assert_close(maps, expected)
        module = ExplainedClassifier(vit, own, normalize=False)
        with torch.no_grad():
            torch.testing.assert_close(module.raw(IMAGES, TARGET)[1], expected)


def test_a_head_of_taps_that_a_backbone_lacks_is_refused_by_name(vit, tmp_path):
    save_head(create_head("tokens", vit), tmp_path / "head")
    path = tmp_path / "head/config.json"
    config = json.loads(path.read_text())
    config["backbone"]["taps"] = ["block.77"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"block\.77"):
        load_head(tmp_path / "head", vit)


def test_the_commands_train_and_use_it_without_naming_taps(tmp_path):
    write_photos(tmp_path / "photos", 20)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), tmp_path / "w.pth")
    network = ["-b", "test_vit", "--weights", str(tmp_path / "w.pth"), "--input-size", "64"]
    photos, head = str(tmp_path / "photos"), str(tmp_path / "run/head")
    quick = ["--epochs", "1", "--masks", "4", "--fill", "drop", "--workers", "0"]
    output = ["--output", str(tmp_path / "run")]
    assert main(["train", photos, *network, "--head", "tokens", *quick, *output]) == 0
    config = json.loads((tmp_path / "run/head/config.json").read_text())
    assert config["backbone"]["taps"] == [f"block.{i}" for i in range(6)]
    assert config["training"]["table"]["fills"] == ["drop"]
    output = ["--output", str(tmp_path / "pack")]
    assert main(["explain", photos, *network, "--heads", head, *output]) == 0
    output = ["--output", str(tmp_path / "both"), "--metrics", "masking"]
    both = ["--heads", head, "--explainers", "cam"]
    assert main(["compare", photos, "--limit", "2", *network, *both, *output]) == 0
