"""Thinned fidelity, SaCo, comprehensiveness and sufficiency, eMPRT: their equations, limits and known answers."""

import math

import eval_fakes as fakes
import pytest
import torch
from eval_fakes import FakeBackbone

from xattn.eval import create_metric, evaluate, measure
from xattn.eval.metrics.base import Column
from xattn.eval.metrics.board.emprt import histogram_entropy
from xattn.eval.metrics.board.information_curves import information_area, interpolate_sparse
from xattn.eval.metrics.board.saco import saco_values
from xattn.eval.metrics.board.thinned import thinned_share, thinned_values
from xattn.eval.metrics.scorer import MaskedScorer


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def linear(images):
    """Log-odds of class 0 are the sum of the red channel's left half."""
    score = images[:, 0, :, :10].double().sum((1, 2)) / 10 - 5
    return torch.stack([score, torch.zeros_like(score)], 1)


def value(name, maps, f=linear, images=None, **options):
    images = rand(len(maps), 3, 18, 20) if images is None else images
    column = Column({"eraser": "comprehensiveness"}.get(name, name))
    return measure(create_metric(name, **options), f, images, maps, 0)[column]


def test_thinned_takes_half_of_a_small_set_and_a_fifth_of_half_the_photo():
    assert [thinned_share(s) for s in (0.05, 0.2, 0.5)] == [0.5, 0.5, 0.2]
    gone = []

    def count(images):
        gone.extend(int((image == 0).all(0).sum()) for image in images)
        return torch.stack([images.mean((1, 2, 3)), torch.zeros(len(images))], 1)

    value("thinned", rand(1, 1, 18, 20), count, fill="black", draws=1, shares=(0.1, 0.5))
    assert sorted(set(gone) - {0, 360}) == [18, 36]  # nothing, and what fills a pass


def test_thinned_of_the_negative_is_the_negative_and_of_what_matters_is_positive():
    maps = torch.zeros(1, 1, 18, 20)
    maps[..., :10] = 1
    maps = maps + 0.01 * rand(1, 1, 18, 20, seed=5)
    plain, turned = (value("thinned", m, fill="black") for m in (maps, -maps))
    torch.testing.assert_close(turned, -plain, rtol=1e-9, atol=1e-12)
    assert float(plain) > 0.5
    assert math.isnan(float(value("thinned", torch.ones(1, 1, 18, 20), fill="black")))
    assert float(thinned_values(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]))) == 1


def test_saco_of_known_drops():
    order = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert float(saco_values(order, torch.zeros(1, 4))) == 1, "ties count as agreement"
    assert float(saco_values(order, order)) == 1
    assert float(saco_values(order, -order)) == -1
    salience, drops = torch.tensor([[5.0, 4.0, 3.0, 2.0]]), torch.tensor([[4.0, 2.0, 3.0, 1.0]])
    assert float(saco_values(salience, drops)) == pytest.approx(0.8)
    assert math.isnan(float(saco_values(torch.ones(1, 4), drops)))


def test_saco_orders_groups_and_fills_them_with_the_photos_colour():
    image = rand(3, 18, 20)
    maps = torch.arange(360.0).view(1, 1, 18, 20)
    found = float(value("saco", maps, images=image[None], groups=2))
    colour = image.mean((1, 2))[:, None, None]
    halves = [image.clone() for _ in range(2)]
    halves[0][:, 9:], halves[1][:, :9] = colour, colour
    p = linear(torch.stack([image, *halves])).softmax(1)[:, 0]
    assert found == (1.0 if p[0] - p[1] >= p[0] - p[2] else -1.0)


def test_comprehensiveness_and_sufficiency_by_hand():
    image, maps = rand(1, 3, 18, 20), torch.arange(360.0).flip(0).view(1, 1, 18, 20)
    metric = create_metric("eraser", levels=(0.05, 0.5))
    found = measure(metric, linear, image, maps, 0)
    without, alone = [], []
    for rows in (18, 180):
        top = (torch.arange(360) < rows).view(18, 20)
        without.append(linear(torch.where(top, 0, image)).softmax(1)[0, 0])
        alone.append(linear(torch.where(top, image, 0)).softmax(1)[0, 0])
    p = float(linear(image).softmax(1)[0, 0])
    assert float(found[Column("comprehensiveness")]) == pytest.approx(p - float(sum(without)) / 2)
    assert float(found[Column("sufficiency")]) == pytest.approx(p - float(sum(alone)) / 2)


def test_entropy_of_histograms_and_emprt_of_a_rougher_map():
    assert float(histogram_entropy(torch.linspace(0, 1, 100).view(1, 1, 10, 10))) == pytest.approx(
        math.log(100)
    )
    assert float(histogram_entropy(torch.ones(1, 1, 4, 4))) == 0
    assert histogram_entropy(torch.full((1, 1, 2, 2), torch.nan)).isnan().all()
    smooth = torch.zeros(1, 1, 18, 20)
    smooth[..., 4:6, 4:6] = 1

    def at_random(stage, images, targets):
        assert stage == -1
        return rand(len(images), 1, 18, 20)

    found = measure(
        create_metric("emprt"), FakeBackbone(), fakes.images(1), smooth, 0,
        explain_randomized=at_random,
    )  # fmt: skip
    own, other = histogram_entropy(smooth), histogram_entropy(rand(1, 1, 18, 20))
    torch.testing.assert_close(found[Column("eMPRT")], (other - own) / own)


@pytest.mark.parametrize("name", ["emprt", "network-contrast"])
def test_without_maps_on_random_weights_there_is_an_error(name):
    with pytest.raises(ValueError, match="explain_randomized: None; .* give a function"):
        measure(create_metric(name), FakeBackbone(), fakes.images(1), rand(1, 1, 18, 20), 0)


def test_information_curves_by_hand_and_of_a_map_that_knows():
    sizes, scores = torch.tensor([10.0, 14.0, 20.0, 30.0]), torch.tensor([0.1, 0.7, 0.4, 0.9])
    y = torch.tensor([0.0, 0.75, 0.75, 1.0])
    expected = float(torch.trapezoid(y, torch.tensor([0.0, 0.2, 0.5, 1.0])))
    assert information_area(sizes, scores) == pytest.approx(expected)
    assert math.isnan(information_area(sizes, scores.flip(0)))
    smooth = torch.linspace(0, 1, 20).expand(3, 18, 20)
    torch.testing.assert_close(interpolate_sparse(smooth, 0.3, 0), smooth, atol=0.2, rtol=0)
    images = 0.2 * rand(2, 3, 18, 20)[:1]
    images[:, 0, :, :10] = 0.98

    def red(images):
        """The first class where the left half is red enough."""
        score = images[:, 0, :, :10].sum((1, 2)) / 18 - 8
        return torch.stack([score, torch.zeros_like(score)], 1)

    maps = torch.zeros(1, 1, 18, 20)
    maps[..., :10] = 1
    options = {"levels": (0.1, 0.25, 0.5), "least": 0.5}
    metric = create_metric("information-curves", **options)
    good, bad = (measure(metric, red, images, m, 0) for m in (maps, 1 - maps))
    for column in (Column("SIC"), Column("AIC")):
        assert (good[column] >= bad[column]).all()
    assert (good[Column("SIC")] > bad[Column("SIC")]).all()
    low = measure(create_metric("information-curves"), red, images * 0.1, maps, 0)
    assert low[Column("SIC")].isnan().all(), "the class is not likely"


@pytest.mark.parametrize("option", [{"levels": (0.2, 2.0)}, {"levels": ()}, {"known": 0.0}])
def test_shares_of_information_curves_lie_between_none_and_all(option):
    with pytest.raises(ValueError, match=rf"^{next(iter(option))}: got .* in \(0, 1\)"):
        create_metric("information-curves", **option)


def test_information_curves_take_a_pass_a_level_and_one_for_the_blurred_photo():
    rows = {"bright": fakes.Maps(fakes.brightness)}
    for classes, hit in ((None, 1), ([4], 0)):
        metric = create_metric("information-curves", levels=(0.1, 0.5), least=0.0)
        options = {"metrics": [metric], "classes": classes, "progress": False}
        cost = evaluate(FakeBackbone(), rows, fakes.images(1), **options).cost
        assert cost["images_scored"] == 1 + 3
        scorer = MaskedScorer(FakeBackbone(), 8)
        target = scorer.clean(fakes.images(1), None if classes is None else torch.tensor(classes))[
            1
        ]
        ticket = scorer.submit(fakes.images(1)[0], int(target), hit=True)
        assert ticket.done and ticket.score == hit


def test_the_smooth_randomisation_test_compares_means_over_noise():
    calls = []

    def explain(images, targets):
        calls.append(len(images))
        return images.mean(1, keepdim=True)

    options = {"explain": explain, "explain_randomized": lambda s, x, t: explain(x, t)}
    metric = create_metric("randomization", stages=2, smooth=6, noise=0.2)
    found = measure(metric, FakeBackbone(), fakes.images(1), fakes.images(1)[:, :1], 0, **options)
    assert calls == [6, 6, 6]
    assert float(found[Column("randomization-Spearman")]) == pytest.approx(1)
    assert metric.options() != create_metric("randomization", stages=2).options()
