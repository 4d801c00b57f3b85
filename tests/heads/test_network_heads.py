"""Heads that are networks of their own: side and copy beside a ViT, decoder over any taps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from number_formats import assert_formats_agree

import xattn
from xattn.config import TrainConfig
from xattn.eval.sanity import randomized_backbone, randomized_explainer
from xattn.explainers import create_explainer
from xattn.explaining.exporting import export
from xattn.heads import create_head, load_head, save_head
from xattn.training import fit

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
KINDS = [("side", "vit"), ("copy", "vit"), ("decoder", "vit"), ("decoder", "cnn")]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    made = {"cnn": "test_resnet", "vit": "test_vit"}
    return {k: xattn.load_backbone(m, None, input_size=64, num_classes=7) for k, m in made.items()}


def randomized(head):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return head.eval()


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize("fusion", ["classifier", "per_class"])
def test_classes_alone_equal_those_of_all_and_every_weight_learns(name, kind, fusion, networks):
    head = randomized(create_head(name, networks[kind], fusion=fusion))
    taps = head.tapped(networks[kind])(IMAGES)
    full, index = head(taps), torch.tensor([[2, 0], [1, 1], [6, 3]])
    assert full.shape[:2] == (3, 7)
    expected = full.gather(1, index[..., None, None].expand(-1, -1, *full.shape[2:]))
    torch.testing.assert_close(head(taps, index), expected, rtol=1e-4, atol=1e-4)
    (full * torch.randn_like(full)).sum().backward()
    still = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert [n for n in still if "class_bias" not in n] == []
    assert all(p.grad is None for p in networks[kind].parameters())


def test_the_side_is_its_equation(networks):
    vit = networks["vit"]
    head = randomized(create_head("side", vit, width=6))
    taps = head.tapped(vit)(IMAGES)
    with torch.no_grad():
        model, t = vit.model, torch.zeros(1)
        x = model.patch_drop(model._pos_embed(model.patch_embed(vit.normalize(IMAGES))))
        for block, layer, own in zip(model.blocks, head.inputs, head.blocks, strict=True):
            x = block(x)
            t = own(t + F.gelu(layer(x)))
        out = head.last(t)[:, vit.prefix_tokens :]
        [rows], bias = head.fusion.rows(None)
        expected = torch.einsum("bnc,kc->bkn", out, rows[0]) + bias[0, :, None]
        torch.testing.assert_close(head(taps).flatten(2), expected, rtol=1e-4, atol=1e-4)


def test_the_copy_begins_as_the_network_and_leaves_it_alone(networks):
    vit = networks["vit"]
    head = create_head("copy", vit).eval()
    before = vit.fingerprint
    with torch.no_grad():
        taps = vit.with_taps(["block.0", f"block.{vit.depth - 1}"])(IMAGES)
        tokens = torch.cat([taps.prefixes[0], taps.maps[0].flatten(2).transpose(1, 2)], 1)
        last = head.network[:-3](tokens)[:, vit.prefix_tokens :]
        torch.testing.assert_close(last, taps.maps[1].flatten(2).transpose(1, 2))
        own = vit.model.norm(last)
        torch.testing.assert_close(head.network[:-2](tokens)[:, vit.prefix_tokens :], own)
        head.network[0].norm1.weight += 1
    assert vit.with_taps("block").fingerprint == before
    assert all(p.requires_grad for p in head.parameters())


def test_the_decoder_adds_from_the_coarsest_tap_to_the_finest(networks):
    cnn = networks["cnn"]
    head = randomized(create_head("decoder", cnn, width=4))
    with torch.no_grad():
        for refine in head.refine:
            refine[-1].weight.zero_()
            refine[-1].bias.zero_()
        taps = cnn(IMAGES)
        scores = head(taps) - head.fusion([torch.zeros(3, 4, 1, 1)], None, (1, 1))
        parts = 0
        for i, f in enumerate(taps.maps):
            d = head.laterals[i](f)
            for finer in reversed(taps.maps[:i]):
                d = F.interpolate(d, finer.shape[2:], mode="bilinear", align_corners=False)
            parts = parts + d
        [rows], _ = head.fusion.rows(None)
        expected = torch.einsum("bchw,kc->bkhw", parts, rows[0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_they_are_trained_saved_and_loaded(name, kind, networks, tmp_path):
    from training_runs import write_photos

    write_photos(tmp_path / "photos", 24)
    network = networks[kind]
    head = create_head(name, network)
    config = TrainConfig("outcomes", "shapley", epochs=2, batch_size=10, workers=0, masks=4)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    fit(head, network, tmp_path / "photos", config, progress=False)
    moved = [k for k, v in head.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) > len(before) / 2
    save_head(head, tmp_path / "head")
    again = load_head(tmp_path / "head", network)
    with torch.no_grad():
        taps = head.tapped(network)(IMAGES)
        torch.testing.assert_close(again(taps), head.eval()(taps))


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("tokens", "vit")])
def test_double_precision_compiled_and_bf16_agree(name, kind, networks):
    head = create_head(name, networks[kind]).eval()
    taps = head.tapped(networks[kind])(IMAGES)
    assert_formats_agree(head, taps, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tokens", "vit"), *(pytest.param(*k, marks=pytest.mark.slow) for k in KINDS)],
)
def test_network_and_head_are_exported_as_one_graph(name, kind, networks, tmp_path):
    head = create_head(name, networks[kind])
    path = export(networks[kind], head, tmp_path / "m.pt2")  # compares the file with the head
    with torch.no_grad():
        logits, _ = torch.export.load(path).module()(IMAGES[:2], torch.tensor([1, 4]))
        expected = networks[kind].logits(IMAGES[:2])
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_other_networks_and_widths_are_refused(networks):
    for name, does in (("side", "reads"), ("copy", "copies")):
        with pytest.raises(ValueError, match=f"head: '{name}' {does} the blocks"):
            create_head(name, networks["cnn"])
    turned = xattn.load_backbone("eva02_tiny_patch14_224", None, input_size=56)
    with pytest.raises(ValueError, match="head: 'copy' copies the blocks"):
        create_head("copy", turned)
    three = xattn.load_backbone("deit_tiny_patch16_224", None, input_size=64)
    with pytest.raises(ValueError, match="width: got 5; give a multiple of the 3 attention heads"):
        create_head("side", three, width=5)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_table_is_shared_by_heads_that_read_other_taps(name, kind, networks, tmp_path):
    from training_runs import write_photos

    write_photos(tmp_path / "photos", 24)
    network, table = networks[kind], tmp_path / "table"
    config = TrainConfig("outcomes", epochs=1, batch_size=12, workers=0, masks=4)
    for one in ("evidence", name):
        head = create_head(one, network)
        fit(head, network, tmp_path / "photos", config, progress=False, table=table)
    assert len(list(table.glob("rows-*"))) >= 1


def test_taps_of_another_kind_are_refused_and_a_copy_costs_two_passes(networks):
    vit = networks["vit"]
    for name in ("side", "copy", "tokens"):
        head = create_head(name, vit)
        with pytest.raises(ValueError, match=rf"head '{name}' reads .*head.tapped\(backbone\)"):
            head(vit(IMAGES))
        assert create_explainer("head", vit, head).total_forwards == 1 + (name == "copy")
        assert create_explainer("head", vit, head, passes=4).total_forwards == 4 * (
            1 + head.own_passes
        )


@pytest.mark.parametrize("name", [*dict(KINDS), "tokens"])
def test_a_randomized_row_reads_the_random_network_alone(name, networks):
    vit = networks["vit"]
    head = create_head(name, vit).eval()
    method = randomized_explainer("head", vit, head=head, seed=3)
    twin, seen = randomized_backbone(vit, 3), torch.tensor([1, 4, 2])
    if name == "tokens":
        expected = create_explainer("token_path", twin).attribute(IMAGES, seen)
    else:
        own = create_head(name, twin).eval()
        own.load_state_dict(head.state_dict())
        with torch.no_grad():
            expected = own(own.tapped(twin)(IMAGES), seen)
    ranks = [maps.flatten(1).argsort() for maps in (method.attribute(IMAGES, seen), expected)]
    assert torch.equal(*ranks)
