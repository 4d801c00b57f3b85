"""The benchmark's jobs do what they say; how fast they are is for the benchmark."""

import re

import pytest
import torch

from xattn import load_backbone
from xattn.cli import main
from xattn.eval.bench import speed
from xattn.eval.bench.random_photos import write_photos
from xattn.photos.images import list_images, load_image
from xattn.runtime import measuring
from xattn.runtime.measuring import operations


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return load_backbone("test_resnet", weights=None, input_size=64, num_classes=10)


def test_a_ratio_is_the_median_over_rounds_within_each_round(monkeypatch):
    clock = iter([1, 2, 1, 3, 10, 50, 1, 4, 2, 2])  # base, job, base, job, ...: 2, 3, 5, 4, 1
    monkeypatch.setattr(measuring, "seconds_of", lambda job, _: next(clock))
    jobs = {"base": None, "job": None}
    assert measuring.ratios(jobs, "base", rounds=3, warmup=2) == {"base": 1, "job": 4}


def test_bounds_are_those_of_the_targets_or_follow_the_operations():
    assert speed.largest_ratio("tf_efficientnet_lite0", 8, "explain", 1.02) == 1.10
    assert speed.largest_ratio("vit_base_patch16_224", 1, "explain", 1.02) == 1.15
    assert speed.largest_ratio("tf_efficientnet_lite0", 8, "train", 1.02) == 1.15
    assert speed.largest_ratio("vit_base_patch16_224", 8, "train", 1.2) == pytest.approx(1.32)
    assert speed.largest_ratio("resnet50", 8, "explain", 1.15) == pytest.approx(1.265)


def test_operations_are_counted():
    layer = torch.nn.Conv2d(3, 5, 1, bias=False)
    x = torch.rand(2, 3, 4, 4)
    assert operations(lambda: layer(x)) == 2 * 2 * 3 * 5 * 16


def test_every_explaining_job_gives_maps_of_the_predicted_class(backbone):
    heads = {name: head.eval() for name, head in speed.heads_of(backbone).items()}
    jobs = speed.explain_jobs(backbone, heads, 3)
    images = speed._images(backbone, 3)
    logits = jobs["forward"]()
    assert torch.allclose(logits, backbone.logits(images), atol=1e-5)
    maps = jobs["ttame"]()
    assert maps.shape == (3, 1, 64, 64)
    target = logits.argmax(1)
    expected = heads["ttame"](backbone(images), target)
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear")
    assert torch.allclose(maps, expected, atol=1e-5)
    assert jobs["Grad-CAM (Captum)"]().shape == (3, 1, 64, 64)


def test_a_wide_backbone_gets_a_row_for_the_published_branches():
    wide = load_backbone("resnet10t", weights=None, input_size=64)
    assert list(speed.heads_of(wide)) == ["ttame"]
    wide = load_backbone("tf_efficientnet_lite0", weights=None, input_size=64)
    exact = speed.heads_of(wide)["ttame, exact branches"]
    assert exact.branches[-1].conv.weight.shape[:2] == (1280, 1280)


def test_training_jobs_leave_the_head_as_it_was_and_give_it_gradients(backbone):
    heads = {name: head.train() for name, head in speed.heads_of(backbone).items()}
    jobs = speed.step_jobs(backbone, heads, 2)
    before = {k: v.clone() for k, v in heads["ttame"].named_parameters()}
    jobs["floor"]()
    assert all(p.grad is None for p in heads["ttame"].parameters())
    jobs["ttame"]()
    assert any(p.grad is not None and p.grad.any() for p in heads["ttame"].parameters())
    assert all(torch.equal(p, before[k]) for k, p in heads["ttame"].named_parameters())


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batches": (8, 0)}, {"batches": ()}])
def test_nothing_to_measure_is_refused(wrong):
    with pytest.raises(ValueError, match="rounds, batches: got .* at least 1"):
        next(speed.bench("explain", ["test_resnet"], **wrong))


def test_the_command_prints_the_tables(capsys, tmp_path):
    folder = write_photos(tmp_path, count=3, size=(80, 60))
    assert [load_image(p).size for p in list_images(folder)] == [(80, 60)] * 3
    quick = ["--backbones", "test_resnet", "--batches", "2", "--rounds", "1"]
    assert main(["bench", "all", *quick, str(folder)]) == 0
    out = capsys.readouterr().out
    for row in ("explaining, ttame", "explaining, Grad-CAM .Captum.", "training step, ttame"):
        assert re.search(rf"\| test_resnet \| 2 \| {row} \| \d+\.\d\dx \|", out)
    for row in ("decoding", "passes", "explain"):
        assert re.search(rf"\| test_resnet \| \d+\.\d \| {row} \|", out)
