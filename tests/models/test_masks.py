"""Losses, tiles and files of mask networks, and the networks as classifiers."""

import importlib.util
import json

import pytest
import torch

from xattn.backbone import load_backbone
from xattn.explainers import create_explainer
from xattn.models.agunet import AGUNet, Outputs
from xattn.models.masks import (
    MaskClassifier,
    load_network,
    mask_loss,
    mask_score,
    predict_tiles,
    released_dice_loss,
    save_network,
    soft_dice,
)

needs_monai = pytest.mark.skipif(
    importlib.util.find_spec("monai") is None, reason="MONAI is not installed"
)


def net(**options):
    torch.manual_seed(0)
    return AGUNet(filters=(4, 6, 8), **options).eval()


def test_dice_is_its_equation_and_finite_without_a_lesion():
    p, t = torch.tensor([[[0.5, 1.0, 0.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
    assert soft_dice(p, t).item() == pytest.approx((2 * 1.5 + 1) / (1.25 + 2 + 1))
    assert soft_dice(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)).item() == 1
    trained = net().train()
    loss = mask_loss(trained.outputs(torch.rand(2, 1, 16, 16)), torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in trained.parameters())


def test_the_loss_is_least_at_the_mask_itself():
    masks = (torch.rand(2, 1, 16, 16) > 0.7).float()
    found = net(deep_supervision=False).outputs(masks)._replace(logits=(masks - 0.5) * 60)
    assert mask_loss(found, masks) < 1e-6
    assert mask_loss(found._replace(logits=-found.logits), masks) > 1


def test_the_released_loss_has_no_gradient_near_a_right_answer_and_ours_has():
    truth = torch.zeros(1, 2, 8, 8)
    truth[:, 1, 2:6, 2:6] = 1
    truth[:, 0] = 1 - truth[:, 1]
    p = (truth * 0.8 + 0.1).requires_grad_()
    released_dice_loss(p, truth).backward()
    assert released_dice_loss(p, truth) == 0 and p.grad.abs().max() == 0
    far = torch.stack([truth[:, 1], truth[:, 0]], 1).requires_grad_()
    released_dice_loss(far, truth).backward()
    assert far.grad.abs().max() > 0
    ours = (1 - soft_dice(p[:, 1:], truth[:, 1:])).mean()
    assert torch.autograd.grad(ours, p)[0].abs().max() > 0


@needs_monai
def test_dice_agrees_with_monai():
    from monai.losses import DiceLoss

    torch.manual_seed(0)
    p, t = torch.rand(3, 2, 7, 9), (torch.rand(3, 2, 7, 9) > 0.6).float()
    theirs = DiceLoss(squared_pred=True, smooth_nr=1, smooth_dr=1, reduction="none")(p, t)
    torch.testing.assert_close(1 - soft_dice(p, t), theirs.flatten(1))


@pytest.mark.parametrize(
    "shape, value, message",
    [
        ((2, 1, 8, 9), 1, r"^masks: got shape \(2, 1, 8, 9\) for logits \(2, 1, 8, 8\)"),
        ((1, 1, 8, 8), 1, r"^masks: got shape \(1, 1, 8, 8\) for logits \(2, 1, 8, 8\)"),
        ((2, 1, 8, 8), 0.5, "^masks: got values other than 0 and 1; give binary masks"),
    ],
)
def test_masks_of_another_shape_or_not_binary_are_refused(shape, value, message):
    scores = torch.rand(2, 1, 8, 8)
    with pytest.raises(ValueError, match=message):
        mask_loss(Outputs(scores, (), (), scores), torch.full(shape, float(value)))


# ---------------------------------------------------------------------- tiles


@pytest.mark.parametrize("size, tile", [((13, 11), (5, 4)), ((9, 7, 10), (4, 7, 3))])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_tiles_of_a_pointwise_net_are_the_whole(size, tile, overlap):
    image = torch.randn(2, *size, dtype=torch.float64)

    def pointwise(x):
        return torch.stack([x[:, 0] * x[:, 1], x.sum(1).sin(), x[:, 0]], 1)

    found = predict_tiles(pointwise, image, tile, overlap=overlap, batch_size=3)
    assert (found - pointwise(image[None])[0]).abs().max() < 1e-6


def test_the_middle_of_a_tile_counts_more():
    """Tiles answer with their number; between two middles the answer moves from one to the other."""
    count = iter(range(9))

    def number(x):
        return torch.stack([torch.full_like(part, next(count)) for part in x])

    found = predict_tiles(number, torch.zeros(1, 12), (8,), overlap=0.5, batch_size=1)[0]
    assert found[:4].eq(0).all() and found[8:].eq(1).all()
    assert (found[4:8].diff() > 0).all() and found[4] < 0.1 and found[7] > 0.9


@needs_monai
def test_tiles_agree_with_monai():
    from monai.inferers import sliding_window_inference

    model, image = net(), torch.rand(1, 1, 24, 20)
    ours = predict_tiles(model, image[0], (16, 16))
    with torch.no_grad():
        theirs = sliding_window_inference(image, (16, 16), 4, model, overlap=0.5, mode="gaussian")
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile": (9, 8)}, r"^tile: got \(9, 8\) for a size of \(8, 8\); give at most that size"),
        ({"tile": (8,)}, r"^tile: got \(8,\) for a size of \(8, 8\)"),
        ({"tile": (4, 4), "overlap": 1.0}, "^overlap: got 1.0; give a number from 0 to below 1"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        predict_tiles(net(), torch.rand(1, 8, 8), **options)


def test_an_image_with_nan_is_refused():
    image = torch.rand(1, 8, 8)
    image[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="^image: holds NaN or infinite values; replace them"):
        predict_tiles(net(), image, (4, 4))


# ---------------------------------------------------------------------- files


def test_a_saved_network_comes_back(tmp_path):
    before = net(dual=True, combine="add")
    after = load_network(save_network(before, tmp_path / "net", {"threshold": 0.4}))
    x = torch.rand(1, 1, 12, 9)
    assert torch.equal(before(x), after(x)) and not after.training
    record = json.loads((tmp_path / "net" / "network.json").read_text())
    assert record["about"] == {"threshold": 0.4}


def test_other_and_damaged_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^folder: .* has no network.json"):
        load_network(tmp_path)
    folder = save_network(net(), tmp_path / "net")
    record = json.loads((folder / "network.json").read_text())
    record["settings"]["filters"] = [4, 6, 9]
    (folder / "network.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="^folder: .* is damaged .*; train the network again"):
        load_network(folder)


# ---------------------------------------------------------------------- as a classifier


def test_the_score_is_positive_exactly_where_there_is_a_mask():
    logits = torch.full((3, 1, 4, 4), -2.0)
    logits[1, 0, 1, 1:3] = torch.tensor([1.0, 3.0])
    logits[2, 0, 0, 0] = -0.5
    assert mask_score(logits).flatten().tolist() == [-2.0, 2.0, -0.5]


def test_one_mask_is_a_binary_classifier_and_several_are_classes():
    images = torch.rand(2, 3, 16, 16)
    binary = load_backbone(MaskClassifier(net(), (16, 16)), class_names=["nothing", "lesion"])
    assert binary.task == "binary" and binary.class_names == ["nothing", "lesion"]
    score = mask_score(net()(images.mean(1, keepdim=True)))
    torch.testing.assert_close(binary(images).logits, torch.cat([-score / 2, score / 2], 1))
    several = load_backbone(MaskClassifier(net(masks=4, channels=3), (16, 16)))
    assert several.num_classes == 4 and several(images).maps[0].shape == (2, 8, 4, 4)
    with pytest.raises(ValueError, match="^net: got one without dims=2 and 1 or 3 channels"):
        MaskClassifier(AGUNet(3))


# ---------------------------------------------------------------------- the explainer gates


def backbone(**options):
    return load_backbone(
        MaskClassifier(net(**options), (16, 16)), class_names=["nothing", "lesion"]
    )


def test_gates_times_gradient_is_what_closing_them_costs_to_first_order():
    """z((1 - e) psi) - z(psi) = - e sum of the map, for small e."""
    lesions = backbone(deep_supervision=False)
    lesions.model.double()
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    explainer = create_explainer("gates", lesions, level=0)
    change = -explainer.attribute(images, 1).sum().item()
    gate = lesions.model.net.gates[0]
    forward, e = gate.forward, 1e-6
    gate.forward = lambda g, x: (1 - e) * forward(g, x)
    less = lesions(images).logits[0, 1].item()
    del gate.forward
    assert (less - lesions(images).logits[0, 1].item()) / e == pytest.approx(change, rel=1e-4)


def test_gates_of_a_level_and_their_sign():
    lesions = backbone()
    images = torch.rand(2, 3, 16, 16)
    psi = lesions.model.forward_gates(images)[1]
    plus = create_explainer("gates", lesions, form="plus", level=0).attribute(images, 1)
    minus = create_explainer("gates", lesions, form="minus", level=0).attribute(images, 1)
    torch.testing.assert_close(plus, psi[0].detach())
    torch.testing.assert_close(plus + minus, torch.ones_like(plus))
    every = create_explainer("gates", lesions).attribute(images, 1)
    lesions.model.gate_choice = ("minus", 0)  # as a folder may name it
    assert torch.equal(create_explainer("gates", lesions).attribute(images, 1), minus)
    lesions.model.gate_choice = None
    parts = [create_explainer("gates", lesions, level=i).attribute(images, 1) for i in (0, 1)]
    torch.testing.assert_close(every, parts[0] + parts[1])
    nothing = create_explainer("gates", lesions).attribute(images, 0)
    torch.testing.assert_close(nothing, -every)  # z of nothing is -z of a lesion


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "psi"}, "^form: got 'psi'; give 'gradient', 'plus', 'minus' or None"),
        ({"level": 2}, r"^level: got 2; the network has 0\.\.1"),
    ],
)
def test_forms_and_levels_that_are_not_there_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_explainer("gates", backbone(), **options)


def test_networks_without_gates_are_refused():
    with pytest.raises(ValueError, match="^explainer: this network has gates=False"):
        create_explainer("gates", backbone(gates=False))
    with pytest.raises(ValueError, match="^explainer: 'gates' reads the gates of a mask network"):
        create_explainer("gates", load_backbone("test_resnet", weights=None, input_size=32))
