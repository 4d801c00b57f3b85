"""Routers among heads: what they choose, count and settle on."""

import math

import pytest
import torch

from xattn.blocks.routing_usage import HeadRouter, usage_entropy


def tokens(batch=5, dim=6):
    return torch.randn(batch, 7, dim, generator=torch.Generator().manual_seed(0))


def router(heads=3, **options):
    torch.manual_seed(1)
    return HeadRouter(6, heads, **options)


def test_the_most_probable_head_is_chosen_with_gate_one_and_the_gradient_of_its_share():
    made, x = router(), tokens()
    choice = made(x)
    assert torch.equal(choice.chosen, choice.shares.argmax(1))
    assert torch.equal(choice.gate, torch.ones(5))
    assert torch.allclose(choice.shares.sum(1), torch.ones(5))
    choice.gate.sum().backward()
    found = made.linear.weight.grad.clone()
    made.zero_grad()
    made(x).shares.amax(1).sum().backward()
    assert torch.allclose(found, made.linear.weight.grad)


def test_usage_is_a_running_mean_that_sums_to_one_and_counts_in_training_alone():
    made, x = router(decay=0.5), tokens()
    share = torch.bincount(made(x).chosen, minlength=3) / 5
    assert torch.allclose(made.usage, 0.5 / 3 + 0.5 * share)
    before = made.usage.clone()
    made.eval()(x)
    assert torch.equal(made.usage, before)
    for _ in range(20):
        made.train()(x)
    assert torch.allclose(made.usage.sum(), torch.tensor(1.0))
    assert torch.allclose(made.usage, share, atol=1e-5)


def test_a_router_settles_on_the_most_used_head_or_on_a_given_one():
    made, x = router(), tokens()
    made.usage.copy_(torch.tensor([0.2, 0.3, 0.5]))
    assert made.settle() == 2
    choice = made(x)
    assert choice.chosen.tolist() == [2] * 5 and torch.equal(choice.gate, torch.ones(5))
    assert torch.equal(made.usage, torch.tensor([0.2, 0.3, 0.5]))
    assert made.settle(0) == 0 and made(x).chosen.tolist() == [0] * 5
    other = router()
    other.load_state_dict(made.state_dict())
    assert int(other.kept) == 0
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=f"head: got {wrong}; give 0 to 2"):
            made.settle(wrong)


def test_entropy_is_that_of_the_mean_over_images():
    one = torch.eye(4)
    assert float(usage_entropy(one)) == pytest.approx(math.log(4), abs=1e-6)
    assert float(usage_entropy(one[:1].expand(3, -1))) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(usage_entropy(one))


@pytest.mark.parametrize("options", [{"heads": 0}, {"decay": 1.0}, {"decay": -0.1}])
def test_what_is_no_router_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        router(**options)
