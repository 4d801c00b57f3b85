"""The study of classes at a point that a mark elsewhere decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xattn.eval.studies import segment_cues as cues
from xattn.eval.studies.detection_cues import picture


def test_the_truth_is_where_the_shapes_are():
    for number in range(4):
        one = picture(number)
        truth = cues.labels_of(one)
        grey = one.pixels.mean(0)
        assert set(truth.unique().tolist()) == {0, *(1 + one.labels).tolist()}
        for (x0, y0, x1, y1), label in zip(one.boxes.tolist(), one.labels.tolist(), strict=True):
            inside = truth[int(y0) + 1 : int(y1), int(x0) + 1 : int(x1)] == 1 + label
            values = grey[int(y0) + 1 : int(y1), int(x0) + 1 : int(x1)][inside]
            assert values.std() < 1e-4 and inside[inside.shape[0] // 2, inside.shape[1] // 2]


def test_the_question_is_the_class_in_the_middle_of_the_diamond():
    one = picture(0)
    target = cues.question(one)
    logits = torch.zeros(1, 6, cues.SIDE, cues.SIDE)
    logits[0, 1 + one.labels[0]] = (cues.labels_of(one) == 1 + one.labels[0]).float()
    assert cues.replace(target.function, index=1 + int(one.labels[0]))(logits) == 1


def test_a_network_that_does_not_read_the_mark_is_not_scored(tmp_path):
    config = replace(cues.DEFAULTS, pictures=4, steps=1, batch=2)
    with pytest.raises(
        ValueError, match=r"^config.steps: of 4 classes .* follow the mark's colour"
    ):
        list(cues.study(tmp_path, config))
    assert not (tmp_path / "report.md").exists()
