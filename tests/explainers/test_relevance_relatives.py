"""DAVE, CAAP and MDA in cases whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from xattn.backbone import Preprocessing, load_backbone
from xattn.explainers import create_explainer
from xattn.explainers.masking.mda import convex_drops
from xattn.explainers.relevance.dave import move_images
from xattn.explainers.relevance.token_blocks import token_blocks


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    net = load_backbone("test_vit", weights=None, input_size=64, num_classes=5)
    return net.double()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 64, 64, generator=generator, dtype=torch.float64)


TARGET = torch.tensor([3, 0])

# ---------------------------------------------------------------------- DAVE


def test_dave_of_a_copy_that_stands_still_is_libragrad(vit, images):
    dave = create_explainer("dave", vit, copies=1, shift=0.0, rotation=0.0)
    libragrad = create_explainer("libragrad", vit, base="input_x_gradient", at="pixels")
    expected = libragrad.attribute(images, TARGET)
    assert (dave.attribute(images, TARGET) - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_map_of_dave_sums_to_the_mean_of_its_copies(vit, images):
    libragrad = create_explainer("libragrad", vit, base="input_x_gradient", at="pixels")
    generator, sums = torch.Generator().manual_seed(7), []
    mean = vit.mean.to(images)
    for _ in range(3):
        drawn = 2 * torch.rand(3, generator=generator) - 1
        torch.randn(3, 64, 64, generator=generator)  # the noise
        copies = move_images(images - mean, *(drawn * torch.tensor([4.0, 4.0, 20.0]))) + mean
        sums.append(libragrad.attribute(copies.clamp(0, 1), TARGET).sum((1, 2, 3)))
    found = create_explainer("dave", vit, seed=7, copies=3, shift=4.0).attribute(images, TARGET)
    assert torch.stack(sums).std(0).min() > 1e-3 * sums[0].abs().max()  # they do differ
    assert torch.allclose(found.sum((1, 2, 3)), torch.stack(sums).mean(0), rtol=1e-5)


def test_noise_is_drawn_by_the_seed(vit, images):
    def made(seed):
        return create_explainer("dave", vit, seed=seed, copies=1, noise=0.2).attribute(images, 1)

    assert torch.equal(made(0), made(0)) and not torch.allclose(made(0), made(1))


def test_quarter_turns_and_shifts_of_wide_pictures():
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    zero, turn = torch.tensor(0.0), torch.tensor(90.0)
    assert torch.allclose(move_images(x, zero, zero, turn), x.rot90(-1, (2, 3)), atol=1e-5)
    x = torch.rand(1, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    found = move_images(x, torch.tensor(2.0), torch.tensor(-3.0), zero)
    assert torch.allclose(found[..., 2:, :-3], x[..., :-2, 3:], atol=1e-5)
    assert torch.allclose(found[..., :2, :], zero, atol=1e-5)
    tall = torch.zeros(1, 1, 6, 10)
    tall[..., 1, 5:] = 1  # 2 rows above the centre
    found = move_images(tall, zero, zero, turn)
    assert found[0, 0, 3:, 6].min() > 0.4 and found.sum() == pytest.approx(3, abs=0.5)


# ---------------------------------------------------------------------- CAAP


def test_caap_of_a_picture_without_content_is_its_own_logit(vit):
    plain = vit.mean.double().expand(1, 3, 64, 64).contiguous()
    found = create_explainer("caap", vit).attribute(plain, 2)
    logit = vit.logits(plain)[0, 2]
    assert torch.allclose(found, logit.expand_as(found), rtol=1e-10)


def test_a_patch_behind_the_last_block_does_not_reach_the_class_token(vit, images):
    found = create_explainer("caap", vit, first=-1, last=-1, neutral="black").attribute(images, 2)
    logit = vit.logits(torch.zeros(1, 3, 64, 64, dtype=torch.float64))[0, 2]
    assert torch.allclose(found, logit.expand_as(found), rtol=1e-10)


def test_caap_puts_the_photos_token_into_each_block_of_the_range(vit, images):
    blocks, (first, last), number = token_blocks(vit), (1, 2), 5
    source, neutral = [], vit.mean.double().expand(1, 3, 64, 64)

    def run(x, change):
        model = vit.model
        tokens = model.norm_pre(
            model.patch_drop(model._pos_embed(model.patch_embed(vit.normalize(x))))
        )
        for i, block in enumerate(blocks):
            tokens = change(i, block(tokens))
        return model.forward_head(model.norm(tokens))

    def kept(i, tokens):
        source.append(tokens)
        return tokens

    def patched(i, tokens):
        place = vit.prefix_tokens + number
        rest = [tokens[:, :place], source[i][:, place : place + 1], tokens[:, place + 1 :]]
        return torch.cat(rest, 1) if first <= i <= last else tokens

    with torch.no_grad():
        run(images[:1], kept)
        expected = run(neutral, patched)[0, 3]
    explainer = create_explainer("caap", vit, first=first, last=last, max_forward_batch=3)
    found = explainer.attribute(images, TARGET)[0].flatten()
    assert found[number].item() == pytest.approx(expected.item(), rel=1e-9)
    assert found.std() > 1e-6
    assert explainer.forwards == 1 + len(found)


def test_caap_says_what_it_cannot_patch(vit):
    with pytest.raises(ValueError, match=r"first: got block 3, which is after last=0"):
        create_explainer("caap", vit, first=3, last=0)
    with pytest.raises(ValueError, match=r"last: got 9; the model has \d+ layers"):
        create_explainer("caap", vit, last=9)
    with pytest.raises(ValueError, match=r"use 'occlusion'"):
        create_explainer("caap", load_backbone("test_efficientnet", weights=None, input_size=64))


# ---------------------------------------------------------------------- MDA


class Squares(nn.Module):
    """The probability of class 1 is a sum over squares of weight times mean brightness."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.preprocessing = Preprocessing((24, 24), (0.0,) * 3, (1.0,) * 3)

    def forward_taps(self, x):
        cells = nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 3)
        p = 0.05 + cells.flatten(1) @ self.weights.to(x)
        return torch.stack([1 - p, p], 1).log(), [cells]


def searched(weights, images, **options):
    net = load_backbone(Squares(weights)).double()
    options = {"cells": 3, "candidates": 9, "prior": "centre", **options}
    return create_explainer("mda", net, **options).attribute(images, 1)[0, 0].flatten()


def test_mda_of_a_sum_over_squares_is_its_parts():
    weights = [0.02, 0.2, 0.05, 0.11, 0.01, 0.07, 0.14, 0.03, 0.09]
    white = torch.ones(1, 3, 24, 24, dtype=torch.float64)  # a blur changes nothing: deletion alone
    found = searched(weights, white)
    assert torch.allclose(found, torch.tensor(weights).double() / sum(weights), atol=1e-5)


def test_mda_inserts_first_what_the_blur_took_away():
    weights = [0.0] * 9
    weights[7] = 0.9
    photo = torch.zeros(1, 3, 24, 24, dtype=torch.float64)
    photo[..., 16:, 8:16] = 1  # square 7
    found = searched(weights, photo)
    assert found.argmax() == 7 and found[7] == pytest.approx(1, abs=1e-5)
    assert len(set(found.tolist())) == 9  # the order is kept where nothing changes


def test_drops_fall_and_end_where_the_curve_ends():
    convex = np.array([1.0, 0.6, 0.3, 0.1, 0.1])
    assert convex_drops(convex) == pytest.approx([0.4, 0.3, 0.2, 0.0], abs=1e-6)
    drops = convex_drops(np.array([0.9, 0.9, 0.2, 0.15, 0.0]))
    assert drops.sum() == pytest.approx(0.9, abs=1e-5)
    assert (drops >= 0).all() and (np.diff(drops) <= 1e-12).all()
