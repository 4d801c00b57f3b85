"""Where objects and evidence are: boxes, masks, and the names of their classes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from fuzz.engine import target
from fuzz.labels import lines, nasty_json
from fuzz.mutations import deep
from xattn.eval.annotations import load_annotations
from xattn.parts.evidence import evidence_mask, open_evidence
from xattn.photos.view import View

NETWORK = SimpleNamespace(name="network", class_names=["cat", "dog", "person", "7"])
VIEW = View("crop", (24, 32), (24, 32), (0, 4, 24, 24), (24, 24))
PHOTO = Image.new("RGB", (32, 24))


def png(values: Any, mode: str = "L", format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(values)).convert(mode).save(stream, format)
    return stream.getvalue()


def _of(path: Path) -> None:
    masks = load_annotations(path, NETWORK).of("7.jpg", VIEW).masks
    assert all(mask.shape == (1, 24, 24) for mask in masks.values())


def _box_files(boxes: Sequence[Any]) -> list[bytes]:
    return [json.dumps({"7.jpg": boxes, "other.jpg": []}).encode()]


def _nasty_boxes() -> list[bytes]:
    huge = "1" + "0" * 400
    corners = (
        f"[0, 0, {huge}, 9]", f"[{huge}, 0, 1, 9]", "[1e999, 0, 1, 9]", "[0, 0, NaN, 1]", "[-1e308, -1e308, 1e308, 1e308]",
        "[0, 0, 0, 0]", "[0, 0, -5, -5]", "[]", "[[]]", "null", '"1234"', "[true, false, true, true]", "[0, 0, 1]",
        '{"0": 0, "1": 1, "2": 2, "3": 3}', deep(900), deep(50_000), f"[{'9' * 5000}, 0, 1, 9]", '["0", "0", "9", "9"]',
    )  # fmt: skip
    kinds = (
        "[]",
        "{}",
        "null",
        "1e999",
        huge,
        "-1",
        "true",
        '"caat"',
        f'"{"x" * 100_000}"',
        "15.0",
        deep(900),
    )
    files = [f'{{"7.jpg": [{{"class": "cat", "box": {box}}}]}}' for box in corners]
    files += [f'{{"7.jpg": [{{"class": {kind}, "box": [1, 1, 9, 9]}}]}}' for kind in kinds]
    files += [f'{{"7.jpg": [{box}]}}' for box in corners]
    files += ['{"7.jpg": [[[0, 0], [9, 0], [9, 1e300]]]}', '{"7.jpg": [[[0, 0], [9, 0]]]}', '{"7.jpg": {}}',
              f'{{"7.jpg": [[[0, 0], [9, 0], [9, {huge}]]]}}', '{"7.jpg": [{"polygon": []}]}']  # fmt: skip
    return [*(text.encode() for text in files), *nasty_json()]


@target(
    "boxes json",
    "boxes.json",
    lambda: _box_files(
        [{"class": "cat", "box": [1, 2, 9, 10.5]}, {"class": 16, "box": [5, 5, 30, 20]}]
    ),
    _nasty_boxes,
    says="annotations: ",
    share=2,
)
def boxes_json(folder: Path) -> None:
    _of(folder / "boxes.json")


@target(
    "boxes yolo",
    "boxes/7.txt",
    valid=lambda: [lines("15 0.5 0.5 0.2 0.3", "16 .25 .25 .1 .1", "")],
    nasty=lambda: [b"", b"\n", b"\xff", b"15", b"15 nan nan nan nan", b"15 inf 0 1 1", b"15 1e999 0 1 1", b"15 0.5 0.5 -1 -1",
                   b"9" * 5000 + b" .5 .5 .1 .1", b"15 " + b"9" * 100_000 + b" 1 1 1", b"15 1_0 .5 .1 .1", b"-1 .5 .5 .1 .1",
                   b"99999999999999999999 .5 .5 .1 .1", "１５ ０.5 .5 .1 .1".encode(), b"15 .5 .5 .1 .1 .1"],
    says="annotations: ",
)  # fmt: skip
def boxes_yolo(folder: Path) -> None:
    _of(folder)


def _masks() -> list[bytes]:
    values = np.zeros((24, 32), np.uint8)
    values[4:12, 6:20] = 17
    values[14:20, 10:30] = 18
    return [png(values), png(values, "P")]


@target(
    "mask",
    "masks/7.png",
    valid=_masks,
    nasty=lambda: [
        b"", b"\x89PNG\r\n\x1a\n", png(np.zeros((24, 32, 3), np.uint8), "RGB"), png(np.zeros((24, 32), np.uint8), "1"),
        png(np.full((24, 32), 17, np.uint8), "RGBA"), png(np.zeros((1, 1), np.uint8)), png(np.zeros((3000, 1), np.uint8)),
        png(np.full((24, 32), 17, np.uint8), "L", "JPEG"), png(np.full((24, 32), 7000, np.uint16), "I;16"),
    ],
    says="annotations: ",
)  # fmt: skip
def mask(folder: Path) -> None:
    _of(folder)


def _one_mask(folder: Path) -> None:
    (folder / "masks").mkdir()
    (folder / "masks" / "7.png").write_bytes(_masks()[0])


@target(
    "classes yaml",
    "classes.yaml",
    valid=lambda: [b"classes:\n  17: cat\n  18: dog\n  0: background\n", b'classes: {"17": "cat", 18: dog}\nmore: [1, 2]\n'],
    nasty=lambda: [
        b"", b"classes:", b"classes: []", b"classes: {a: b}", b"- classes", b"\t", b"\x00", b"\xff", b"classes: {[1]: cat}",
        b"classes: {.inf: cat}", b"classes: {.nan: cat}", b"classes: {17: &a [*a]}", b"classes: &a {17: *a}", b"classes: {? {a: b} : cat}",
        b"classes: {1e999: cat}", b"classes: {17: cat, 17: dog}", b"classes: {17: 2026-99-99}", b"classes: {2026-01-01: cat}",
        b"classes: !!python/object/apply:os.system [id]", b"classes: {17: !!binary x}", b"classes: {17: !!timestamp x}",
        b"classes: {!!float x: cat}", b"classes: {!!int '': cat}", b"classes: {17: 0b_}", b"classes: {17: 0x_}", b"classes: {17: ._}",
        b"classes: {<<: 5}", b"classes: {17: =}", b"%YAML 9.9\n---\nclasses: {}", b"--- a\n--- b", b"classes: {17: '\\ud800'}",
        b'classes: {17: "\\ud800"}', b'classes: {17: "\\UFFFFFFFF"}', deep(300).encode(), deep(20_000).encode(),
        deep(5_000, "{a: ", "}").encode(), b"- " * 5_000, b"? " * 5_000, b"classes: {" + b"9" * 5000 + b": cat}",
        b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(ord("a"), ord("i"))
        ) + b"classes: {17: *i}\n",
        b"a: &a {17: cat}\nclasses: {<<: [*a, *a]}\n",
        b"a: &a [x,x,x]\n" + b"".join(
            b"%c: &%c {<<: [%s]}\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(ord("a"), ord("i"))
        ) + b"classes: {17: *i}\n",
    ],
    template=_one_mask,
    says="annotations: ",
    share=2,
)  # fmt: skip
def classes_yaml(folder: Path) -> None:
    _of(folder)


def _marked(source: Path) -> None:
    evidence = open_evidence(source)
    assert evidence_mask(evidence("photos/7.jpg", PHOTO), PHOTO.size).shape == (24, 32)


@target(
    "evidence boxes",
    "boxes.json",
    lambda: _box_files([[1, 2, 9, 10.5], [[1, 1], [9, 1], [5, 9]], {"box": [5, 5, 30, 20]}]),
    _nasty_boxes,
    says="evidence: ",
    share=2,
)
def evidence_boxes(folder: Path) -> None:
    _marked(folder / "boxes.json")


@target(
    "evidence mask",
    "masks/7.png",
    valid=_masks,
    nasty=lambda: [b"", b"\x89PNG\r\n\x1a\n", png(np.zeros((24, 32, 3), np.uint8), "RGB"), png(np.zeros((24, 32), np.uint8), "1"),
                   png(np.zeros((1, 1), np.uint8)), png(np.zeros((24, 32), np.uint8), "L", "BMP")],
    says="evidence: ",
    share=0.5,
)  # fmt: skip
def evidence_masks(folder: Path) -> None:
    _marked(folder / "masks")


@target(
    "evidence network",
    "net.onnx",
    valid=lambda: [],
    nasty=lambda: [
        b"",
        b"\x00" * 100,
        b"\x08\x07" + b"\xff" * 50,
        b"onnx",
        b"\x08\x07\x3a\x02\x0a\x00",
    ],
    says="evidence: ",
    share=0.3,
)
def evidence_network(folder: Path) -> None:
    open_evidence(f"onnx:{folder / 'net.onnx'}")("7.jpg", PHOTO)
