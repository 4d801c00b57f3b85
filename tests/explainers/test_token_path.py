"""The class token's path through a ViT: equal to autograd where patches are held as they are."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import xattn
from xattn.backbone.taps import block_taps
from xattn.explainers import create_explainer
from xattn.heads.class_reading import class_reading
from xattn.heads.maps.tokens import TokenPath
from xattn.training.outcomes import log_odds

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
INDEX = torch.tensor([[0, 3], [4, 1]])


@pytest.fixture(scope="module", params=["plain", "scaled", "registers"])
def backbone(request):
    torch.manual_seed(0)
    options = {"plain": {}, "scaled": {"init_values": 0.3}, "registers": {"reg_tokens": 2}}[
        request.param
    ]
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=24, depth=4, num_heads=3, num_classes=5, **options
    )
    for p in model.parameters():  # away from zeros and ones
        nn.init.normal_(p, std=0.3)
    for block in model.blocks:  # a value's bias is no patch's, so it is in no path
        nn.init.zeros_(block.attn.qkv.bias.data[48:])
    found = xattn.load_backbone(model.double(), input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    return found.with_taps(block_taps(found.depth))


def of_the_token(backbone, taps, scales, task="multiclass"):
    """Log-odds (B, K) by timm's own modules of a class token that goes alone through the blocks; the patches that
    it reads are constants. ``scales`` (L, B, H, P + N) multiply its attention."""
    model = backbone.model
    token = taps.prefixes[0][:, :1]
    for i, block in enumerate(list(model.blocks)[1:]):
        others = torch.cat(
            [taps.prefixes[i][:, 1:], taps.maps[i].flatten(2).transpose(1, 2)], 1
        ).detach()
        x = block.norm1(torch.cat([token, others], 1))
        attention = block.attn
        q, k, v = (
            part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for part in attention.qkv(x).chunk(3, dim=2)
        )
        weights = (q[:, :, :1] * attention.scale @ k.transpose(2, 3)).softmax(-1) * scales[i][
            :, :, None
        ]
        read = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        token = token + block.ls1(read)
        token = token + block.ls2(block.mlp(block.norm2(token)))
    logits = model.head(model.norm(token)[:, 0])
    index = torch.arange(logits.shape[1]).expand_as(logits)
    return log_odds(logits, index, task), logits


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_paths_are_the_derivatives_by_the_attention_along_the_tokens_own_way(backbone, task):
    with torch.no_grad():
        taps = backbone(IMAGES)
    prefix = backbone.prefix_tokens
    scales = [
        torch.ones(2, 3, prefix + 16, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    odds, logits = of_the_token(backbone, taps, scales, task)
    torch.testing.assert_close(logits, taps.logits)
    found = TokenPath(backbone)(taps, INDEX, task, rows=3)
    assert found.path.shape == found.row.shape == (2, 2, 3, 3, 4, 4)
    for m in range(2):
        total = odds[torch.arange(2), INDEX[:, m]].sum()
        for layer, expected in enumerate(torch.autograd.grad(total, scales, retain_graph=True)):
            torch.testing.assert_close(
                found.path[:, m, layer].flatten(2), expected[..., prefix:], rtol=1e-6, atol=1e-8
            )
    whole = TokenPath(backbone)(taps, None, task)
    torch.testing.assert_close(
        whole.path.gather(1, INDEX[:, :, None, None, None, None].expand_as(found.path)), found.path
    )


def test_paths_of_the_last_two_blocks_are_those_of_the_whole_network(backbone):
    model, scales = (
        backbone.model,
        [torch.ones(3, requires_grad=True, dtype=torch.float64) for _ in range(4)],
    )
    prefix = backbone.prefix_tokens
    x = model._pos_embed(model.patch_embed(backbone.normalize(IMAGES[:1])))
    for block, scale in zip(model.blocks, scales, strict=True):
        attention, y = block.attn, block.norm1(x)
        q, k, v = (
            p.unflatten(2, (3, -1)).transpose(1, 2) for p in attention.qkv(y).chunk(3, dim=2)
        )
        weights = (q * attention.scale @ k.transpose(2, 3)).softmax(-1)
        # One patch of the class token's row, in each head.
        factor = torch.ones_like(weights)
        factor = factor.index_put(
            (
                torch.tensor([0] * 3),
                torch.arange(3),
                torch.tensor([0] * 3),
                torch.tensor([prefix + 5] * 3),
            ),
            scale,
        )
        x = x + block.ls1(attention.proj((weights * factor @ v).transpose(1, 2).flatten(2)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    logits = model.head(model.norm(x)[:, 0])
    odds = log_odds(logits, torch.tensor([[2]]), "multiclass")
    expected = torch.autograd.grad(odds.sum(), scales)
    with torch.no_grad():
        found = (
            TokenPath(backbone)(backbone(IMAGES[:1]), torch.tensor([[2]]), "multiclass")
            .path[0, 0]
            .flatten(2)[..., 5]
        )
    for layer in (1, 2):  # the last two of three
        torch.testing.assert_close(found[layer], expected[layer + 1], rtol=1e-6, atol=1e-8)
    assert not torch.allclose(found[0], expected[1], rtol=1e-3)


def test_rows_are_the_class_maps_of_cam(backbone):
    with torch.no_grad():
        rows = TokenPath(backbone)(backbone(IMAGES), INDEX, "multiclass", rows=3).row
        tapped = backbone.with_taps([f"norm1.{i}" for i in range(1, 4)])
        cam = class_reading(tapped).own(tapped(IMAGES), INDEX)
    torch.testing.assert_close(rows.sum((2, 3)), cam)


# ---------------------------------------------------------------------- the explainer


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return xattn.load_backbone("test_vit", None, input_size=64, num_classes=5)


def test_the_explainer_adds_path_and_cam_with_a_deviation_of_one(vit):
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
    tapped = vit.with_taps(block_taps(vit.depth))
    with torch.no_grad():
        path = TokenPath(tapped)(tapped(images), target[:, None], "multiclass").path.sum((2, 3))
    alone = create_explainer("token_path", vit, cam=False).attribute(images, target)
    torch.testing.assert_close(
        alone, path / path.std((2, 3), correction=0, keepdim=True), rtol=1e-4, atol=1e-4
    )
    cam = create_explainer("cam", vit).attribute(images, target)
    both = create_explainer("token_path", vit).attribute(images, target)
    cam = cam / cam.std((2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(both - alone, cam, rtol=1e-4, atol=1e-4)


def test_maps_do_not_change_when_all_logits_are_raised(vit):
    images, target = torch.rand(2, 3, 64, 64), torch.tensor([1, 4])
    raised = copy.deepcopy(vit.model)
    raised.head.bias.data += 3
    raised.head.weight.data += torch.rand(
        raised.head.weight.shape[1]
    )  # the same row for all classes
    other = xattn.load_backbone(
        raised, input_size=64, mean=vit.preprocessing.mean, std=vit.preprocessing.std
    )
    found = [
        create_explainer("token_path", b, cam=False).attribute(images, target) for b in (vit, other)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["test_resnet", "deit_tiny_distilled_patch16_224"])
def test_the_explainer_refuses_other_networks(name):
    network = xattn.load_backbone(name, None, input_size=64)
    with pytest.raises(ValueError, match="explainer: token_path follows the class token"):
        create_explainer("token_path", network)
