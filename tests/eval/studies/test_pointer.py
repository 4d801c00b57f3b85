"""Pointer networks: limit cases of the distribution, of search, and of encoders."""

import itertools
import math

import pytest
import torch
from plackett_luce import plackett_luce

from xattn.eval.studies.models.point_sets import PointerNet
from xattn.heads.pointer import Pointing, remaining_elements


def network(seed=0, **options):
    torch.manual_seed(seed)
    net = PointerNet(**{"width": 12, "layers": 2, "heads": 2, **options}).eval()
    with torch.no_grad():
        net.pointing.v.mul_(4)  # far from uniform
    return net


def points(count=5, batch=3, seed=1):
    return torch.rand(batch, count, 2, generator=torch.Generator().manual_seed(seed))


ANSWERS = torch.tensor([[2, 0, 4, -1], [1, 3, 0, 2], [4, 3, -1, -1]])


@pytest.mark.parametrize("encoder", ["set", "lstm"])
@pytest.mark.parametrize("end", [True, False])
def test_a_distribution_over_what_was_not_visited(encoder, end):
    net = network(encoder=encoder, end=end)
    for count in (1, 2, 5, 13):  # any number of points, whatever others it saw
        orders = torch.stack([torch.randperm(count) for _ in range(3)])
        p = net(points(count), orders).exp()
        assert p.shape == (3, count + end, count + end)
        torch.testing.assert_close(p.sum(-1), torch.ones(3, count + end))
        for step in range(1, count + end):
            visited = orders[:, :step]
            assert (p[:, step].gather(1, visited) == 0).all()
    again = network(revisit=True)(points(), ANSWERS).exp()
    assert (again > 0).all()


def test_all_steps_at_once_are_the_steps_one_after_the_other():
    net = network()
    x, orders = points(), torch.stack([torch.randperm(5) for _ in range(3)])
    together = net(x, orders)
    for step in range(6):
        torch.testing.assert_close(net(x, orders[:, :step])[:, step], together[:, step])
    torch.testing.assert_close(together[1:2], net(x[1:2], orders[1:2]))  # whatever the batch


def test_likelihoods_of_all_answers_sum_to_one():
    net = network()
    x = points(3, 1)
    total = 0.0
    for length in range(4):
        for order in itertools.permutations(range(3), length):
            answer = torch.full((1, 3), -1)
            answer[0, :length] = torch.tensor(order, dtype=torch.long)
            total += float(net.log_likelihood(x, answer).exp().detach())
    assert math.isclose(total, 1, rel_tol=1e-5)


def test_a_pointer_without_memory_is_plackett_luce():
    net = network(memory=False, end=False).double()
    x = points().double()
    orders = torch.stack(
        [torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    e, state = net.encoded(x)
    scores = net.pointing(e, state[0][0][:, None])[:, 0]
    found = net.log_likelihood(x, orders)
    torch.testing.assert_close(found, plackett_luce(scores, orders), atol=1e-6, rtol=0)
    remembering = network(end=False).double().log_likelihood(x, orders)
    assert (remembering - found).abs().max() > 1e-3
    by_hand = torch.zeros(3).double()
    for step in range(5):
        left = scores.gather(1, orders[:, step:])
        by_hand += left[:, 0] - left.logsumexp(1)
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=0)
    best = net.answers(x)
    assert torch.equal(best, scores.argsort(1, descending=True))


def test_a_set_encoder_is_equivariant_and_an_lstm_is_not():
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    x = points()
    moved = torch.where(ANSWERS < 0, ANSWERS, place[ANSWERS.clamp_min(0)])
    columns = torch.cat([order, torch.tensor([5])])
    for encoder, equal in (("set", True), ("lstm", False)):
        net = network(encoder=encoder)
        a, b = net(x, ANSWERS).exp()[..., columns], net(x[:, order], moved).exp()
        assert (float((a - b).abs().max().detach()) < 1e-5) == equal
    found = network().answers(x)
    again = network().answers(x[:, order])
    assert torch.equal(again, torch.where(found < 0, -1, place[found.clamp_min(0)]))


@pytest.mark.parametrize("options", [{}, {"end": False}, {"revisit": True}, {"memory": False}])
def test_a_beam_as_wide_as_all_answers_finds_the_likeliest(options):
    net = network(seed=3, **options)
    x = points(3)
    longest = 2 if options.get("revisit") else 3
    values, answers = [], []
    draws = itertools.product if options.get("revisit") else itertools.permutations
    lengths = [3] if options.get("end") is False else range(longest + 1)
    for length in lengths:
        argument = {"repeat": length} if options.get("revisit") else {"r": length}
        for order in draws(range(3), **argument):
            answer = torch.full((3, longest), -1)
            answer[:, :length] = torch.tensor(order, dtype=torch.long)
            log_p = net(x, answer)
            steps = net.steps(answer)
            target = torch.where(steps == -2, 3, steps)[:, :longest]
            own = log_p[:, :longest].gather(2, target.clamp_min(0)[..., None])[..., 0]
            values.append(torch.where(target < 0, 0, own).sum(1).detach())
            answers.append(answer)
    best = torch.stack(values).argmax(0)
    expected = torch.stack(answers)[best, torch.arange(3)]
    found = net.answers(x, beam=60, longest=longest)
    found = torch.nn.functional.pad(found, (0, longest - found.shape[1]), value=-1)
    assert torch.equal(found, expected)


def test_answers_do_not_depend_on_the_batch_and_one_sequence_is_greedy():
    net = network(seed=5, revisit=True)
    x = points(4, 6)
    found = net.answers(x, beam=3)
    for i in range(6):
        alone = net.answers(x[i : i + 1], beam=3)[0]
        assert [k for k in alone.tolist() if k >= 0] == [k for k in found[i].tolist() if k >= 0]
    net = network(seed=5)
    greedy = net.answers(x)
    p = net(x, greedy)
    steps = net.steps(greedy)
    target = torch.where(steps == -2, 4, steps)
    assert (p.argmax(-1) == target)[target >= 0].all()
    net = network(end=False)
    assert net.answers(points(9, 2)).sort(1).values.tolist() == [[*range(9)]] * 2
    assert net.answers(points(30, 2), longest=11).shape == (2, 11)


def test_it_learns_to_sort():
    torch.manual_seed(0)
    net = PointerNet(16, 1, 2, end=False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(80):
        x = points(4, 32, step)
        loss = net.loss(x, x[..., 0].argsort(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = points(4, 100, 999)
    right = (net.eval().answers(x) == x[..., 0].argsort(1)).all(1).float().mean()
    assert right > 0.6
    assert math.isclose(
        float(net.loss(x, x[..., 0].argsort(1)).detach()),
        -float(net.log_likelihood(x, x[..., 0].argsort(1)).mean().detach()) / 4,
        rel_tol=1e-5,
    )


def test_scores_in_parts_are_scores_at_once(monkeypatch):
    torch.manual_seed(0)
    pointing, e, d = Pointing(6), torch.rand(2, 5, 6), torch.rand(2, 7, 6)
    whole = pointing(e, d)
    monkeypatch.setattr("xattn.heads.pointer.LARGEST", 1)
    torch.testing.assert_close(pointing(e, d), whole)
    keys, queries = pointing.of_elements(e), pointing.of_queries(d)
    by_hand = torch.stack([(keys[:, j, None] + queries).tanh() @ pointing.v for j in range(5)], 2)
    torch.testing.assert_close(whole, by_hand)
    assert remaining_elements(torch.tensor([[1, -1, 0]]), 3).tolist() == [
        [[True, True, True], [True, False, True], [True, False, True]]
    ]


def test_what_does_not_fit_is_refused():
    for options, words in (({"layers": 0}, "layers: got 0"),):
        with pytest.raises(ValueError, match=words):
            network(**options)
    with pytest.raises(ValueError, match="beam: got 0"):
        network().answers(points(), beam=0)
