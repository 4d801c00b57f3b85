"""Masks in complementary pairs, their cells, and what hides behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xattn.training.outcome_rows import (
    CELLS,
    FILLS,
    KINDS,
    MaskSettings,
    mask_pairs,
    masks_of,
    replacement_pixels,
)

ALL_KINDS = (*KINDS, "superpixels")


def photo(height=56, width=84):
    coarse = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]


def guess():
    return torch.rand(7, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("fill", FILLS)
def test_a_pair_shows_each_pixel_once_and_what_is_behind_it_once(kind, fill):
    image = photo()
    found = mask_pairs(image, guess(), 3, "a", [kind], [fill])
    assert found.images.shape == (6, 3, 56, 84)
    kept, hidden = found.images.chunk(2)
    behind = replacement_pixels(image, fill)
    torch.testing.assert_close(kept + hidden, (image + behind).expand_as(kept))
    shown = ((kept - image).abs().amax(1) < 1e-6) | ((kept - behind).abs().amax(1) < 1e-6)
    assert shown.all()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_cells_hold_the_share_that_is_kept(kind):
    image = torch.full((3, 56, 84), 0.5)
    image[:, ::2] += 0.25 * photo()[:, ::2]  # superpixels need edges
    found = mask_pairs(image, guess(), 4, "b", [kind], ["black"])
    masks = masks_of(found.cells[None])[0]
    assert found.cells.dtype == torch.uint8 and masks.shape == (8, CELLS, CELLS)
    kept = (found.images / image).mean(1, keepdim=True)
    torch.testing.assert_close(F.adaptive_avg_pool2d(kept, CELLS)[:, 0], masks, atol=3e-3, rtol=0)
    torch.testing.assert_close(masks[:4] + masks[4:], torch.ones(4, CELLS, CELLS))


@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_picture_is_kept_and_some_hidden(kind):
    area = masks_of(mask_pairs(photo(), guess(), 12, "c", [kind]).cells[None])[0].mean((1, 2))
    assert 0 < area.min() and area.max() < 1 and area.std() > 0.1


@pytest.mark.parametrize(("kind", "side"), [("squares32", 4), ("squares16", 2)])
def test_squares_lie_on_a_grid_that_starts_anywhere(kind, side):
    cells = mask_pairs(photo(), guess(), 8, "d", [kind]).cells.float()
    starts = set()
    for mask in cells:
        for axis in (0, 1):
            edges = mask.diff(dim=axis).abs().amax(1 - axis).nonzero().flatten() + 1
            assert len(set((edges % side).tolist())) == 1
            starts.add(int(edges[0]) % side)
    assert len(starts) > 1


def test_masks_are_a_pure_function_of_the_seed():
    torch.manual_seed(5)
    first = mask_pairs(photo(), guess(), 8, "e", ALL_KINDS)
    state = torch.get_rng_state()
    again = mask_pairs(photo(), guess(), 8, "e", ALL_KINDS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first.cells, mask_pairs(photo(), guess(), 8, "f", ALL_KINDS).cells)


def test_evidence_masks_keep_what_the_guess_says():
    ramp = torch.linspace(0, 1, 28).expand(28, 28)
    cells = mask_pairs(photo(), 100 * ramp, 16, "g", ["evidence"]).cells.float() / 255
    assert (cells[..., 14:].mean((1, 2)) >= cells[..., :14].mean((1, 2))).all()


@pytest.mark.parametrize(("option", "value"), [("kinds", ["circles"]), ("fills", ["white"])])
def test_unknown_kinds_and_fills_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}: got .*; give a list of "):
        MaskSettings(**{option: value})
