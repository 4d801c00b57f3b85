"""A ViT at another size: weights are shared, positions resized as timm does, or tiled."""

import pytest
import timm
import torch
from small_transformers import tiny

from xattn import load_backbone
from xattn.backbone import converted, resized


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    torch.save(
        {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()},
        tmp_path / "w.pth",
    )
    return tmp_path / "w.pth"


@pytest.mark.parametrize("size", [320, (192, 256)])
def test_it_is_the_network_that_is_loaded_at_that_size(file, size):
    backbone = load_backbone("test_vit", file)
    before = backbone.fingerprint
    found, loaded = resized(backbone, size), load_backbone("test_vit", file, input_size=size)
    assert found.preprocessing == loaded.preprocessing and found.taps == loaded.taps
    images = torch.rand(2, 3, *found.preprocessing.input_size)
    with torch.no_grad():
        assert torch.allclose(found.logits(images), loaded.logits(images), atol=1e-6)
    assert found.fingerprint == loaded.fingerprint
    assert backbone.fingerprint == before and tuple(backbone.preprocessing.input_size) == (160, 160)
    weights = [b.model.blocks[0].attn.qkv.weight for b in (backbone, found)]
    assert weights[0] is weights[1]


def test_its_own_size_changes_nothing():
    backbone = tiny()
    assert resized(backbone, backbone.preprocessing.input_size) is backbone


@pytest.mark.parametrize("variant, prefix", [("class", 1), ("registers", 5), ("none", 0)])
def test_tiled_positions_repeat_the_trained_grid(variant, prefix):
    backbone = tiny(variant)
    found = resized(backbone, (4 * 7, 4 * 5), "tile")
    trained, tiled = backbone.model.pos_embed, found.model.pos_embed
    assert torch.equal(tiled[:, :prefix], trained[:, :prefix])
    old, new = (
        t[0, prefix:].unflatten(0, grid) for t, grid in ((trained, (3, 5)), (tiled, (7, 5)))
    )
    for row in range(7):
        assert torch.equal(new[row], old[row % 3])
    assert found.logits(torch.rand(1, 3, 28, 20)).shape == (1, 7)


def test_a_resized_network_can_be_converted():
    found = converted(resized(tiny(), (20, 28)), "gna", options={"kernel": 3})
    assert found.logits(torch.rand(1, 3, 20, 28)).shape == (1, 7)


@pytest.mark.parametrize(
    "make, size, positions, message",
    [
        (tiny, 24, "tiles", "positions: got 'tiles'; choose"),
        (tiny, 0, "resize", "size: got 0; give 1 to"),
        (tiny, 3, "resize", r"size: .* cannot take \(3, 3\)"),
        (lambda: load_backbone(timm.create_model("test_vit")), 100, "resize", "divisible by patch size"),
        (lambda: load_backbone(timm.create_model("test_resnet")), 96, "resize", "accepts only one size; choose a timm ViT"),
        (lambda: tiny(pos_embed="none"), 24, "tile", "adds no trained positions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(make, size, positions, message):
    with pytest.raises(ValueError, match=message):
        resized(make(), size, positions)
