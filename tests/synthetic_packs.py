"""Synthetic packs of any size, for the benchmark of the viewer and for its tests."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xattn.eval.metric_words import metric_about, metric_title
from xattn.explainers.base import method_title
from xattn.packs import manifest
from xattn.packs.columns import IMAGES, METRIC, entry_schema, write_rows
from xattn.packs.explanation import Explanation, ImageFacts
from xattn.packs.format import MANIFEST, SHARD_PHOTOS, is_pack, shard_file
from xattn.packs.writer import pack_writer, save_pack, write_tensors
from xattn.photos.view import View
from xattn.runtime.files import atomic_folder

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
_DIFFERENT = 64  # maps and pictures
_POINTS = 12  # of a curve


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
        "method_title": method_title(method),
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
    return {
        key: {
            **info,
            "protocol_id": f"{key}-made-up",
            "title": metric_title(key),
            "about": metric_about(key),
        }
        for key, info in METRICS.items()
    }


def big_pack(
    folder: Path, images: int = 10_000, methods: int = 1, pictures: int = 50, features: int = 0
) -> Path:
    """Thousands of images in seconds, of few different thumbnails; with ``features`` each has so many
    numbers, near those of its class."""
    middles = np.random.default_rng(0).normal(size=(len(CLASSES), features))
    names = [f"method{m}" for m in range(methods)]
    jpegs = [_jpeg(picture(n, (256, 192))) for n in range(min(pictures, images))]
    with pack_writer(folder) as writer:
        writer.metrics = described()
        for i in range(images):
            group = [explanation(i, name) for name in names]
            if features:
                row = middles[i % len(CLASSES)] + np.random.default_rng(i).normal(size=features)
                facts = replace(group[0].facts, features=row.astype(np.float16))
                group[0] = replace(group[0], facts=facts)
            writer.add(group, jpegs[i % len(jpegs)])
    return folder


def million_pack(folder: Path, maps: int = 1_000_000, methods: int = 4, side: int = 7) -> Path:
    """A pack with so many maps (side, side), ``methods`` a photo; a million take a minute.

    Every entry has its own row and its map in a shard; there are few different maps and pictures.
    """
    photos, made = maps // methods, _Made(side)
    names = [f"method{m}" for m in range(methods)]
    with atomic_folder(folder, (), is_pack) as temporary:
        shards = [
            _shard(temporary, number, range(first, min(photos, first + SHARD_PHOTOS)), names, made)
            for number, first in enumerate(range(0, photos, SHARD_PHOTOS))
        ]
        titles = dict(zip(names, names, strict=True))
        text = manifest.text(titles, shards, described(), {}, [])
        (temporary / MANIFEST).write_bytes(text)
    return folder


def _protocol(method: int) -> dict[str, Any]:
    backbone = {"name": "made up", "sha256": "0" * 64}
    return {"backbone": backbone, "head": None, "explainer": f"method{method}", "classes": "top"}


class _Made:
    """The maps and pictures that all rows share, with their hashes."""

    def __init__(self, side: int) -> None:
        rng = np.random.default_rng(0)
        self.side = side
        self.maps = rng.random((_DIFFERENT, side, side), np.float32)
        jpegs = [_jpeg(picture(n, (96, 72))) for n in range(_DIFFERENT)]
        self.jpegs = [np.frombuffer(data, np.uint8) for data in jpegs]
        self.map_hashes, self.jpeg_hashes = (
            np.array([hashlib.sha256(data).digest() for data in group], object)
            for group in ([values.tobytes() for values in self.maps], jpegs)
        )


def _shard(
    folder: Path, number: int, photos: range, methods: list[str], made: _Made
) -> manifest.Shard:
    rng = np.random.default_rng([1, number])
    images = _images(photos, len(methods), made, rng)
    entries = _entries(photos, images, methods, made, rng)
    ids = entries["entry_id"]
    maps, places = write_tensors(
        folder / shard_file("maps", number),
        {id: made.maps[_map_of(photos[0], i)] for i, id in enumerate(ids)},
    )
    entries["place"] = [places[id] for id in ids]
    pictures = (made.jpegs[photo % _DIFFERENT] for photo in photos)
    thumbnails, places = write_tensors(
        folder / shard_file("thumbnails", number),
        dict(zip(images["image_id"], pictures, strict=True)),
    )
    images["thumbnail_place"] = [places[id] for id in images["image_id"]]
    schema = entry_schema(list(METRICS))
    return manifest.Shard(
        write_rows(folder / shard_file("entries", number), schema, entries),
        write_rows(folder / shard_file("images", number), IMAGES, images),
        maps,
        thumbnails,
    )


def _map_of(first: int, row: int) -> int:
    return (first + 7 * row) % _DIFFERENT


def _images(photos: range, methods: int, made: _Made, rng: np.random.Generator) -> dict[str, Any]:
    count, classes = len(photos), np.array(CLASSES, object)
    numbers = np.array(photos)
    ids = [f"photo-{i:07}" for i in photos]
    files = [f"{id}.jpg" for id in ids]
    predicted = rng.integers(0, len(CLASSES), count)
    right = rng.random(count) < 0.75
    label = np.where(right, predicted, (predicted + 1) % len(CLASSES))
    confidence = 0.3 + 0.6 * rng.random(count)
    top = [
        json.dumps([[c, CLASSES[c], p]])
        for c, p in zip(predicted.tolist(), confidence.tolist(), strict=True)
    ]
    return {
        "image_id": ids,
        "file_name": files,
        "title": files,
        "label": label,
        "label_name": classes[label],
        "predicted": predicted,
        "predicted_name": classes[predicted],
        "confidence": confidence,
        "right": right,
        "disagreement": rng.random(count).round(4),
        "methods": np.full(count, methods),
        "top": top,
        "answer": [None] * count,
        "thumbnail_bytes": np.array([len(data) for data in made.jpegs])[numbers % _DIFFERENT],
        "thumbnail_sha256": made.jpeg_hashes[numbers % _DIFFERENT],
    }


def _entries(
    photos: range,
    images: dict[str, Any],
    names: list[str],
    made: _Made,
    rng: np.random.Generator,
) -> dict[str, Any]:
    methods = len(names)
    protocols = np.array([json.dumps(_protocol(m)) for m in range(methods)], object)
    count = len(photos) * methods
    of_photo = {
        key: np.repeat(np.array(images[key], object), methods) for key in ("image_id", "file_name")
    }
    target = np.repeat(images["predicted"], methods)
    method = np.tile(np.arange(methods), len(photos))
    maps = _map_of(photos[0], np.arange(count))  # type: ignore[arg-type]
    p = np.repeat(images["confidence"], methods)
    curves = (p[:, None] * np.linspace(1, 0.02, _POINTS)).round(4).tolist()
    return {
        "entry_id": list(_ids(of_photo["image_id"], target, method)),
        **of_photo,
        "title": of_photo["file_name"],
        "method": np.array(names, object)[method],
        "target": target,
        "target_name": np.array(CLASSES, object)[target],
        "probability": p,
        "is_value": np.zeros(count, bool),
        "is_mask": np.zeros(count, bool),
        "sanity": np.zeros(count, bool),
        "protocol": protocols[method],
        "view": [json.dumps(VIEW.to_json())] * count,
        "min": made.maps.min((1, 2))[maps],
        "max": made.maps.max((1, 2))[maps],
        "curves": [json.dumps({"deletion": values}) for values in curves],
        "height": np.full(count, made.side),
        "width": np.full(count, made.side),
        "sha256": made.map_hashes[maps],
        **{METRIC + key: rng.random(count) for key in METRICS},
    }


def _ids(images: Any, targets: Any, methods: Any) -> Iterator[str]:
    for image, target, method in zip(images, targets.tolist(), methods.tolist(), strict=True):
        yield f"{image}@{target}.method{method}"


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return stream.getvalue()
