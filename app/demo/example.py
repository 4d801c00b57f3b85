"""The picture of the first page: a photo that scikit-image ships, and where a network looks on it.

``python -m xattn.app.demo.example`` draws it anew, from what ``pip install "xattn[demo]"`` installs.
"""

from __future__ import annotations

import base64
import html as markup
from importlib import resources

from PIL import Image

from xattn.app.demo.photos import BACKBONE, embedded_photos
from xattn.runtime.files import atomic_file

FILE, PHOTO, HEAD = "example.jpg", "chelsea.png", "evidence-efficientnet-lite0"
SIDE = 400  # pixels: the width of each picture
TEXT = (
    "A photo, and where EfficientNet-Lite0 finds its evidence for tiger cat: bright is much, dark is "
    "little."
)


def html() -> str:
    """The picture with what it shows, as a part of a page."""
    data = base64.b64encode((resources.files(__package__) / FILE).read_bytes()).decode("ascii")
    text = markup.escape(TEXT)
    return (
        f'<figure class="example"><img alt="{text}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def draw() -> Image.Image:
    """The photo and its map side by side."""
    from xattn.backbone import load_backbone
    from xattn.explaining.photos import explain
    from xattn.heads import load_head

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
    with resources.as_file(resources.files("xattn.app.demo")) as folder:
        with atomic_file(folder / FILE) as temporary:
            draw().save(temporary, "JPEG", quality=85)
