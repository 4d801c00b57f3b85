"""Tasks of the length study: their questions have the answers that are given, and nothing gives them away."""

import pytest
import torch

from xattn.eval.studies.length.network import FIXED, GROWING, Recall, Regression

RECALL = Recall(pairs=3, per=32, keys=40, values=5, fillers=7)


@pytest.mark.parametrize(
    ("length", "form", "pairs"), [(32, FIXED, 3), (64, FIXED, 3), (97, GROWING, 9)]
)
def test_a_query_is_answered_by_the_value_that_followed_its_key(length, form, pairs):
    batch = RECALL.draw(length, 11, 4, form)
    assert batch.tokens.shape == (11, length) and batch.targets.shape == (11, pairs)
    for tokens, asked, targets in zip(*(x.tolist() for x in batch), strict=True):
        queries = [i for i in range(length) if asked[i]]
        assert len(queries) == pairs and queries[0] >= length // 2
        assert len({tokens[i] for i in queries}) == pairs
        for i, target in zip(queries, targets, strict=True):
            first = tokens.index(tokens[i])
            assert first < length // 2 and tokens[first + 1] == RECALL.keys + target
            assert tokens.count(tokens[i]) == 2  # the pair and the query


def test_no_value_is_written_in_the_half_that_asks_and_all_else_is_filler():
    batch = RECALL.draw(80, 200, 1)
    values = (batch.tokens >= RECALL.keys) & (batch.tokens < RECALL.keys + RECALL.values)
    keys = batch.tokens < RECALL.keys
    assert not values[:, 40:].any() and (values.sum(1) == 3).all() and (keys.sum(1) == 6).all()
    assert torch.equal(keys[:, 40:], batch.asked[:, 40:])
    counts = batch.targets.flatten().bincount(minlength=RECALL.values).double()
    assert (counts / counts.sum() - 1 / RECALL.values).abs().max() < 0.06
    assert RECALL.baselines(batch) == {"chance": 1 / RECALL.values}


@pytest.mark.parametrize("task", [RECALL, Regression(width=3)], ids=lambda task: task.name)
def test_sequences_are_a_pure_function_of_the_seed(task):
    torch.manual_seed(0)
    first, same, other = task.draw(32, 4, 5), task.draw(32, 4, 5), task.draw(32, 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first.tokens, other.tokens)


def test_scores_of_recall_are_shares_of_right_answers():
    targets = torch.tensor([[0, 3], [2, 2]])
    found = torch.nn.functional.one_hot(torch.tensor([[0, 3], [2, 1]]), 5).double()
    assert RECALL.scores(found, targets).tolist() == [1.0, 0.5]
    assert RECALL.loss(100 * found[:1], targets[:1]) < 1e-6


def test_y_follows_its_x_and_is_linear_in_it():
    task = Regression(width=3, noise=0.0)
    batch = task.draw(40, 6, 2)
    x, y = batch.tokens[:, ::2], batch.tokens[:, 1::2]
    assert (x[..., 3:] == 0).all() and (y[..., :3] == 0).all() and (y[..., 4] == 1).all()
    assert torch.equal(batch.asked, (torch.arange(40) % 2 == 0).expand(6, -1))
    assert torch.equal(batch.targets, y[..., 3])
    for points, values in zip(x[..., :3], batch.targets, strict=True):
        fit = torch.linalg.lstsq(points, values[:, None]).solution
        torch.testing.assert_close(points @ fit, values[:, None], rtol=1e-4, atol=1e-4)


def test_a_test_asks_the_last_for_what_has_no_noise():
    task = Regression(width=3, noise=2.0, tested=5)
    test, training = task.draw_test(40, 500, 3), task.draw(40, 500, 3)
    assert torch.equal(test.tokens, training.tokens)
    assert test.asked.nonzero()[:5, 1].tolist() == [30, 32, 34, 36, 38]
    assert test.asked.sum(1).eq(5).all()
    noise = training.targets[:, -5:] - test.targets
    assert abs(noise.std() - 2) < 0.15 and abs(test.targets.std() - 1) < 0.1


def test_scores_of_regression_are_relative_to_the_mean():
    task = Regression(width=3)
    batch = task.draw_test(40, 9, 3)
    zero = torch.zeros(9, batch.targets.shape[1], 1)
    assert float(task.scores(zero, batch.targets).mean()) == pytest.approx(1)
    assert float(task.scores(batch.targets[..., None], batch.targets).sum()) == 0


def test_ridge_is_the_fit_to_all_earlier_examples():
    task = Regression(width=3, noise=0.5, tested=4)
    batch = task.draw_test(24, 50, 1)
    found = []
    for tokens in batch.tokens.double():
        x, y = tokens[::2, :3], tokens[1::2, 3]
        for i in range(8, 12):
            moment = x[:i].T @ x[:i] + 0.75 * torch.eye(3).double()
            found.append(x[i] @ torch.linalg.inv(moment) @ (x[:i].T @ y[:i]))
    own = torch.stack(found).view(50, 4, 1)
    baselines = task.baselines(batch)
    assert baselines["ridge"] == pytest.approx(float(task.scores(own, batch.targets).mean()))
    assert baselines["mean"] == 1 and 0 < baselines["ridge"] < 0.3
    long = task.baselines(task.draw_test(400, 50, 1))
    assert long["ridge"] < baselines["ridge"] / 3


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="pairs: got 3 for 8 tokens; give 1 to a quarter, 2"):
        RECALL.draw(8, 1, 0)
    with pytest.raises(ValueError, match="pairs: got 60 of 40 keys; give fewer"):
        RECALL.draw(640, 1, 0, GROWING)
    with pytest.raises(ValueError, match="lengths: got 7; give even numbers"):
        Regression().draw(7, 1, 0)
