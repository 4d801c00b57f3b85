"""The gallery: a picture and a row of costs for what is asked for, counted exactly, and not again."""

import csv

import pytest
import torch
from PIL import Image
from torch import nn

from xattn.eval.metrics.registry import GROUPS
from xattn.eval.studies import gallery, gallery_pages
from xattn.eval.studies.metering import measured
from xattn.explainers.base import EXPLAINERS
from xattn.heads.base import HEADS


@pytest.fixture
def drawn(tmp_path):
    pytest.importorskip("sklearn")

    def run(*only):
        page, kept = tmp_path / "gallery.md", tmp_path / "runs"
        lines = list(gallery.study(page, None, kept, only=only, quick=True))
        with page.with_suffix(".csv").open(newline="") as stream:
            return page, {row["name"]: row for row in csv.DictReader(stream)}, lines

    return run


def test_each_row_has_a_picture_and_its_passes(drawn):
    names = ("gradcam", "occlusion", "rollout", "evidence", "complexity")
    photos = ("photos-cnn", "photos-vit", "photos-small")
    page, rows, _ = drawn(*photos, *names)
    assert set(rows) == {*photos, *names}
    assert (rows["gradcam"]["images"], rows["gradcam"]["backwards"]) == ("1", "1")
    assert rows["rollout"]["network"] == "test_vit" and rows["rollout"]["backwards"] == "0"
    assert rows["evidence"]["images"] == "1" and float(rows["complexity"]["images"]) >= 1
    for name in ("photos-cnn", "gradcam", "occlusion", "rollout"):
        assert Image.open(page.with_suffix("") / f"{name}.jpg").height == 120
    costs = page.with_name("costs.md").read_text()
    assert all(f"`{name}`" in costs for name in names)
    assert "gallery/gradcam.jpg" in page.read_text()


def test_what_is_measured_is_kept(drawn):
    drawn("photos-cnn", "photos-vit", "photos-small", "gradcam")
    _, _, lines = drawn("gradcam")
    assert len(lines) == 1 and lines[0].startswith("pages: ")


def test_gallery_pages_have_the_cost_of_each_head_and_metric_beside_one_pass():
    def row(kind, name, network, operations, options="", photos=1):
        cost = {"images": 1, "backwards": 0, "operations": operations, "peak": 5e6, "seconds": 2}
        about = {"kind": kind, "name": name, "network": network, "options": options}
        return {**about, "photos": photos, **cost}

    lines = gallery_pages.costs_page(
        [
            row("photos", "photos-cnn", "cnn", 100),
            row("photos", "photos-vit", "vit", 40),
            row("photos", "photos-small", "cnn at 112 pixels", 10),
            row("head", "gap", "cnn", 300, "4321 parameters"),
            row("head", "tokens", "vit", 80, "12 parameters"),
            row("head", "simpool", "vit", 0, "not measured", photos=0),
            row("metric", "road", "cnn at 112 pixels", 25),
        ]
    )
    text = "\n".join(lines)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["`gap`", "4,321", "1", "0", "3.0", "5", "2.00"] in rows
    assert ["`tokens` (ViT)", "12", "1", "0", "2.0", "5", "2.00"] in rows
    assert ["`road`", "1", "0", "2.5", "5", "2.00"] in rows
    assert "`simpool` was not measured." in text


def test_everything_has_a_row(tmp_path):
    found = {(kind, name) for kind, name, _ in gallery.jobs(tmp_path, None, tmp_path, False)}
    explainers = {*EXPLAINERS.names(), *gallery.TRAINED}
    assert {("explainer", name) for name in explainers} <= found
    assert {("head", name) for name in HEADS.names()} <= found
    assert {("metric", name) for name in GROUPS} <= found


def test_the_meter_counts_images_backward_passes_work_and_memory():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 25, 2)).requires_grad_(
        False
    )
    images = torch.rand(2, 3, 5, 5)

    def call():
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)
        return gradient

    gradient, meter = measured(call, net)
    assert gradient.shape == images.shape
    assert (meter.images, meter.backwards) == (2, 2)
    forward = 2 * (2 * 25 * 3 * 4 + 2 * 100 * 2)
    assert meter.operations == 2 * forward  # of the images' gradient alone, as much again
    assert meter.peak >= 4 * (images.numel() + gradient.numel())
    run = torch.autograd._engine_run_backward
    with pytest.raises(ValueError):
        measured(lambda: int("x"), net)
    assert torch.autograd._engine_run_backward is run
