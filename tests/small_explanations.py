"""Photos of noise, explanations of them with small maps, and names of classes."""

import numpy as np
from PIL import Image

from xattn.backbone import Preprocessing
from xattn.packs.explanation import Explanation
from xattn.photos.view import make_view

SIZE = (60, 90)
CLASSES = ["tabby cat, tabby", "golden retriever", "espresso", "rocket", "tripod", "fox", "owl"]


def photo(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def make(image_id="cat", target=3, method="head", mode="crop", seed=0, **options):
    options.setdefault("source", photo(seed))
    options.setdefault("file_name", f"{image_id}.png")
    return Explanation(
        map=np.random.default_rng(seed).normal(size=(7, 5)),
        target=target,
        target_name="tabby, tabby cat",
        probability=0.25,
        method=method,
        view=make_view(SIZE, Preprocessing(), mode),
        image_id=image_id,
        protocol={"backbone": {"name": "tiny", "sha256": "ab" * 32}, "explainer": method},
        **options,
    )
