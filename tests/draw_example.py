"""``python tests/draw_example.py`` draws the picture of the viewer's first page anew."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from PIL import Image

from xattn.app.demo.pack_job import BACKBONE, embedded_photos
from xattn.backbone import load_backbone
from xattn.explaining.photos import explain
from xattn.heads import load_head

PHOTO, HEAD = "chelsea.png", "evidence-efficientnet-lite0"
SIDE = 400  # pixels: the width of each picture


def draw() -> Image.Image:
    """The photo and its map side by side."""
    backbone = load_backbone(BACKBONE, weights="package")
    (path,) = (p for p in embedded_photos() if p.name == PHOTO)
    (found,) = explain([path], backbone, load_head(HEAD, backbone))
    print(found.target_name, f"{found.probability:.3f}")
    pictures = [Image.open(path).convert("RGB"), found.overlay()]
    height = round(SIDE * pictures[0].height / pictures[0].width)
    sheet = Image.new("RGB", (2 * SIDE, height))
    for i, picture in enumerate(pictures):
        small = picture.resize((SIDE, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (i * SIDE, 0))
    return sheet


if __name__ == "__main__":
    draw().save(Path(str(resources.files("xattn.app.demo"))) / "example.jpg", quality=85)
