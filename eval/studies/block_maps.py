"""Maps of the networks that the study of blocks trains, on a few digits, and the picture of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from xattn.attention.record import record
from xattn.backbone import load_backbone
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.digits import load_digits
from xattn.eval.studies.map_tiles import map_tile
from xattn.eval.studies.models.block_net import BlockNet
from xattn.explainers import create_explainer
from xattn.pictures.contact_sheet import Cell, Row, contact_sheet_image
from xattn.pictures.overlay import DIVERGING, SEQUENTIAL
from xattn.pictures.scales import Legend
from xattn.runtime.files import atomic_file

SHOWN = (0, 3, 6, 8)  # of each of these classes the first digit that is held out
SIDE = 144  # pixels of a tile
GRADIENT = "gradient x gate"
LEGENDS = (
    Legend("least", "greatest", "of each map"),
    Legend("against", "for", "the class, gradient x gate", cmap=DIVERGING),
)


def _digits() -> Tensor:
    _, held_out = load_digits()
    first = [int((held_out.labels == k).nonzero()[0]) for k in SHOWN]
    return held_out.images[first]


def block_maps(net: BlockNet, split: Split) -> dict[str, Any]:
    """The classes that ``net`` predicts for the digits that are shown, and its last block's maps of them,
    (n, h, w) by name."""
    images = split.score(_digits())
    with torch.no_grad(), record(net) as calls:
        classes = net(images).argmax(1)
    maps = {name: values.mean(1) for name, values in calls[-1].maps.items()}
    if "gate" in maps:
        layer = f"blocks.{len(net.blocks) - 1}.gating"
        hires = create_explainer("hirescam", load_backbone(net), layer=layer, relu=False)
        maps[GRADIENT] = hires.attribute(images, classes)[:, 0]
    return {"classes": classes.tolist(), "maps": {k: m.tolist() for k, m in maps.items()}}


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """The picture of :func:`block_maps` by network: a line for each digit."""
    rows = []
    for i, image in enumerate(_digits()):
        cells = [Cell(_tile(image[0]), f"digit {SHOWN[i]}")]
        pale = _tile(image[0], 0.5)
        for name, of in found.items():
            cells += [_cell(pale, name, title, of, i) for title in of["maps"]]
        rows.append(Row("", cells))
    sheet = contact_sheet_image(rows, side=SIDE, legends=LEGENDS)
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def _tile(ink: Tensor, strength: float = 1.0) -> Image.Image:
    pixels = Image.fromarray((255 * (1 - strength * ink)).byte().numpy())
    return pixels.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB")


def _cell(tile: Image.Image, name: str, title: str, of: Mapping[str, Any], i: int) -> Cell:
    maps: Mapping[str, Sequence[Any]] = of["maps"]
    heading, colours = f"{name}: {title}", SEQUENTIAL
    if title == GRADIENT:
        heading, colours = title, DIVERGING
    cell = map_tile(tile, heading, torch.tensor(maps[title][i]), colours)
    return Cell(cell.image, cell.title, f"class {of['classes'][i]}; {cell.detail}")
