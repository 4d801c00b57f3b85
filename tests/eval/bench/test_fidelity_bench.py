"""The cost of metrics: a job makes as many passes as the bare passes that it is divided by."""

import pytest
import torch

from xattn import load_backbone
from xattn.eval.metrics.road import RoadMetric
from xattn.eval.studies.benches import fidelity


@pytest.fixture
def passed(monkeypatch):
    """A network, and the images that it is given."""
    backbone, images = load_backbone("test_resnet", weights=None, input_size=96), []
    real = backbone.logits
    monkeypatch.setitem(vars(backbone), "logits", lambda x: images.append(x) or real(x))
    return backbone, images


def test_road_passes_each_photo_and_its_seven_fillings(passed):
    backbone, images = passed
    photos = fidelity.photos_like(backbone, 3)
    fidelity._morf(backbone, photos, RoadMetric(), batch=8)
    found = torch.cat(images)
    assert len(found) == 3 * 8 and torch.equal(found[:3], photos)
    for photo, fillings in zip(photos, found[3:].split(7), strict=True):
        removed = (fillings != photo).any(1).float().mean((1, 2))
        assert removed.tolist() == pytest.approx(RoadMetric().levels, abs=0.05)


def test_bare_passes_are_as_many_as_asked_for(passed):
    backbone, images = passed
    fidelity._passes(backbone, fidelity.photos_like(backbone, 2), 12, 4)()
    assert sum(map(len, images)) == 12
