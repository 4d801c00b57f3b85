"""The pointer head: Plackett-Luce without memory, orders with an end, and its start as a class map."""

import pytest
import torch
from plackett_luce import plackett_luce
from small_transformers import photos, tiny

from xattn.backbone import load_backbone
from xattn.heads import create_head, load_head, save_head
from xattn.heads.class_reading import class_reading
from xattn.heads.pointer import Pointing, rank_values


@pytest.fixture(scope="module")
def backbone():
    return tiny(grid=(6, 4), depth=4)


@pytest.fixture(scope="module")
def taps(backbone):
    with torch.no_grad():
        return backbone(photos(backbone, 3, torch.float32))


def trained(backbone, seed=0, **options):
    """As if it were: all weights random."""
    head = create_head("pointer", backbone, **{"cells": 3, "width": 8, **options}).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head


def some_orders(count, length, seed=0):
    torch.manual_seed(seed)
    return torch.stack([torch.randperm(length) for _ in range(count)])


def test_untrained_it_is_the_order_of_the_class_map(backbone, taps):
    head = create_head("pointer", backbone, cells=3)
    index = torch.tensor([[1, 4], [0, 3], [6, 2]])
    maps = class_reading(backbone)(taps, index, "multiclass")
    contrast = torch.nn.functional.adaptive_avg_pool2d(maps.own - maps.others, 3).flatten(2)
    scores = head(taps, index)
    assert scores.shape == (3, 2, 3, 3)
    torch.testing.assert_close(scores.flatten(2), 2 * rank_values(contrast), atol=1e-5, rtol=0)
    order = head.orders(head.read(taps, index))
    cells = order[order != 9].view(3, 2, 9)
    assert torch.equal(cells, contrast.argsort(dim=-1, descending=True))


def test_without_memory_likelihoods_are_those_of_plackett_and_luce(backbone, taps):
    head, orders = trained(backbone), some_orders(6, 10)
    cells = head.read(taps, torch.tensor([[1, 4], [0, 3], [6, 2]]))
    found = head.log_likelihood(cells, orders)
    scores = head.scores(cells).flatten(0, 1)
    torch.testing.assert_close(found.sum(1), plackett_luce(scores, orders), atol=1e-5, rtol=1e-6)
    remembering = trained(backbone, memory=True)
    found = remembering.log_likelihood(remembering.read(taps), some_orders(21, 10))
    other = plackett_luce(
        remembering.scores(remembering.read(taps)).flatten(0, 1), some_orders(21, 10)
    )
    assert (found.sum(1) - other).abs().max() > 1e-3


@pytest.mark.parametrize("memory", [False, True])
def test_the_order_takes_the_likeliest_of_every_step(backbone, taps, memory):
    head = trained(backbone, memory=memory)
    cells = head.read(taps, torch.tensor([[1, 4], [0, 3], [6, 2]]))
    orders = head.orders(cells)
    assert torch.equal(orders.sort(-1).values, torch.arange(10).expand(3, 2, -1))
    own = head.log_likelihood(cells, orders.flatten(0, 1))
    for step in range(9):  # no other element at a step is likelier
        for other in range(step + 1, 10):
            swapped = orders.clone()
            swapped[..., [step, other]] = swapped[..., [other, step]]
            found = head.log_likelihood(cells, swapped.flatten(0, 1))
            assert (found[:, step] <= own[:, step] + 1e-5).all()
    place = orders.argsort(-1)
    maps = head(taps, torch.tensor([[1, 4], [0, 3], [6, 2]])).flatten(2)
    before = place[..., :-1] < place[..., -1:]
    assert torch.equal(maps > 0, before)
    assert torch.equal(maps.argsort(dim=-1, descending=True), orders[orders != 9].view(3, 2, 9))


def test_maps_depend_on_the_class_and_not_on_the_batch(backbone, taps):
    head = trained(backbone)
    every = head(taps)
    assert every.shape == (3, 7, 3, 3)
    torch.testing.assert_close(
        head(taps, torch.tensor([2, 5, 0]))[:, 0], every[range(3), [2, 5, 0]]
    )
    assert (every[:, 0] - every[:, 1]).abs().max() > 1e-3
    with torch.no_grad():
        alone = backbone(photos(backbone, 3, torch.float32)[1:2])
    torch.testing.assert_close(head(alone), every[1:2], atol=1e-4, rtol=1e-4)


def test_other_grids_and_networks(tmp_path, backbone, taps):
    torch.manual_seed(0)
    cnn = load_backbone("test_efficientnet", weights=None, input_size=64, num_classes=7)
    head = trained(cnn, cells=7)
    found = head(cnn(torch.rand(2, 3, 64, 64)), 3)
    assert found.shape[:2] == (2, 1) and max(found.shape[2:]) <= 7
    larger = create_head("pointer", backbone, cells=7, layers=0)
    assert larger(taps, 0).shape == (3, 1, 6, 4)
    head = trained(backbone, memory=True, explain_with="mask")
    again = load_head(save_head(head, tmp_path / "head"), backbone)
    torch.testing.assert_close(again.explanation(taps, 1), head.explanation(taps, 1))


@pytest.mark.parametrize("width", [64, 4096])
def test_pointing_starts_with_scores_of_one_size_at_every_width(width):
    assert Pointing(width).v.detach().norm() == pytest.approx(
        1, abs=0.3
    )  # |v . tanh| <= sqrt(C) |v|


def test_equal_values_share_a_rank():
    assert rank_values(torch.tensor([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]])).tolist() == [
        [1, -0.5, -0.5],
        [0, 0, 0],
    ]
    assert rank_values(torch.tensor([[4.0]])).tolist() == [[0.0]]


def test_what_does_not_fit_is_refused(backbone, taps):
    with pytest.raises(ValueError, match="cells"):
        create_head("pointer", backbone, cells=0)
    with pytest.raises(ValueError, match="layers: got -1"):
        create_head("pointer", backbone, layers=-1)
    with pytest.raises(ValueError, match="memory: got true; a mask cannot train an order"):
        trained(backbone, memory=True).train()(taps)
    with pytest.raises(ValueError, match="head: pointer needs the classifier's rows"):
        create_head("pointer", tiny("pool"))
