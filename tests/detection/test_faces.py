"""A real detector through the callable interface: the faces that MTCNN, of facenet-pytorch, finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import xattn
from xattn.detection import load_detector
from xattn.eval import evaluate
from xattn.explainers import create_explainer

facenet = pytest.importorskip("facenet_pytorch")
data = pytest.importorskip("skimage.data")

FACE = (175, 60, 275, 200)  # of the astronaut, about


@pytest.fixture(scope="module")
def detector():
    net = facenet.MTCNN(keep_all=True, min_face_size=30, device="cpu")

    def faces(images):
        found = []
        for image in images:
            pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
            boxes, scores = net.detect(pixels)
            if boxes is None:
                boxes, scores = [], []
            labels = np.zeros(len(boxes), int)
            boxes, scores = (np.asarray(v, np.float32) for v in (boxes, scores))
            found.append({"boxes": boxes, "labels": labels, "scores": scores.clip(0, 1)})
        return found

    return load_detector(faces, input_size=160, class_names=["face"])


def test_maps_of_a_face_lie_on_it_and_hiding_what_they_mark_hides_it(detector):
    photo = Image.fromarray(data.astronaut())
    [one, *_] = detector.detect(photo, 0.9)
    x0, y0, x1, y1 = FACE
    width, height = (
        max(0, min(one.box[i + 2], FACE[i + 2]) - max(one.box[i], FACE[i])) for i in (0, 1)
    )
    assert width * height > 0.6 * (x1 - x0) * (y1 - y0) and one.name == "face"
    options = {"d_rise": {"masks": 60, "cells": 6}, "occlusion": {"size": 32, "stride": 16}}
    made = xattn.explain_detections(
        photo, detector, list(options), detections=[one], options=options
    )
    for found in made:
        heat = found.view.to_photo(found.map)
        y, x = np.unravel_index(np.nanargmax(heat), heat.shape)
        assert one.box[0] < x < one.box[2] and one.box[1] < y < one.box[3], found.method
    view = detector.of([one])
    maps = torch.from_numpy(np.array(made[1].map))[None, None]
    rows = {
        "occlusion": lambda images, target: maps.expand(len(images), -1, -1, -1),
        "random": create_explainer("random", view),
    }
    results = evaluate(
        view,
        rows,
        photo,
        metrics="insertion-deletion",
        classes=0,
        progress=False,
        max_forward_batch=4,
    )
    own, other = (
        {c.key: float(v[0]) for c, v in results.methods[name].values.items()} for name in rows
    )
    assert own["deletion"] < other["deletion"] and own["insertion"] > other["insertion"]
    with pytest.raises(ValueError, match="^explainer: 'odam' reads feature maps"):
        create_explainer("odam", view)
