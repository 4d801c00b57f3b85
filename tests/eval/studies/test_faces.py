"""The study of faces: AUROC of error, training, resuming, refusals, the command."""

import json

import numpy as np
import pytest
import torch

from xattn.eval.studies import faces
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.faces import POINTS, FaceStudyConfig, draw_faces
from xattn.eval.studies.models.arbex import Arbex

SHORT = FaceStudyConfig().quick()


def test_auroc_of_error_is_a_count_of_pairs():
    rng = np.random.default_rng(0)
    sure, right = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.6
    pairs = [(s > t) + 0.5 * (s == t) for s in sure[right] for t in sure[~right]]
    assert faces.error_auroc(sure, right) == pytest.approx(np.mean(pairs))
    assert faces.error_auroc(np.array([0.9, 0.1]), np.array([True, False])) == 1
    assert np.isnan(faces.error_auroc(sure, np.ones(40, bool)))


def test_training_fits_a_few_faces():
    few = draw_faces(32, seed=3, blends=0, false_labels=0)
    torch.manual_seed(0)
    model = Arbex(6, POINTS, streams="landmarks", dropout=0.0)
    with torch.no_grad():
        before = model.eval().loss(few.images, few.landmarks, few.labels)
    faces.train(model, few, FaceStudyConfig(train=32, batch_size=16, epochs=40), 0)
    with torch.no_grad():
        after = model.loss(few.images, few.landmarks, few.labels)
    assert after < 0.6 * before and not model.training


def test_the_command_runs_quickly(tmp_path, capsys):
    command = ["faces", "--quick", "--output", str(tmp_path)]
    assert main(command) in (0, None)
    shown = capsys.readouterr().out
    for streams in faces.STREAMS:
        for name in (streams, f"{streams}-balanced"):
            assert f"\n| {name} | 0." in shown
    assert (tmp_path / "report.md").read_text().strip() in shown
    kept = json.loads((tmp_path / "image-0.json").read_text())
    assert len(kept["given"]) == len(kept["confidence"]) == SHORT.tests
