"""The study of proposals of actions: metrics by hand, sequences, matching, attention in its limits, leaks."""

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import action_proposals
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.action_proposals import (
    PAIRS,
    Action,
    Proposal,
    ProposalStudyConfig,
    Proposer,
    Row,
    average_recall,
    mean_average_precision,
    propose,
    tiou,
)
from xattn.eval.studies.models import bmn
from xattn.eval.studies.models.action_sequences import LONGEST, Sequences, draw_sequences

SHORT = ProposalStudyConfig().quick()


def precision(found, there, classes=1, threshold=0.5):
    return mean_average_precision(found, there, classes, threshold)


# ---------------------------------------------------------------------- metrics


def test_tiou_is_shared_time_over_all():
    assert tiou(Action(0, 4, 0), Proposal(2, 6, 0, 1.0)) == 2 / 6
    assert tiou(Action(0, 4, 0), Proposal(0, 4, 1, 1.0)) == 1
    assert tiou(Action(0, 4, 0), Proposal(4, 6, 0, 1.0)) == 0
    assert tiou(Action(0, 4, 0), Proposal(9, 9, 0, 1)) == 0


def test_average_precision_by_hand():
    there = [[Action(0, 10, 0), Action(20, 30, 0)], [Action(0, 10, 0)]]
    right, other = Proposal(0, 10, 0, 0.9), Proposal(40, 50, 0, 0.8)
    late, last = Proposal(21, 30, 0, 0.7), Proposal(0, 9, 0, 0.6)
    # right, wrong, right, right: precision 1, 2/3 -> 3/4, 3/4 by the envelope
    assert precision([[right, other, late], [last]], there) == pytest.approx((1 + 2 * 3 / 4) / 3)
    assert precision([[right], []], there) == pytest.approx(1 / 3)
    assert precision([[], []], there) == 0
    assert np.isnan(precision([[], []], [[], []]))


def test_an_action_is_found_once_by_the_surest_and_in_its_class_alone():
    there = [[Action(0, 10, 0)]]
    twice = [Proposal(0, 10, 0, 0.5), Proposal(0, 9, 0, 0.9)]
    assert precision([twice], there, 2) == 1  # the second comes after all is found
    again = [[*twice], [Proposal(0, 10, 0, 0.1)]]
    assert precision(again, [there[0], there[0]]) == pytest.approx((1 + 2 / 3) / 2)
    assert precision([[Proposal(0, 10, 1, 0.9)]], there, 2) == 0
    assert precision([[Proposal(0, 5, 0, 0.9)]], there) == 1  # tIoU just the threshold
    assert precision([[Proposal(0, 4.9, 0, 0.9)]], there) == 0
    near = [[Proposal(0, 11, 0, 0.9), Proposal(0, 10, 0, 0.8)]]
    assert precision(near, [[Action(0, 8, 0), Action(2, 13, 0)]]) == 1  # each takes its nearest


def test_average_recall_by_hand():
    there = [[Action(0, 10, 0), Action(20, 30, 1)], [Action(0, 10, 0)]]
    found = [[Proposal(0, 10, 3, 0.9), Proposal(20, 27, 0, 0.1)], [Proposal(4, 9, 0, 0.5)]]
    # tIoU 1, .7 and .5: above ten, five and one of the ten thresholds
    assert average_recall(found, there, 2) == pytest.approx((10 + 5 + 1) / 30)
    assert average_recall(found, there, 1) == pytest.approx((10 + 0 + 1) / 30)
    assert average_recall([[], []], there, 5) == 0


# ---------------------------------------------------------------------- sequences, matching, labels


def test_a_sequence_depends_on_its_seed_and_number_alone():
    few, many = draw_sequences(2, 64, 3, seed=4), draw_sequences(5, 64, 3, seed=4)
    assert torch.equal(few.features, many.features[:2]) and few.actions == many.actions[:2]
    assert not torch.equal(few.features, draw_sequences(2, 64, 3, seed=5).features)
    for actions in many.actions:
        assert 1 <= len(actions) <= 4
        for a, b in itertools.pairwise(actions):
            assert a.end + 4 <= b.start
        assert all(8 <= end - start <= LONGEST and kind < 3 for start, end, kind in actions)


def test_points_of_a_segment_are_read_by_linear_interpolation():
    weights = bmn.sampling(32, 8, points=4)
    ramp = (torch.arange(32).float() + 0.5)[None, None]  # the value at the middle of every frame
    found = bmn.match(ramp, weights)
    assert found.shape == (1, 4, 8, 32)
    for start, size in ((10, 8), (13, 4)):
        places = torch.linspace(start - size / 4, start + 1.25 * size, 4)
        torch.testing.assert_close(found[0, :, size - 1, start], places)
    assert bmn.match(torch.ones(1, 1, 32), weights)[0, 0, 7, 0] == 0  # before the sequence


def test_a_perfect_network_finds_every_action():
    sequences = draw_sequences(6, 64, 3, seed=1)
    truth = bmn.labels(sequences.actions, 64, LONGEST)
    start, end, _ = sequences.actions[0][0]
    cell = truth.overlap[0, int(end - start) - 1, int(start)]
    assert cell == 1 == truth.borders[0, 0, int(start)] == truth.borders[0, 1, int(end) - 1]
    sure = Sequences(sequences.features, torch.zeros(6, 3, 64), sequences.actions)
    for row, actions in zip(sure.evidence, sequences.actions, strict=True):
        for a, b, kind in actions:
            row[kind, int(a) : int(b)] = 20.0

    def net(features, evidence):
        return bmn.Found(truth.borders, truth.overlap[:, None].expand(-1, 2, -1, -1) ** 8)

    found = propose(net, sure)
    assert precision(found, sequences.actions, 3, threshold=0.95) == 1
    assert average_recall(found, sequences.actions, 40) == 1
    assert all(len(some) <= 40 for some in found)
    assert bmn.loss(net(None, None), truth, bmn.fits(64, LONGEST)) < 3


def test_without_a_peak_the_best_segment_is_proposed():
    sequences = draw_sequences(1, 64, 3, seed=1)
    flat = bmn.Found(torch.zeros(1, 2, 64), torch.zeros(1, 2, LONGEST, 64))
    assert len(propose(lambda *_: flat, sequences)[0]) == 1


# ---------------------------------------------------------------------- attention at the three places


def pair(row):
    torch.manual_seed(0)
    plain = Proposer("bmn", SHORT).eval()
    torch.manual_seed(0)
    return plain, Proposer(row, SHORT).eval()


@pytest.mark.parametrize("row", ["bmn-se", "bmn-csa", "bmn-csa-other"])
def test_rows_begin_alike_and_with_last_layers_of_zero_csa_is_no_attention(row):
    plain, net = pair(row)
    sequences = draw_sequences(4, 64, SHORT.classes, seed=1)
    given = sequences.features, sequences.evidence
    assert all(torch.equal(net.state_dict()[k], v) for k, v in plain.state_dict().items())
    a = plain(*given)
    assert not torch.equal(net(*given).borders, a.borders)
    for place in net.net.places:
        for branch in (place.attention.channels, place.attention.places):
            if branch is not None:
                torch.nn.init.zeros_(branch[-1].weight)
                torch.nn.init.constant_(branch[-1].bias, 100.0 if row == "bmn-se" else 0.0)
    for part, expected in zip(net(*given), a, strict=True):
        torch.testing.assert_close(part, expected)


def test_rows_read_what_their_name_says():
    sequences = draw_sequences(3, 64, SHORT.classes, seed=1)
    moved = sequences.evidence.clone()
    moved[1] += 3 * torch.randn_like(moved[1])
    reads = {"bmn": [1], "bmn-se": [1], "bmn-csa": [1], "bmn-csa-other": [1, 2],
             "features": [], "features-csa": [1]}  # fmt: skip
    for row, expected in reads.items():
        torch.manual_seed(0)
        net = Proposer(row, SHORT).eval()
        a, b = (net(sequences.features, e).borders for e in (sequences.evidence, moved))
        assert (a != b).flatten(1).any(1).nonzero().flatten().tolist() == expected, row


# ---------------------------------------------------------------------- study


def test_the_command_runs_quickly(tmp_path, capsys):
    command = ["action-proposals", "--quick", "--output", str(tmp_path)]
    assert main(command) in (0, None)
    shown = capsys.readouterr().out
    for row in get_args(Row):
        assert shown.count(f"\n| {row} |") == 2 + [first for first, _ in PAIRS].count(row)
    for pair in PAIRS:
        assert f"\n| {' | '.join(pair)} |" in shown
    assert (tmp_path / "report.md").read_text().strip() in shown
    assert main(command) in (0, None)  # read again
    assert capsys.readouterr().out == shown


def test_seeds_draw_their_own_sequences_and_repeat():
    config = replace(SHORT, steps=1)
    a, b = (action_proposals.measure("bmn", config, Split("test"), seed) for seed in (0, 1))
    again = action_proposals.measure("bmn", config, Split("test"), 0)
    without = [{k: v for k, v in run.items() if k != "seconds"} for run in (a, b, again)]
    assert without[0] == without[2] != without[1]
    assert 0 <= a["AR@1"] <= a["AR@40"] <= 1
