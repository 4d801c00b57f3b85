"""A network of any blocks: its stems, its taps, other sizes, and what is refused."""

import pytest
import torch

from xattn.backbone import load_backbone
from xattn.blocks import list_blocks
from xattn.eval.studies.models.block_net import BlockNet
from xattn.explainers import create_explainer

OPTIONS = {"ninformer": {"grid": (4, 4), "token_hidden": 8}, "hyperzzw": {"hidden": 8}}


def made(block="minimal", **options):
    torch.manual_seed(0)
    own = OPTIONS.get(block, {})
    return BlockNet(block, **{"dim": 32, "options": own, **options}).eval()


@pytest.mark.parametrize("block", list_blocks())
def test_any_block_is_a_backbone_that_explainers_read(block):
    net = made(block)
    images = torch.rand(2, 3, 8, 8)
    backbone = load_backbone(net)
    taps = backbone(images)
    assert taps.logits.shape == (2, 10) and taps.maps[0].shape == (2, 32, 4, 4)
    torch.testing.assert_close(taps.logits, net(images))
    for name in ("rollout", "input_x_gradient"):
        options = {"start": "patches"} if name == "rollout" else {}
        maps = create_explainer(name, backbone, **options).attribute(images, 3)
        assert maps.shape[0] == 2 and maps.isfinite().all()


@pytest.mark.parametrize("stem", ["shared", "place", "conv"])
def test_stems(stem):
    net = made("minimal", stem=stem, channels=1, patch=2)
    x = torch.rand(2, 1, 8, 8)
    assert net(x).shape == (2, 10)
    found = net.tokens(x)
    moved = net.tokens(x.roll(4, 3))  # by two patches
    same = torch.allclose(
        (found - (0 if net.positions is None else net.positions))[:, :2],
        (moved - (0 if net.positions is None else net.positions))[:, 2:4],
        atol=1e-6,
    )
    assert same == (stem == "shared")
    assert made("", stem=stem, depth=0)(torch.rand(1, 3, 8, 8)).shape == (1, 10)


def test_another_size_interpolates_positions_and_warns_where_a_block_has_one_grid():
    net = made("minimal")
    larger = net.at_size(16)
    assert larger(torch.rand(1, 3, 16, 16)).shape == (1, 10) and larger.grid == (8, 8)
    assert larger.positions.shape == (1, 64, 32) and net.grid == (4, 4)
    torch.testing.assert_close(larger.positions.mean(1), net.positions.mean(1), atol=1e-2, rtol=0)
    with pytest.warns(UserWarning, match="^grid: the token MLP was trained on"):
        assert made("ninformer").at_size(16)(torch.rand(1, 3, 16, 16)).shape == (1, 10)
    with pytest.raises(ValueError, match="^grid: got .*; the token MLP has weights for"):
        made("ninformer").mixed(torch.rand(1, 64, 32), (8, 8))


def test_what_does_not_fit_is_refused():
    for call, words in (
        (lambda: made("minimum"), "^name: unknown block 'minimum'; did you mean minimal"),
        (lambda: made(options={"gate": 1}), "minimal does not take that option"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_gradient_times_the_gate_of_ninformer_is_hirescam_of_its_gating():
    torch.manual_seed(0)
    net = BlockNet("ninformer", dim=16, options={"grid": (4, 4), "token_hidden": 6}).double().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    hires = create_explainer("hirescam", load_backbone(net), layer="blocks.1.gating", relu=False)
    found = hires.attribute(images, 3)
    last = net.blocks[1]
    x = net.blocks[0](net.tokens(images), net.grid)
    gate = last.gated(last.norm(x)).detach().requires_grad_()
    added = x.detach() + gate
    logits = net.classify(added + last.mlp(last.norm(added)))
    (slope,) = torch.autograd.grad(logits[:, 3].sum(), gate)
    expected = (gate * slope).sum(-1).unflatten(1, (1, *net.grid))
    torch.testing.assert_close(found, expected.detach(), check_dtype=False)
    assert (found < 0).any() and not torch.allclose(found, hires.attribute(images, 4))
