"""Draws every explainer's maps of the same six photos; measures the cost of explainers, heads, metrics.

    python -m xattn.eval.studies gallery --vit FILE

The photos ship with scikit-image and scikit-learn, the CNN and its trained heads with packages; the
weights of the ViT are read from a file. For detections and masks, small networks of other studies are
trained here. Methods that take many passes show fewer photos, and some are shortened by
:data:`OPTIONS`. Rows that ``gallery.csv`` holds are not measured again.
"""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from xattn.backbone import Backbone, load_backbone
from xattn.eval import evaluate
from xattn.eval.evaluation.split import Split
from xattn.eval.metrics.registry import GROUPS, create_metric
from xattn.eval.sanity import Cascade
from xattn.eval.studies import detection_cues, lesions
from xattn.eval.studies.gallery_pages import costs_page, gallery_page
from xattn.eval.studies.map_tiles import save_strip, strip_tile
from xattn.eval.studies.metering import Meter, costs, measured
from xattn.eval.studies.options import OutputAt, Quick
from xattn.eval.studies.study_photos import packaged_photos
from xattn.explainers import create_explainer
from xattn.explainers.base import EXPLAINERS, ExplainerEntry
from xattn.heads import load_head
from xattn.heads.base import HEADS, seeded_head
from xattn.models.masks import load_network
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.runtime.files import check_folder, write_rows, write_text

CNN, VIT = "tf_efficientnet_lite0", "vit_tiny_patch16_224"
TRAINED = {"head": "evidence-efficientnet-lite0", "head_ttame": "ttame-efficientnet-lite0"}
OPTIONS: dict[str, dict[str, Any]] = {
    "d_rise": {"masks": 500, "cells": 4, "fill": "mean"},
    "extremal_perturbation": {"steps": 40},
    "igos_pp": {"steps": 2},
    "kernel_shap": {"samples": 200},
    "lime": {"samples": 200},
    "mda": {"cells": 7, "candidates": 4},
    "rise": {"masks": 300},
    "scorecam": {"layer": "blocks.6"},
}
"""Options of methods that are shortened, because their defaults take many passes."""
MOST = 300  # passes of 224 x 224 pixels that a picture may take after its first photo
SMALL = 112  # side in pixels of the photos for metrics
QUICK: dict[str, dict[str, Any]] = {"kernel_shap": {"samples": 100}}


class Photo(NamedTuple):
    """A photo (1, C, H, W) in [0, 1], the class that is explained, and its network."""

    pixels: Tensor
    target: int
    network: Backbone


def study(
    page: Path = Path("docs/gallery.md"),
    vit: Annotated[Path | None, tyro.conf.arg(help="Weights of a vit_tiny_patch16_224.")] = None,
    output: OutputAt = "runs/gallery",
    only: Sequence[str] = (),
    quick: Quick = False,
) -> Iterator[str]:
    """Draw and measure the rows that ``gallery.csv`` lacks, write the pages, and yield a line per row."""
    raw, folder = page.with_suffix(".csv"), page.with_suffix("")
    for place in (folder, Path(output)):
        check_folder(place)
    rows: list[dict[str, Any]] = []
    if raw.is_file():
        with raw.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    known = {(row["kind"], row["name"]) for row in rows}
    for kind, name, measure in jobs(folder, vit, Path(output), quick):
        if (kind, name) in known or (only and name not in only):
            continue
        rows.append({"kind": kind, "name": name, **measure()})
        write_rows(raw, rows)
        told = "{images} images, {backwards} backward, {seconds:.3g} s".format(**rows[-1])
        yield f"{kind} {name}: {told}"
    write_text(page, "\n".join(gallery_page(rows, folder)) + "\n")
    write_text(page.with_name("costs.md"), "\n".join(costs_page(rows)) + "\n")
    yield f"pages: {page}, {page.with_name('costs.md')}"


Row = dict[str, Any]
Measure = Callable[[], Row]


def jobs(
    folder: Path, vit: Path | None, output: Path, quick: bool
) -> Iterator[tuple[str, str, Measure]]:
    """The kind and name of each row, and the function that measures it."""
    shown = GalleryPhotos(vit, output, quick)
    for kind in ("cnn", "small", "vit", "detector", "masks"):
        if kind in ("cnn", "small", "vit") or not quick:
            yield "photos", f"photos-{kind}", lambda kind=kind: shown.photos_row(kind, folder)  # type: ignore[misc]
    for entry in EXPLAINERS.entries():
        if entry.name != "head" and (not quick or network_of(entry) in ("cnn", "vit")):
            yield "explainer", entry.name, lambda entry=entry: shown.row(entry, folder)  # type: ignore[misc]
    for name in {} if quick else TRAINED:
        yield "explainer", name, lambda name=name: shown.trained_row(name, folder)  # type: ignore[misc]
    for name in HEADS.names():
        yield "head", name, lambda name=name: shown.head_row(name)  # type: ignore[misc]
    for name in GROUPS:
        yield "metric", name, lambda name=name: shown.metric_row(name)  # type: ignore[misc]


def network_of(entry: ExplainerEntry) -> str:
    """The kind of network that an explainer is shown on."""
    return "cnn" if "cnn" in entry.networks else entry.networks[0]


class GalleryPhotos:
    """Networks and photos, which are loaded on first use."""

    def __init__(self, vit: Path | None, output: Path, quick: bool) -> None:
        self.vit, self.output, self.quick = vit, output, quick
        self.split = Split("gallery")
        self._photos: dict[str, list[Photo]] = {}

    def photos(self, kind: str) -> list[Photo]:
        if kind not in self._photos:
            make = {"detector": self._detections, "masks": self._masks}
            self._photos[kind] = make[kind]() if kind in make else self._classified(kind)
        return self._photos[kind]

    def _classified(self, kind: str) -> list[Photo]:
        if self.quick:
            tiny = "test_vit" if kind == "vit" else "test_resnet"
            backbone = load_backbone(tiny, weights=None, input_size=32)
        elif kind == "vit":
            if self.vit is None:
                raise ValueError(f"vit: give --vit FILE, the weights of a {VIT}")
            backbone = load_backbone(VIT, weights=str(self.vit))
        else:
            size = SMALL if kind == "small" else None
            backbone = load_backbone(CNN, weights="package", input_size=size)
        files = self.split.score(packaged_photos()[:1] if self.quick else packaged_photos())
        pixels = [prepare(load_image(f), backbone.preprocessing)[0] for f in files]
        with torch.no_grad():
            return [
                Photo(x[None], int(backbone.logits(x[None]).argmax()), backbone) for x in pixels
            ]

    def _detections(self) -> list[Photo]:
        file = self.output / "detector.safetensors"
        detector = detection_cues.trained(detection_cues.DEFAULTS, self.split, file)
        found = []
        for number in self.split.score(detection_cues.marked(6)):
            pixels = detection_cues.picture(number).pixels
            box = detection_cues.diamond(detector, pixels)
            found += [Photo(pixels[None], 0, detector.of(box, "class"))] if box else []
        return found

    def _masks(self) -> list[Photo]:
        folder = self.output / "networks" / "slices-agunet-0"
        config, split = replace(lesions.DEFAULTS, parts=("slices",)), self.split.fold()
        if not folder.is_dir():
            lesions.measure(self.output, config, "slices", "agunet", split, 0)
        classifier = lesions.MaskClassifier(load_network(folder))
        backbone = load_backbone(classifier, class_names=lesions.CLASSES)
        tests = lesions.samples(2, config.tests, lesions.SLICES)
        kept = tests.images[tests.radii > 0][:6].expand(-1, 3, -1, -1)
        return [Photo(x[None], 1, backbone) for x in kept]

    def photos_row(self, kind: str, folder: Path) -> Row:
        photos = self.photos(kind)
        if kind != "small":
            tiles = [strip_tile(photo.pixels[0]) for photo in photos]
            save_strip(folder / f"photos-{kind}.jpg", tiles)
        backbone = photos[0].network
        with torch.no_grad():
            call = lambda: backbone.logits(photos[0].pixels)  # noqa: E731
            call()
            start = time.process_time()
            meter = measured(call, backbone)[1]
        names = "; ".join(p.network.class_names[p.target].partition(",")[0] for p in photos)
        return costs(backbone.name, names, len(photos), meter, time.process_time() - start)

    @staticmethod
    def _quick(entry: ExplainerEntry) -> dict[str, Any]:
        return QUICK.get(entry.name) or dict(entry.cases[0])

    def row(self, entry: ExplainerEntry, folder: Path) -> Row:
        """Draw the maps of an explainer, and measure the cost of the first."""
        options = self._quick(entry) if self.quick else OPTIONS.get(entry.name, {})
        photos = self.photos(network_of(entry))
        return self.drawn(
            folder / f"{entry.name}.jpg",
            photos,
            lambda network: create_explainer(entry.name, network, **options),
            ", ".join(f"{key}={value}" for key, value in options.items()),
        )

    def trained_row(self, name: str, folder: Path) -> Row:
        photos = self.photos("cnn")
        head = load_head(TRAINED[name], photos[0].network)
        make = lambda network: create_explainer("head", network, head)  # noqa: E731
        return self.drawn(folder / f"{name}.jpg", photos, make, TRAINED[name])

    def drawn(
        self, file: Path, photos: Sequence[Photo], make: Callable[[Backbone], Any], options: str
    ) -> Row:
        maps, seconds = [], []
        meter: Meter | None = None
        for photo in photos:
            explainer = make(photo.network)
            if meter is None:
                if not explainer.one_by_one:  # the first call is slower, and one more is cheap
                    explainer.attribute(photo.pixels, photo.target)
            start = time.process_time()
            call = lambda e=explainer, p=photo: e.attribute(p.pixels, p.target)  # noqa: E731
            values, meter = (call(), meter) if meter else measured(call, photo.network)
            seconds.append(time.process_time() - start)
            maps.append(values[0, 0])
            shares = photo.pixels[0, 0].numel() / 224**2  # of the pixels of most networks
            if (len(maps) + 1) * (meter.images + meter.backwards) * shares > MOST:
                break
        assert meter is not None
        kind = (
            "mask"
            if explainer.is_mask
            else "signed"
            if min(map(torch.min, maps)) < 0
            else "positive"
        )
        shown = zip(photos, maps, strict=False)
        save_strip(file, [strip_tile(photo.pixels[0], one, kind) for photo, one in shown])
        took = float(np.median(seconds[1:] or seconds))
        return costs(photos[0].network.name, options, len(maps), meter, took)

    def head_row(self, name: str) -> Row:
        """The cost of a new head, which training does not change."""
        for kind in ("cnn", "vit"):
            photo = self.photos(kind)[0]
            try:
                head = seeded_head(name, photo.network, 0)
                explainer = create_explainer("head", photo.network, head)
                explainer.attribute(photo.pixels, photo.target)
                break
            except (ValueError, TypeError) as error:
                why = str(error).split("; ")[0]
        else:
            return costs(photo.network.name, f"not run: {why}", 0)
        start = time.process_time()
        call = lambda: explainer.attribute(photo.pixels, photo.target)  # noqa: E731
        meter = measured(call, torch.nn.ModuleList([photo.network, head]))[1]
        count = sum(p.numel() for p in head.parameters())
        took = time.process_time() - start
        return costs(photo.network.name, f"{count} parameters", 1, meter, took)

    def metric_row(self, name: str) -> Row:
        """The cost of a group of metrics for Grad-CAM's map of a photo, including the map.

        Four photos go through the network at a time; passes of fewer would be padded to four.
        """
        metric = GROUPS[name].metric
        photos = self.photos("small")[:4]
        backbone = photos[0].network
        if metric.needs_annotation:
            return costs(
                backbone.name, "not run: it reads a map and an annotation, without a pass", 0
            )
        given = {}
        if metric.explains_randomized or metric.compares == "network":
            cascade = Cascade(backbone, max_forward_batch=4).method("gradcam")
            given["randomized"] = {"gradcam": cascade}
        # The network is less certain of such small photos than a mosaic of four requires by default.
        options = {"confidence": 0.0} if metric.compares == "mosaic" else {}
        call = lambda: evaluate(  # noqa: E731
            backbone,
            {"gradcam": "gradcam"},
            torch.cat([photo.pixels for photo in photos]),
            metrics=[create_metric(name, mean=backbone.preprocessing.mean, **options)],
            max_forward_batch=4,
            progress=False,
            **given,
        )
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results, meter = measured(call, backbone, any_size=metric.compares == "mosaic")
        seconds = (time.process_time() - start) / len(photos)
        values = results.methods["gradcam"].values.values()
        if not (self.quick or any(np.isfinite(column).any() for column in values)):
            raise ValueError(f"{name}: no photo has a value, so its cost cannot be measured")
        given_options = ", ".join(f"{key}={value:g}" for key, value in options.items())
        row = costs(backbone.name, given_options, len(photos), meter, seconds)
        return row | {key: row[key] / len(photos) for key in ("images", "backwards", "operations")}
