"""Token explainers by gradients at the image features, and by random masks."""

import dataclasses

import pytest
import torch
from conversations import Linear, conversation, loaded
from conversations import explained as scores

from xattn.vlm.explainers.base import create_token_explainer, exclusive_use


def explained(name, context, **options):
    return scores(name, context, **options).image


@pytest.fixture
def linear():
    context = conversation(vlm=loaded("llava", torch.float64))
    return context, Linear(context).weights


def test_of_a_linear_score_gradients_tell_each_tokens_part(linear):
    context, w = linear
    f, f0 = context.features, context.features.mean(0)
    part = (w * (f - f0)).sum(2)
    for name, options in (("gradient_x_input", {}), ("integrated_gradients", {"steps": 2})):
        torch.testing.assert_close(explained(name, context, **options), part)
    from_zero = explained("gradient_x_input", context, baseline="zero")
    torch.testing.assert_close(from_zero, (w * f).sum(2))
    torch.testing.assert_close(explained("hirescam", context), from_zero)
    cam = torch.stack([f @ own.mean(0) for own in w])
    assert (cam < 0).any()
    torch.testing.assert_close(explained("gradcam", context), cam.clamp_min(0))


@pytest.mark.parametrize("baseline", ["mean", "grey"])
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "mllama"])
def test_integrated_gradients_sum_to_what_the_image_adds(kind, baseline):
    context = conversation(kind, vlm=loaded(kind, torch.float64), asked=[1, 3])
    explainer = create_token_explainer("integrated_gradients", steps=32, baseline=baseline)
    with exclusive_use(context.vlm):
        found = explainer.explain(context).image.sum(1)
        base = explainer._baseline(context)
        added = (context.scores() - context.scores(base[None])).detach()[0]
    assert added.abs().min() > 1e-2
    torch.testing.assert_close(found.float(), added.float(), atol=1e-5, rtol=1e-4)


def test_the_baseline_itself_explains_nothing():
    context = conversation()
    mean = context.fill.expand_as(context.features)
    context.entered.features = mean
    assert explained("gradient_x_input", context).abs().max() < 1e-6


def test_only_what_is_asked_of_gradients_is_kept():
    context = conversation(asked=[0, 2])
    torch.testing.assert_close(context.gradients(of=lambda g: g[3]), context.gradients()[:, 3])


def test_rise_finds_the_parts_of_an_additive_score():
    context = conversation(photos=2)
    parts = torch.randn(len(context.features), 2, generator=torch.Generator().manual_seed(1))
    context.hidden = lambda masks, where: (~masks).float() @ parts + 1000
    found = explained("rise", context, masks=20_000)
    torch.testing.assert_close(found.T.float(), parts, atol=0.15, rtol=0)  # 1 / sqrt(20,000)
    assert not torch.equal(found, explained("rise", context, masks=20_000, seed=1))
    again = explained("rise", context, masks=20_000)
    context.hidden = lambda masks, where: (~masks).float() @ parts
    torch.testing.assert_close(explained("rise", context, masks=20_000), again, atol=1e-3, rtol=0)


def test_rise_hides_cells_of_the_photo():
    context = conversation(photos=2)
    seen = []
    context.hidden = lambda masks, where: seen.append(masks) or masks.float().sum(1, keepdim=True)
    explained("rise", context, masks=300, cells=2)
    # Neighbours in a row of 4 tokens share a cell of half the width as often as an offset allows.
    together = (seen[0][:, 0] == seen[0][:, 1]).float().mean()
    apart = (seen[0][:, 0] == seen[0][:, 15]).float().mean()
    assert together > 0.65 and 0.4 < apart < 0.6
    assert 0.4 < (seen[0][:, 0] == seen[0][:, 16]).float().mean() < 0.6  # of the other photo


def test_a_token_that_nothing_reads_has_no_part_in_any_map():
    context = conversation()
    whole = context.scores
    unread = 5

    def score(features=None):
        f = context.features[None] if features is None else features
        keep = torch.ones(len(context.features), 1)
        keep[unread] = 0
        return whole(f * keep)

    context.scores = score
    for name in ("gradient_x_input", "integrated_gradients", "hirescam"):
        found = explained(name, context)
        assert (found[:, unread] == 0).all() and (found[:, unread - 1] != 0).all()


@pytest.mark.parametrize("name", ["gradient_x_input", "integrated_gradients", "gradcam", "rise"])
def test_options_are_checked(name):
    options = [f.name for f in dataclasses.fields(type(create_token_explainer(name)))]
    for option in options:
        with pytest.raises(ValueError, match=f"^{option}: got"):
            create_token_explainer(name, **{option: "no"})
