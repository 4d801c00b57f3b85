"""The folder that the README's and the pages' commands and examples name their files in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from xattn.config import RECIPES


def write_folder(folder: Path) -> None:
    """Write photos of two classes, a clip, memes and a model of one's own into ``folder``."""
    import timm
    from skimage.data import chelsea

    photo = Image.fromarray(chelsea()).resize((128, 96))
    photo.save(folder / "photo.jpg")
    for name, degrees in (("cats", 0), ("turned", 90)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(5):
            photo.rotate(degrees + 4 * number).save(folder / "photos" / name / f"{number}.jpg")
    (folder / "memes").mkdir()
    photo.save(folder / "memes" / "0.png")
    write_clip(folder / "clip.mp4", photo)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3)
    torch.save(model.state_dict(), folder / "mine.pth")
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")
    if importlib.util.find_spec("transformers"):
        import vlm_models

        vlm_models.network("llava").save_pretrained(folder / "my-vlm")
        vlm_models.processor("llava").save_pretrained(folder / "my-vlm")


def train_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are trained for two epochs, so that what is printed runs in seconds."""
    for recipe in RECIPES.values():
        monkeypatch.setitem(recipe, "epochs", 2)


def write_clip(path: Path, photo: Image.Image) -> None:
    import cv2
    import numpy as np

    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5.0, photo.size)
    for shift in (0, 3, 6):
        film.write(cv2.cvtColor(np.roll(np.asarray(photo), shift, 1), cv2.COLOR_RGB2BGR))
    film.release()
