"""The objective of outcomes: a correlation that neither constants nor areas change."""

from __future__ import annotations

import pytest
import torch

from xattn.training.objectives.outcomes import area_adjusted, correlation, reacts_to_masks
from xattn.training.outcomes import log_odds


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(batch, count, side, seed=0):
    """``count`` random masks and their complements, (B, 2 count, side, side)."""
    kept = (
        rand(batch, count, side, side, seed=seed) < rand(batch, count, 1, 1, seed=seed + 1)
    ).double()
    return torch.cat([kept, 1 - kept], 1)


def test_it_is_the_correlation_of_what_regression_on_the_area_leaves():
    maps, masks, outcomes = rand(2, 3, 5, 5), pairs(2, 6, 5), rand(2, 3, 12, seed=2)
    found = correlation(maps, masks, outcomes)
    for b in range(2):
        known = torch.stack([torch.ones(12).double(), masks[b].mean((1, 2))], 1)
        for k in range(3):
            effects = (maps[b, k] * masks[b]).sum((1, 2))
            x, y = (
                v - known @ torch.linalg.lstsq(known, v).solution for v in (effects, outcomes[b, k])
            )
            torch.testing.assert_close(found[b, k], x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("scale", [1, 30])
def test_constants_and_multiples_of_the_area_change_nothing(scale):
    maps, masks, outcomes = rand(2, 3, 5, 5), pairs(2, 6, 5), rand(2, 3, 12, seed=2)
    maps.requires_grad_()
    expected = correlation(maps, masks, outcomes)
    area = masks.mean((2, 3))[:, None]
    changed = scale * (outcomes + 4 - 7 * area)
    torch.testing.assert_close(correlation(maps, masks, changed), expected)
    torch.testing.assert_close(correlation(scale * maps + 3, masks, outcomes), expected)
    gradients = [
        torch.autograd.grad(correlation(maps, masks, y).sum(), maps)[0] for y in (outcomes, changed)
    ]
    torch.testing.assert_close(*gradients)


def test_the_gradient_is_the_same_whichever_of_two_complements_comes_first():
    maps, masks, outcomes = rand(2, 3, 5, 5), pairs(2, 6, 5), rand(2, 3, 12, seed=2)
    maps.requires_grad_()
    swapped = torch.arange(12).view(2, 6).flip(0).flatten()
    one = torch.autograd.grad(correlation(maps, masks, outcomes).sum(), maps)[0]
    other = correlation(maps, masks[:, swapped], outcomes[:, :, swapped]).sum()
    torch.testing.assert_close(torch.autograd.grad(other, maps)[0], one)


def test_gradients():
    maps, masks, outcomes = rand(1, 2, 3, 4), pairs(1, 4, 3)[..., :3], rand(1, 2, 8, seed=2)
    masks = torch.cat([masks, masks[..., :1]], 3)
    assert torch.autograd.gradcheck(
        lambda m: correlation(m, masks, outcomes), maps.requires_grad_()
    )


def test_a_free_map_recovers_what_is_additive_in_cells():
    """From 200 masks, 25 weights up to a constant."""
    weights, masks = rand(1, 1, 5, 5, seed=7), pairs(1, 100, 5)
    outcomes = 3 + 2 * torch.einsum("bnhw,bmhw->bmn", masks, weights)
    maps = rand(1, 1, 5, 5, seed=8).requires_grad_()
    optimizer = torch.optim.LBFGS([maps], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = 1 - correlation(maps, masks, outcomes).mean()
        value.backward()
        return value

    optimizer.step(loss)
    found = torch.corrcoef(torch.stack([maps.detach().flatten(), weights.flatten()]))[0, 1]
    assert found > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 2.0, 1e5])
def test_what_does_not_vary_has_no_correlation_and_a_bounded_gradient(dtype, value):
    masks = pairs(1, 16, 28).to(dtype)
    flat = torch.full((1, 1, 28, 28), value, dtype=dtype, requires_grad=True)
    found = correlation(flat, masks, rand(1, 1, 32).to(dtype))
    found.sum().backward()
    assert found.abs() < 0.2
    bound = masks.flatten(2).norm(dim=2).max() / torch.finfo(dtype).eps
    assert (flat.grad != 0).any() and flat.grad.norm() < bound
    area = masks.mean((2, 3))[:, None]
    for outcomes in (torch.full_like(area, value), value * (3 - area)):
        assert correlation(rand(1, 1, 28, 28).to(dtype), masks, outcomes) == 0


def test_outcomes_react_if_more_than_the_area_moves_them():
    masks = pairs(1, 6, 5)
    area = masks.mean((2, 3))[:, None]
    one = (rand(1, 1, 5, 5) * masks).sum((2, 3))[:, None]
    outcomes = torch.cat([torch.full_like(area, 5.0), 3 - 2 * area, one], 1)
    assert reacts_to_masks(masks, outcomes).tolist() == [[False, False, True]]
    assert reacts_to_masks(masks.float(), outcomes.float()).tolist() == [[False, False, True]]


def test_adjusting_takes_the_mean_and_the_area_out():
    values, area = rand(3, 9), rand(3, 9, seed=1)
    left = area_adjusted(values, area)
    torch.testing.assert_close(left.sum(1), torch.zeros(3).double())
    torch.testing.assert_close((left * area).sum(1), torch.zeros(3).double())


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_log_odds_are_those_of_the_probabilities(task):
    logits, index = rand(4, 6) * 5, torch.tensor([[1, 0], [5, 5], [2, 3], [0, 4]])
    p = logits.sigmoid() if task == "multilabel" else logits.softmax(1)
    expected = torch.logit(p).gather(1, index)
    torch.testing.assert_close(log_odds(logits, index, task), expected)
