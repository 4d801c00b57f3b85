"""The training objective: its terms in limit cases, its definition in every class mode, mask policies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import xattn
from xattn.config import TrainConfig
from xattn.heads import create_head
from xattn.training.objectives.base import Step
from xattn.training.objectives.mask import (
    Mask,
    area_penalty,
    masked_logits,
    predicted_targets,
    variation_penalty,
)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "classes", "r"), [(1, 1, 7), (3, 5, 28)])
def test_area_and_variation_of_a_constant(value, batch, classes, r):
    masks = torch.full((batch, classes, r, r), value, dtype=torch.float64)
    assert area_penalty(masks).item() == pytest.approx((value + 0.0005) ** 0.3)
    assert variation_penalty(masks).item() == pytest.approx(0.3 * value**2 * 4 * r * classes / 2)


def test_variation_is_its_definition():
    a = rand(2, 3, 5, 4).double()
    total = 0.0
    for b in range(2):
        for k in range(3):
            m = a[b, k]
            total += ((m[1:] - m[:-1]) ** 2).sum() + ((m[:, 1:] - m[:, :-1]) ** 2).sum()
            border = (
                (m[0] ** 2).sum()
                + (m[-1] ** 2).sum()
                + (m[:, 0] ** 2).sum()
                + (m[:, -1] ** 2).sum()
            )
            total += 0.3 * border
    assert variation_penalty(a).item() == pytest.approx(float(total) / 4)


def test_objective_gradients_are_right():
    a = rand(2, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(area_penalty, a) and torch.autograd.gradcheck(
        variation_penalty, a
    )


@torch.no_grad()
def test_mask_policies(backbone):
    x, m = rand(2, 3, 64, 64), rand(2, 1, 8, 8, seed=1)
    ones = torch.ones_like(m)
    for policy in ("raw_normalize", "renormalize", "normalized", "feature"):
        same = masked_logits(backbone, x, ones, policy)
        torch.testing.assert_close(same, backbone.logits(x), atol=1e-5, rtol=1e-4)
    raw = masked_logits(backbone, x, m, "raw_normalize")
    torch.testing.assert_close(
        masked_logits(backbone, x, m, "renormalize"), raw, atol=1e-5, rtol=1e-4
    )
    assert not torch.allclose(masked_logits(backbone, x, m, "normalized"), raw, atol=1e-5)
    grey = backbone.mean.expand_as(x)
    torch.testing.assert_close(
        masked_logits(backbone, x, m * 0, "normalized"), backbone.logits(grey), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("mode", ["batch", "own", "top"])
def test_objective_equals_its_definition_in_every_class_mode(backbone, mode):
    head = create_head("ttame", backbone, fusion="per_class").eval()
    x = rand(3, 3, 64, 64)
    terms = Mask().on_photos(Step(head, backbone, x, TrainConfig(class_mode=mode)))
    with torch.no_grad():
        taps = backbone(x)
        full = head(taps).sigmoid()
        y = taps.logits.argmax(1)
        classes = {
            "own": y[:, None],
            "batch": y[None].expand(3, 3),
            "top": taps.logits.topk(3).indices,
        }[mode]
        a = full.gather(1, classes[..., None, None].expand(-1, -1, *full.shape[2:]))
        m = F.interpolate(full[torch.arange(3), y][:, None], (64, 64), mode="bilinear")
        ce = F.cross_entropy(backbone.logits(x * m), y)
        loss = 1.5 * ce + 2 * area_penalty(a) + 0.01 * variation_penalty(a)
    assert a.shape[1] == (1 if mode == "own" else 3)
    torch.testing.assert_close(terms["loss"].detach(), loss, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["own", "batch", "top"])
def test_a_multilabel_head_is_trained_on_its_own_labels_sigmoid(mode):
    torch.manual_seed(0)
    multi = xattn.load_backbone(
        "test_resnet", weights=None, input_size=64, num_classes=5, task="multilabel"
    )
    torch.nn.init.constant_(multi.model.get_classifier().bias, 1.0)
    torch.manual_seed(3)
    head = create_head("ttame", multi).eval()
    images = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        taps = multi(images)
        target = predicted_targets(taps.logits, "multilabel")
        assert (target != taps.logits.argmax(1)).any()
        own = head(taps, target[:, None]).sigmoid()
        p = multi.probabilities(masked_logits(multi, images, own, "raw_normalize"))
        terms = Mask().on_photos(Step(head, multi, images, TrainConfig(class_mode=mode)))
    expected = -p.gather(1, target[:, None]).log().mean().float()
    torch.testing.assert_close(terms["cross_entropy"], expected, rtol=1e-4, atol=1e-5)
