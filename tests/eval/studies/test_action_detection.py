"""The study of actions: average precision by hand, sequences, detections, resuming, the command."""

import itertools

import numpy as np
import pytest
import torch

from xattn.eval.evaluation.split import Split
from xattn.eval.studies import action_detection
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.action_detection import (
    Action,
    ActionStudyConfig,
    Detections,
    Detector,
    detect,
    draw_sequences,
    inside,
    match,
    mean_average_precision,
    targets,
    thinned,
    tiou,
)

SHORT = ActionStudyConfig().quick()


def precision(found, there, classes=1, weights=None, threshold=0.5):
    return mean_average_precision(match(found, there, classes, threshold), weights)


# ---------------------------------------------------------------------- average precision


def test_tiou_is_shared_time_over_all():
    assert tiou(Action(0, 4, 0), Detections(2, 6, 0, 1.0)) == 2 / 6
    assert tiou(Action(0, 4, 0), Detections(0, 4, 1, 1.0)) == 1
    assert (
        tiou(Action(0, 4, 0), Detections(4, 6, 0, 1.0))
        == 0
        == tiou(Action(0, 4, 0), Detections(9, 9, 0, 1))
    )


def test_average_precision_by_hand():
    there = [[Action(0, 10, 0), Action(20, 30, 0)], [Action(0, 10, 0)]]
    right, other = Detections(0, 10, 0, 0.9), Detections(40, 50, 0, 0.8)
    late, last = Detections(21, 30, 0, 0.7), Detections(0, 9, 0, 0.6)
    # right, wrong, right, right: precision 1, 2/3 -> 3/4, 3/4 by the envelope
    assert precision([[right, other, late], [last]], there) == pytest.approx((1 + 2 * 3 / 4) / 3)
    assert precision([[right], []], there) == pytest.approx(1 / 3)
    assert precision([[], []], there) == 0
    assert np.isnan(precision([[], []], [[], []]))


def test_an_action_is_found_once_by_the_surest_and_in_its_class_alone():
    there = [[Action(0, 10, 0)]]
    twice = [[Detections(0, 10, 0, 0.5), Detections(0, 9, 0, 0.9)]]
    assert match(twice, there, 2).right.tolist() == [True, False]
    assert (
        precision(twice, there, 2) == 1
    )  # the second comes after all is found; class 1 is not there
    assert precision([[Detections(0, 10, 1, 0.9)]], there, 2) == 0
    assert precision([[Detections(0, 5, 0, 0.9)]], there) == 1  # tIoU just the threshold
    assert precision([[Detections(0, 4.9, 0, 0.9)]], there) == 0
    near = [[Detections(0, 11, 0, 0.9), Detections(0, 10, 0, 0.8)]]
    assert precision(near, [[Action(0, 8, 0), Action(2, 13, 0)]]) == 1  # each takes its nearest


def test_weights_are_sequences_drawn_again():
    rng = np.random.default_rng(0)
    there = [[Action(0, 10, i % 2)] for i in range(6)]
    found = [
        [
            Detections(a, a + 10, i % 2, s)
            for a, s in zip(rng.random(3) * 9, rng.random(3), strict=True)
        ]
        for i in range(6)
    ]
    times = [2, 0, 1, 3, 0, 1]
    order = np.repeat(range(6), times)
    drawn = precision([found[i] for i in order], [there[i] for i in order], 2)
    assert precision(found, there, 2, times) == pytest.approx(drawn)
    assert 0 < drawn < 1


# ---------------------------------------------------------------------- sequences, detectors


def test_a_sequence_depends_on_its_seed_and_number_alone():
    few, many = draw_sequences(2, 64, 3, seed=4), draw_sequences(5, 64, 3, seed=4)
    assert torch.equal(few.features, many.features[:2]) and few.actions == many.actions[:2]
    assert not torch.equal(few.features, draw_sequences(2, 64, 3, seed=5).features)
    for actions in many.actions:
        assert 1 <= len(actions) <= 4
        for a, b in itertools.pairwise(actions):
            assert a.end + 4 <= b.start
        assert all(8 <= end - start <= 32 and kind < 3 for start, end, kind in actions)


def test_targets_decode_to_the_actions():
    sequences = draw_sequences(4, 64, 3, seed=1)
    kinds, distances = targets(sequences, 3)
    assert torch.equal((kinds < 3).float(), inside(sequences.actions, 64))

    class Truth(torch.nn.Module):
        def forward(self, features, evidence):
            one_hot = torch.nn.functional.one_hot(kinds, 4).transpose(1, 2)
            return one_hot * 20.0, distances

    assert precision(detect(Truth(), sequences), sequences.actions, 3, threshold=1.0) == 1


def test_of_segments_that_overlap_the_surest_stays():
    a, b, c = Detections(0, 10, 0, 0.6), Detections(1, 10, 0, 0.9), Detections(0, 10, 1, 0.5)
    assert thinned([a, b, c]) == [b, c]


def test_detectors_read_what_their_name_says():
    sequences = draw_sequences(2, 64, 3, seed=1)
    for kind, reads in (("none", False), ("squeeze-excitation", False), ("csa", True),
                        ("concatenated", True), ("concatenated-csa", True)):  # fmt: skip
        torch.manual_seed(0)
        detector = Detector(kind, 3, 8)
        a = detector(sequences.features, sequences.evidence)[0]
        b = detector(sequences.features, sequences.evidence + 1)[0]
        assert torch.equal(a, b) != reads


# ---------------------------------------------------------------------- study


def test_the_command_runs_quickly(tmp_path, capsys):
    command = ["actions", "--quick", "--output", str(tmp_path)]
    assert main(command) in (0, None)
    shown = capsys.readouterr().out
    for kind in ("none", "squeeze-excitation", "concatenated"):
        assert shown.count(f"\n| {kind} |") == 1
    for kind in ("csa", "concatenated-csa"):
        assert shown.count(f"\n| {kind} |") == 2
    assert (tmp_path / "report.md").read_text().strip() in shown


def test_a_row_less_itself_is_zero_and_intervals_hold_the_mean():
    parts = [draw_sequences(8, 64, SHORT.classes, seed) for seed in (1, 2)]
    runs = [action_detection.measure("csa", *parts, SHORT, Split("test"), seed) for seed in (0, 1)]
    values = action_detection.resampled(runs, 50)
    assert len(values) == 51 and np.isfinite(values).all()
    assert values[1:].min() <= values[0] <= values[1:].max()
    assert len(runs[0]["inside"]) == 8
