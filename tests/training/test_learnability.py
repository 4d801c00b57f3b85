"""Learnability (the spec's synthetic case): a head finds the patch that makes the class."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import xattn
from xattn.config import ON_PHOTOS, TrainConfig
from xattn.eval import evaluate
from xattn.explainers import create_explainer
from xattn.heads import create_head
from xattn.training import fit
from xattn.training.objectives.base import (
    OBJECTIVES,
    Step,
    objective_for,
    table_settings,
)
from xattn.training.objectives.mask import Mask
from xattn.training.outcomes import cache_outcomes

SIDE, PATCH, CLASSES = 32, 10, 4


def scenes(count, seed):
    """Textured fields with one coloured patch; the colour is the class. Images, labels, patch masks."""
    generator = torch.Generator().manual_seed(seed)
    # Fields of any brightness, black included, so that a masked field is nothing new to the network.
    brightness = 0.8 * torch.rand(count, 1, 1, 1, generator=generator)
    images = brightness * (0.5 + torch.rand(count, 3, SIDE, SIDE, generator=generator)).clamp(
        max=1.2
    )
    labels = torch.randint(CLASSES, (count,), generator=generator)
    corners = torch.randint(SIDE - PATCH + 1, (count, 2), generator=generator)
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [1.0, 1.0, 0]])
    inside = torch.zeros(count, 1, SIDE, SIDE)
    for i, (top, left) in enumerate(corners.tolist()):
        inside[i, :, top : top + PATCH, left : left + PATCH] = 1
    return images * (1 - inside) + inside * colours[labels][..., None, None], labels, inside


class TinyCnn(nn.Module):
    """Two taps and a linear classifier behind average pooling, as an adapter module."""

    preprocessing = xattn.Preprocessing(input_size=(SIDE, SIDE), mean=(0.5,) * 3, std=(0.5,) * 3)

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.classifier = nn.Linear(24, CLASSES)

    def forward_taps(self, x):
        first = self.first(x)
        second = self.second(first)
        return self.classifier(second.mean((2, 3))), [first, second]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    model = TinyCnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, labels, _ = scenes(512, seed=1)
    for step in range(150):
        chosen = torch.arange(step * 64, step * 64 + 64) % 512
        x = (images[chosen] - 0.5) / 0.5
        loss = F.cross_entropy(model.forward_taps(x)[0], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backbone = xattn.load_backbone(model, class_names=["red", "green", "blue", "yellow"])
    assert (backbone.logits(images).argmax(1) == labels).float().mean() > 0.95
    return backbone


def test_a_trained_head_finds_the_patch_and_beats_the_centre(backbone):
    torch.manual_seed(0)
    head = create_head("ttame", backbone, fusion="per_class")
    config = TrainConfig(variation=0.001)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    images, _, _ = scenes(512, seed=2)
    head.train()
    for step in range(250):
        chosen = torch.arange(step * 32, step * 32 + 32) % 512
        terms = Mask().on_photos(Step(head, backbone, images[chosen], config))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    head.eval()
    images, labels, inside = scenes(64, seed=3)
    with torch.no_grad():
        masks = head.mask(head(backbone(images), labels))
    masks = F.interpolate(masks, (SIDE, SIDE), mode="bilinear")
    energy = (masks * inside).sum() / masks.sum()
    assert energy > 0.8, f"only {energy:.2f} of the energy lies in the patch"
    rows = {
        "head": create_explainer("head", backbone, head),
        "centre": create_explainer("centre", backbone),
    }
    results = evaluate(backbone, rows, images, progress=False)
    assert results.mean("head", "AD", 1.0) < results.mean("centre", "AD", 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """200 scenes to train on, and 48 others."""
    folder = tmp_path_factory.mktemp("scenes")
    for name, count, seed in (("train", 200, 4), ("held-out", 48, 5)):
        (folder / name).mkdir()
        for i, image in enumerate(scenes(count, seed)[0]):
            pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name / f"{i:03d}.png")
    return folder


LEARNED = {  # with how many epochs; those that search or draw take many passes a step
    "greedy": ("greedy", 20),
    "rank": ("rank:steps=8,largest=10,noise=false", 12),
    "select": ("select:draws=4", 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_learns_holds_on_other_photos(backbone, folders, tmp_path, name):
    """From random weights: its own loss, and the share of the map on the patch, which none is trained on."""
    objective, epochs = LEARNED.get(name, (name, 30))
    config = TrainConfig("outcomes", objective, epochs=epochs, workers=0, lr=5e-3, augment=False)
    images, _, inside = scenes(48, seed=5)
    made, index = objective_for(config), backbone.logits(images).topk(3).indices
    if name not in ON_PHOTOS:
        settings = table_settings(made, config, backbone)
        table = cache_outcomes(
            backbone, folders / "held-out", tmp_path / "table", progress=False, **settings
        )
        outcomes = table.batch(list(range(48)), torch.zeros(48, dtype=torch.long))

    def measured(head):
        with torch.no_grad():
            scores = head(backbone(images), index)
            maps = F.interpolate(head.mask(scores[:, :1]), (SIDE, SIDE), mode="bilinear")
        if name in ON_PHOTOS:
            loss = made.on_photos(Step(head, backbone, images, config, progress=1.0))["loss"]
        else:
            loss = made.table_loss(scores, outcomes, index)["loss"]
        return float(loss), float((maps * inside).sum() / maps.sum())

    torch.manual_seed(0)
    head = create_head("decoder", backbone, fusion="per_class").eval()
    loss, energy = measured(head)
    head = fit(head, backbone, folders / "train", config, progress=False).head
    learned, found = measured(head.eval())
    print(f"{name}: loss {loss:.3f} -> {learned:.3f}, energy {energy:.3f} -> {found:.3f}")
    assert learned < loss and found > energy and found > 1.2 * PATCH**2 / SIDE**2
