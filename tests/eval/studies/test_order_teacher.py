"""The order teacher: tokens really left out, and weights that a linear network gives back."""

import pytest
import torch
from small_transformers import photos, tiny

from xattn.eval.studies.dropped_tokens import DroppedTokens, area
from xattn.eval.studies.order_teacher import Teacher, has_paley, paley, ridge_weights


def dropped(grid=(6, 6), cells=3, **options):
    return DroppedTokens(tiny(grid=grid, **options), cells)


@pytest.mark.parametrize("variant", ["class", "registers", "none", "average"])
def test_with_every_cell_kept_logits_are_the_networks_own(variant):
    drop = DroppedTokens(tiny(variant, grid=(6, 6)), 3)
    x = photos(drop.backbone, dtype=torch.float32)
    tokens, logits = drop.embedded(x)
    torch.testing.assert_close(logits, drop.backbone.logits(x))
    every = torch.arange(9).flip(0).expand(2, -1)
    torch.testing.assert_close(drop.logits(tokens, every), logits, rtol=1e-4, atol=1e-5)
    assert not any(block._forward_pre_hooks for block in drop.model.blocks)


def test_a_cell_that_is_left_out_does_not_matter_and_one_that_is_kept_does():
    drop = dropped()
    x = photos(drop.backbone, dtype=torch.float32)
    other = x.clone()
    other[:, :, 8:16, 16:] = 0  # the cell in row 1, column 2: 2 x 2 tokens of 4 pixels
    a, b = (drop.embedded(images)[0] for images in (x, other))
    without = torch.tensor([[0, 4, 8], [7, 6, 3]])
    assert torch.equal(drop.logits(a, without), drop.logits(b, without))
    assert not torch.allclose(
        drop.logits(a, torch.tensor([[0, 5], [5, 1]])),
        drop.logits(b, torch.tensor([[0, 5], [5, 1]])),
    )


def test_curves_begin_and_end_with_nothing_and_everything():
    drop = dropped()
    tokens, logits = drop.embedded(photos(drop.backbone, dtype=torch.float32))
    classes = logits.argmax(1)
    orders = torch.stack([torch.randperm(9), torch.randperm(9)])
    found = drop.curves(tokens, orders, classes, (0, 4, 9))
    p = logits.double().softmax(1).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(found.kept[:, -1], p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.left[:, 0], p, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.kept[:, 0], found.left[:, -1]) and found.same[:, -1].all()
    alone = drop.curves(tokens[1:], orders[1:], classes[1:], (0, 4, 9))
    torch.testing.assert_close(found.kept[1:], alone.kept, rtol=1e-5, atol=1e-7)
    assert float(area(torch.tensor([0.0, 0.5, 1.0]), (0, 2, 4))) == 0.5
    assert float(area(torch.tensor([0.0, 1.0, 1.0]), (0, 1, 4))) == 0.875


@pytest.mark.parametrize(("design", "passes"), [("balanced", 24), ("random", 60)])
def test_a_network_that_adds_up_its_cells_is_found_out(monkeypatch, design, passes):
    drop = dropped()
    shares = torch.arange(9.0).roll(4)

    def logits(tokens, kept):
        score = shares[kept].sum(1) + 3.0
        return torch.stack([score, torch.zeros_like(score)], 1)

    monkeypatch.setattr(drop, "logits", logits)
    found = Teacher(drop, passes, 1e-6, design).weights(torch.zeros(1, 37, 16), 0, 0)
    # The logit less the mean logit is half the score, and a cell that is kept changes z by 2.
    torch.testing.assert_close(found["logit"], (shares / 4).double(), rtol=1e-4, atol=1e-4)


def test_balanced_halves_are_orthogonal_and_random_ones_keep_half():
    teacher = Teacher(dropped(), 24)
    z = teacher.halves(3)
    assert torch.equal(z.mT @ z, 12 * torch.eye(9, dtype=z.dtype))
    assert not torch.equal(z, teacher.halves(4))
    random = Teacher(dropped(), 14, design="random").halves(3)
    assert (random.sum(1) == 1).all() and len(random.unique(dim=0)) > 4
    assert torch.equal(paley(60) @ paley(60).mT, 60 * torch.eye(60, dtype=z.dtype))
    assert has_paley(12) and not has_paley(16) and not has_paley(10)


def test_products_of_two_cells_leave_no_trace_in_antithetic_differences():
    z = torch.randint(0, 2, (40, 7), generator=torch.Generator().manual_seed(0)).double() * 2 - 1

    def y(x):
        return x @ torch.arange(7.0).double() + 9 * x[:, 0] * x[:, 3] + 5

    found = ridge_weights(z, (y(z) - y(-z)) / 2, 1e-9)
    torch.testing.assert_close(found, torch.arange(7.0).double(), atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cells: got 4; give a divisor of the grid, 6 x 6 tokens"):
        dropped(cells=4)
    for grid in ((6, 4), (4, 6)):
        with pytest.raises(ValueError, match="cells: got 3"):
            dropped(grid)
    with pytest.raises(
        ValueError, match="passes: got 32; balanced halves of 9 cells .* such as 24"
    ):
        Teacher(dropped(), 32)
