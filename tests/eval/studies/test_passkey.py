"""The passkey study: its sequences, grouped softmax by the definition, reading in chunks, the command."""

import dataclasses

import pytest
import torch

from xattn.attention import create_mechanism
from xattn.attention.inputs import Inputs
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.passkey import (
    PasskeyConfig,
    Reader,
    best_blocks,
    draw,
    grouped_weights,
    no_blocks,
    predictions,
    random_blocks,
    stages,
    with_landmarks,
)

SMALL = PasskeyConfig().quick()


def test_the_key_stands_behind_its_only_marker_and_before_every_question():
    mark, ask = 2 * SMALL.symbols, 2 * SMALL.symbols + 1
    tokens, asked, keys = draw(40, 60, SMALL, 0, asks=3)
    place = (tokens == mark).nonzero()
    assert place[:, 0].tolist() == list(range(40))  # one in each
    assert torch.equal(tokens[torch.arange(40), place[:, 1] + 1], keys)
    assert ((tokens < SMALL.symbols).sum(1) == 1).all()  # the key is written once
    assert (tokens.gather(1, asked) == ask).all() and (asked[:, -1] == 59).all()
    assert (asked > place[:, 1:] + 1).all()
    assert place[:4, 1].max() < 6 and place[-4:, 1].min() >= 52  # all depths, in order
    assert torch.equal(draw(40, 60, SMALL, 0, asks=3).tokens, tokens)
    assert not torch.equal(draw(40, 60, SMALL, 1, asks=3).tokens, tokens)


def test_landmarks_stand_behind_every_block():
    tokens = torch.arange(8)[None]
    assert with_landmarks(tokens, 3, 9).tolist() == [[0, 1, 2, 9, 3, 4, 5, 9, 6, 7]]


@pytest.mark.parametrize("n", [7, 14, 31])
def test_grouped_softmax_is_that_of_the_mechanism(n):
    q, k, v = torch.randn(3, 2, 2, n, 8, dtype=torch.float64)
    weights = grouped_weights(q @ k.mT * 8**-0.5, torch.arange(n), 7)
    mechanism = create_mechanism("landmark", 16, 2, block=7, landmark="last").double()
    expected = mechanism.operator(Inputs(q, k, v, causal=True)).matvec(v)
    torch.testing.assert_close(weights @ v, expected)
    sums = weights.sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    rows = grouped_weights((q @ k.mT * 8**-0.5)[..., -3:, :], torch.arange(n - 3, n), 7)
    torch.testing.assert_close(rows, weights[..., -3:, :])


def test_one_block_is_softmax_without_its_landmark():
    scores = torch.randn(5, 5)
    weights = grouped_weights(scores, torch.arange(5), 5)
    seen = torch.ones(5, 5).tril().bool() & (torch.arange(5) != 4)
    torch.testing.assert_close(weights, scores.masked_fill(~seen, -torch.inf).softmax(-1))


def test_landmarks_that_score_as_their_blocks_give_dense_attention():
    scores = torch.randn(12, dtype=torch.float64)
    for mark in (3, 7):
        scores[mark] = scores[mark - 3 : mark].logsumexp(0)
    weights = grouped_weights(scores[None], torch.tensor([11 - 1]), 4)
    ordinary = torch.tensor([i for i in range(11) if i % 4 != 3])
    torch.testing.assert_close(weights[0, ordinary], scores[ordinary].softmax(0))


@pytest.mark.parametrize("choose", [best_blocks, random_blocks])
def test_reading_all_blocks_is_reading_the_whole_at_once(choose):
    """As many blocks as there are, and one chunk behind them: the places are those of the whole."""
    config = dataclasses.replace(SMALL, selected=2, chunk=2)
    net = Reader(config).eval()
    tokens, _, _ = draw(2, 23, config, 0)  # blocks of 6: two in the memory, two in the last chunk
    marked = with_landmarks(tokens, config.block, net.landmark)
    asked = torch.full((2, 1), marked.shape[1] - 1)
    whole = net.whole(marked, asked, grouped=True)[:, 0]
    torch.testing.assert_close(net.retrieving(marked, choose), whole)
    assert not torch.allclose(net.retrieving(marked, no_blocks), whole)


def test_the_best_blocks_are_those_whose_landmarks_a_query_weighs_most():
    q, k, marks = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 9, 2)
    q[0, 0, 2, 0] = 9.0
    marks[0, 0, 3, 0], marks[0, 0, 7, 0] = 3.0, 2.0
    assert set(best_blocks(q, k, marks, 2, 7)[0, 0].tolist()) == {3, 7}
    drawn = {tuple(sorted(random_blocks(q, k, marks, 2, 7)[0, 0].tolist())) for _ in range(50)}
    assert len(drawn) > 5 and all(len(set(pair)) == 2 for pair in drawn)


def test_the_window_sees_as_much_as_in_training_and_the_recurrence_one_segment_more():
    net = Reader(dataclasses.replace(SMALL, train_length=16)).eval()
    tokens, _, _ = draw(2, 64, net.config, 0)
    other = tokens.clone()
    other[:, :40] = (other[:, :40] + 1) % net.config.symbols
    assert torch.equal(predictions(net, "window", tokens), predictions(net, "window", other))
    asked = torch.full((2, 1), 63)
    near, far = tokens.clone(), tokens.clone()
    near[:, 44] = (near[:, 44] + 1) % 8  # two segments of 8 back, one for each layer
    far[:, 32] = (far[:, 32] + 1) % 8
    found = net.recurrent(tokens, asked)
    assert torch.equal(net.recurrent(far, asked), found)
    assert not torch.equal(net.recurrent(near, asked), found)


def test_sequences_grow_to_the_training_length():
    lengths = stages(PasskeyConfig(steps=10, stages=(0.5, 0.7)))
    assert lengths == [128] * 5 + [256] * 2 + [512] * 3


def test_the_command_prints_all_rows(tmp_path, capsys):
    assert main(["passkey", "--quick", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| landmarks, the best blocks |" in printed and "| Transformer-XL |" in printed
    assert "| chance | 12.5 | 12.5 |" in printed
    assert (tmp_path / "out" / "values.csv").is_file()
