"""Synthetic packs of any size, for the benchmark of the viewer and for its tests."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.writer import pack_writer, save_pack
from xattn.photos.view import View

CLASSES = [
    "tench, Tinca tinca",
    "great white shark",
    "hen",
    "ostrich",
    "bulbul",
    "vulture",
    "axolotl",
    "tree frog",
    "agama",
    "trilobite",
]
METRICS = {
    "AD@50": {"higher_is_better": False, "formula": "100 mean max(0, p - q) / p"},
    "insertion": {"higher_is_better": True, "formula": "area under the score"},
    "ROAD": {"higher_is_better": True, "formula": "mean (LeRF - MoRF) / 2"},
}
VIEW = View("crop", (96, 128), (256, 341), (16, 58, 224, 224), (224, 224))


def picture(number: int, size: tuple[int, int] = (128, 96)) -> Image.Image:
    """Coloured waves, another pattern for every number; (width, height) pixels."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1]))
    phase = 0.7 * number
    waves = [np.sin(x * (1 + c) + phase) + np.cos(y * (2 - c / 2) - phase * c) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 2) * 63.7).astype(np.uint8))


def explanation(
    image: int = 0,
    method: str = "gradcam",
    side: int = 7,
    target: int | None = None,
    source: Image.Image | None = None,
    signed: bool = False,
    **changes: Any,
) -> Explanation:
    """One made-up entry with metrics, curves and facts; a pure function of its arguments."""
    rng = np.random.default_rng([image, side, *method.encode()])
    values = rng.normal(size=(side, side)) if signed else rng.random((side, side))
    predicted = image % len(CLASSES)
    second = (predicted + 1) % len(CLASSES)
    label = predicted if image % 4 else second
    target = predicted if target is None else target
    p = 0.3 + 0.6 * rng.random()
    facts = ImageFacts(
        ((predicted, CLASSES[predicted], p), (second, CLASSES[second], (1 - p) / 2)),
        label,
        CLASSES[label],
    )
    curve = np.linspace(p, 0.01, 12)
    options: dict[str, Any] = {
        "map": values.astype(np.float32),
        "target": target,
        "target_name": CLASSES[target],
        "probability": p,
        "method": method,
        "view": VIEW,
        "image_id": f"photo-{image:05}",
        "protocol": {
            "backbone": {"name": "made up", "sha256": "0" * 64},
            "head": None,
            "explainer": method,
            "classes": "top",
            "view": "crop",
        },
        "file_name": f"photo-{image:05}.jpg",
        "source": source,
        "facts": facts,
        "metrics": {key: float(rng.random()) for key in METRICS},
        "curves": {
            "deletion": curve.round(4).tolist(),
            "insertion": curve[::-1].round(4).tolist(),
        },
        "sanity": method == "random",
    }
    return Explanation(**{**options, **changes})


def small_pack(
    folder: Path, images: int = 6, methods: tuple[str, ...] = ("gradcam", "saliency", "random")
) -> Path:
    """A pack as ``xattn compare`` writes it, with thumbnails; written by ``save_pack`` itself."""
    found = [
        explanation(i, method, side=28 if method == "saliency" else 7, source=picture(i))
        for i in range(images)
        for method in methods
    ]
    return save_pack(folder, found, overlays=False, metrics=described())


def described() -> dict[str, dict[str, Any]]:
    """The metrics of a manifest."""
    return {key: {**info, "protocol_id": f"{key}-made-up"} for key, info in METRICS.items()}


def big_pack(folder: Path, images: int = 10_000, methods: int = 1, pictures: int = 50) -> Path:
    """Thousands of images in seconds: few different thumbnails, each the file of many images."""
    names = [f"method{m}" for m in range(methods)]
    jpegs = [_jpeg(picture(n, (512, 384))) for n in range(min(pictures, images))]
    hashes = [hashlib.sha256(data).hexdigest() for data in jpegs]
    with pack_writer(folder, overlays=False) as writer:
        writer.metrics = described()
        thumbnails = [f"thumbnails/{n:05}.jpg" for n in range(len(jpegs))]
        (writer.folder / "thumbnails").mkdir()
        for name, data in zip(thumbnails, jpegs, strict=True):
            (writer.folder / name).write_bytes(data)
        for i in range(images):
            n = i % len(jpegs)
            group = [explanation(i, name) for name in names]
            writer.add(group)
            writer.use_thumbnail(group, thumbnails[n], hashes[n])
    return folder


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return stream.getvalue()
