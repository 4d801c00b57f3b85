"""Insertion and deletion against the definition, exact oracles and limit cases (heads.md 14)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xattn.eval.fills import fill
from xattn.eval.metrics import create_metric, measure
from xattn.eval.metrics.base import Column, Sample
from xattn.eval.metrics.curves import InsertionDeletionMetric, auc, curves

DELETION, INSERTION = Column("deletion"), Column("insertion")
SIZE = (9, 11)
SEEDS = st.integers(0, 2**31)
MEAN = (0.5, 0.4, 0.3)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ranks(seed: int = 0, size=SIZE) -> torch.Tensor:
    """(1, 1, H, W): a map without ties."""
    order = torch.randperm(math.prod(size), generator=torch.Generator().manual_seed(seed))
    return order.float().view(1, 1, *size)


def sample(image, grey, score=0.5) -> Sample:
    return Sample(image=image, grey=grey, raw=grey, target=0, score=score)


def linear(weight):
    """Logits (b, 2): the sum of weight (3, H, W) times the image, and its negative."""

    def f(images):
        sums = (images.double() * weight.double()).sum((1, 2, 3))
        return torch.stack([sums, -sums], 1)

    return f


def softmax_of(seed=0, gain=1.0, size=SIZE):
    weight = gain * torch.randn(3, *size, generator=torch.Generator().manual_seed(seed))
    return linear(weight)


def requests(probe, given):
    """All requests of a probe, images copied as the engine does."""
    return [(r.key, r.image.clone(), r.shared) for r in probe.measure(given)]


# ---------------------------------------------------------------- area


def test_area_is_the_trapezoid_rule_over_the_unit_interval():
    scores = draw(3, 2, 8)
    expected = np.trapezoid(scores.double().numpy(), dx=1 / 7, axis=-1)
    assert np.allclose(auc(scores).numpy(), expected, atol=1e-12)
    assert auc(torch.tensor([1.0, 0.0])).item() == 0.5


# ---------------------------------------------------------------- perturbed images


@pytest.mark.parametrize("kinds", [("black", "blur"), ("mean", "noise"), ("inpaint", "road")])
@pytest.mark.parametrize("step", [1, 7, 50, 98, 99, 500])
def test_each_step_moves_the_next_pixels_of_the_ranking(kinds, step):
    image, grey = draw(3, *SIZE, seed=1), ranks(2)[0] / 98
    probe = InsertionDeletionMetric(
        step, deletion_fill=kinds[0], insertion_fill=kinds[1], mean=MEAN
    )
    asked = requests(probe, sample(image, grey))
    count = math.ceil(99 / step)
    by_key = {name: [i for key, i, _ in asked if key == name] for name in ("deletion", "insertion")}
    assert [len(images) for images in by_key.values()] == [count, count]
    rank = 98 - ranks(2)[0, 0].long()  # 0 for the largest value
    for t, (deleted, inserted) in enumerate(zip(*by_key.values(), strict=True)):
        gone, there = rank < (t + 1) * step, rank < t * step
        assert torch.equal(deleted[:, ~gone], image[:, ~gone])
        assert (deleted[:, gone] != image[:, gone]).any(0).all()
        assert torch.equal(inserted[:, there], image[:, there])
        assert (inserted[:, ~there] != image[:, ~there]).any(0).all()


def test_fills_are_those_asked_for():
    image, grey = draw(3, *SIZE, seed=1), ranks(2)[0] / 98
    for kind, colour in (("black", (0.0, 0.0, 0.0)), ("mean", MEAN)):
        probe = InsertionDeletionMetric(deletion_fill=kind, insertion_fill=kind, mean=MEAN)
        asked = requests(probe, sample(image, grey))
        flat = torch.tensor(colour)[:, None, None].expand_as(image)
        count = len(asked) // 2
        assert torch.equal(asked[count - 1][1], flat)  # deletion ends
        assert torch.equal(asked[count][1], flat)  # insertion starts
    image = draw(3, 64, 70)
    probe = InsertionDeletionMetric(steps=1)
    blurred = requests(probe, sample(image, ranks(2, (64, 70))[0] / 4479))[1][1]
    assert torch.equal(blurred, fill(image, torch.ones(1, 64, 70, dtype=torch.bool), "blur"))
    assert blurred.std() < 0.5 * image.std()


@pytest.mark.parametrize("kind", ["inpaint", "road"])
def test_where_nothing_remains_estimates_are_the_mean_colour_of_the_image(kind):
    image, grey = draw(3, *SIZE, seed=1), ranks(2)[0] / 98
    probe = InsertionDeletionMetric(40, deletion_fill=kind, insertion_fill=kind)
    asked = requests(probe, sample(image, grey))
    for _, blank, shared in (asked[2], asked[3]):
        assert shared
        assert torch.equal(blank, image.mean((1, 2), keepdim=True).expand_as(image))


def test_only_the_fills_alone_can_be_shared_with_other_maps():
    asked = requests(InsertionDeletionMetric(10), sample(draw(3, *SIZE), ranks()[0] / 98))
    assert [(t, key) for t, (key, _, shared) in enumerate(asked) if shared] == [
        (9, "deletion"),
        (10, "insertion"),
    ]


def test_ties_go_in_row_major_order():
    image, grey = torch.ones(3, 4, 4), torch.zeros(1, 4, 4)
    grey[0, 2] = 1
    asked = requests(InsertionDeletionMetric(2), sample(image, grey))
    gone = [(black[0] == 0).flatten().nonzero().flatten().tolist() for _, black, _ in asked[:4]]
    assert gone == [[8, 9], [8, 9, 10, 11], [0, 1, 8, 9, 10, 11], [0, 1, 2, 3, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("size", "steps", "count"),
    [((224, 224), 56, 56), (SIZE, 56, 50), (SIZE, 1, 1), (SIZE, 999, 99)],
)
def test_steps_are_rounded_up_to_whole_pixels(size, steps, count):
    asked = InsertionDeletionMetric(steps=steps).measure(
        sample(torch.ones(3, *size), ranks(size=size)[0])
    )
    assert sum(request.key == "deletion" for request in asked) == count


# ---------------------------------------------------------------- values


def test_values_are_those_of_the_definition():
    image, grey, f = draw(1, 3, *SIZE), ranks(3), softmax_of(1, 0.3)
    got = measure(InsertionDeletionMetric(10, insertion_fill="mean", mean=MEAN), f, image, grey, 1)
    order = np.argsort(-grey.numpy().ravel())
    mean = torch.tensor(MEAN)[:, None]
    for column, start, end in (
        (DELETION, image[0].flatten(1), torch.zeros(3, 1)),
        (INSERTION, mean.expand(3, 99), image[0].flatten(1)),
    ):
        scores = []
        for t in range(11):
            x = start.clone()
            x[:, order[: 10 * t]] = end.expand(3, 99)[:, order[: 10 * t]]
            scores.append(f(x.view(1, 3, *SIZE)).softmax(1)[0, 1].item())
        area = (sum(scores) - scores[0] / 2 - scores[-1] / 2) / 10
        assert got[column].item() == pytest.approx(area, abs=1e-6)


def test_curves_start_and_end_with_the_clean_score():
    image, grey, f = draw(3, *SIZE), ranks(3)[0] / 98, softmax_of(1, 0.3)
    clean = f(image[None])[0, 0].item()
    probe = InsertionDeletionMetric(10)
    generator, scores = probe.measure(sample(image, grey, clean)), {"deletion": [], "insertion": []}
    while True:
        try:
            key, perturbed, *_ = next(generator)
        except StopIteration as stop:
            finish = stop.value
            break
        scores[key].append(f(perturbed[None])[0, 0].item())
    tensors = {key: torch.tensor(row, dtype=torch.float64) for key, row in scores.items()}
    both = curves(tensors, clean)
    assert [len(curve) for curve in both.values()] == [11, 11]
    assert both["deletion"][0].item() == both["insertion"][-1].item() == clean
    assert both["deletion"][-1].item() == 0  # the logit of black
    assert finish(tensors) == {Column(key): auc(curve).item() for key, curve in both.items()}


@pytest.mark.parametrize("step", [1, 3, 11, 33])
def test_equal_contributions_give_the_mean_of_both_ends(step):
    image = torch.full((1, 3, *SIZE), 0.25)
    f = linear(torch.full((3, *SIZE), 2.0))
    probe = InsertionDeletionMetric(step, insertion_fill="mean", mean=(1.0, 0.0, 0.5))
    got = measure(probe, f, image, ranks(4), 0, score="logit")
    clean, start = 99 * 3 * 0.25 * 2, 99 * 1.5 * 2
    assert got[DELETION].item() == pytest.approx(clean / 2, rel=1e-6)
    assert got[INSERTION].item() == pytest.approx((start + clean) / 2, rel=1e-6)


@settings(max_examples=25)
@given(SEEDS, st.integers(1, 20))
def test_no_order_beats_the_contributions_of_an_additive_model(seed, step):
    weight = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(seed))
    image = draw(1, 3, *SIZE, seed=seed + 1)
    contributions = (weight * image).sum(1, keepdim=True)
    maps = torch.cat([contributions, ranks(seed), -contributions])
    probe = InsertionDeletionMetric(step, insertion_fill="black")
    got = measure(probe, linear(weight), image.expand(3, -1, -1, -1), maps, 0, score="logit")
    best, other, worst = got[DELETION].tolist()
    assert best - 1e-6 <= other <= worst + 1e-6
    best, other, worst = got[INSERTION].tolist()
    assert best + 1e-6 >= other >= worst - 1e-6


# ---------------------------------------------------------------- options


def test_a_columns_options_are_those_it_depends_on():
    probe = create_metric("insertion-deletion", mean=MEAN, step=224)
    assert probe.column_options(DELETION) == {"step": 224, "fill": "black"}
    probe = create_metric("insertion-deletion", mean=MEAN, insertion_fill="mean")
    assert probe.column_options(INSERTION) == {"steps": 56, "fill": "mean", "mean": list(MEAN)}
