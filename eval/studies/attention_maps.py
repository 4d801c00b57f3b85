"""Draws the maps of each attention mechanism for one photo, a picture for each mechanism.

    python -m xattn.eval.studies attention-maps photo.jpg -b vit_tiny_patch16_224 --weights FILE

Every layer of a trained ViT gets the mechanism, the photo is run once, and one layer's maps are drawn
(:meth:`xattn.attention.base.Mechanism.maps`). A mechanism's entry in the registry gives the options,
the size and the layer at which it is worth seeing: one that is dense on 14 x 14 patches needs a
larger photo or smaller blocks. Nothing is trained here; ``distilled`` takes conversions that
``xattn distill`` wrote.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.attention import conversion, list_attention, record
from xattn.attention.base import Mechanism, mechanism_class
from xattn.attention.model.spec import format_layers, format_mechanism
from xattn.attention.record import Call
from xattn.backbone import Backbone, converted, load_conversion, resized
from xattn.backbone.conversion import read_conversion
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.map_tiles import map_tile
from xattn.eval.studies.options import Network, OutputAt, PhotosAt
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.pictures.contact_sheet import Cell, Row, contact_sheet_image
from xattn.pictures.scales import Legend
from xattn.runtime.files import atomic_file, check_folder

SIDE = 224  # side of a tile in pixels, a multiple of 14, 28 and 56 patches
COLUMNS = 4
LARGEST = 60_000  # bytes of a picture, unless a JPEG of quality 50 is larger
AMOUNTS = Legend("least", "greatest", "of each map; means are over heads")


class Channels(NamedTuple):
    """Channels of a map that are shown one by one: the name of one, and their numbers; None for all."""

    what: str
    numbers: Sequence[int] | None = None


@dataclass(frozen=True)
class Setting:
    """How a mechanism is shown.

    Attributes: ``options``, of the mechanism; ``size``, the photo's side in pixels; ``positions``, see
    :func:`xattn.backbone.resized`; ``depth``, which of the layers that have maps, from 0, the first, to 1,
    the last; ``channels``, of maps that are not shown as the mean over their channels; ``legends``, colour
    scales of maps whose values are not amounts.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 448
    positions: str = "resize"
    depth: float = 0.5
    channels: Mapping[str, Channels] = field(default_factory=dict)
    legends: Mapping[str, Legend] = field(default_factory=dict)


def setting_of(name: str) -> Setting:
    """The setting in the mechanism's registry entry, under ``studies["attention-maps"]``.

    The entry holds arguments of :class:`Setting`, with plain tuples as channels and legends."""
    asked = dict(mechanism_class(name).entry.studies.get("attention-maps", {}))
    for key, kind in (("channels", Channels), ("legends", Legend)):
        asked[key] = {of: kind(*values) for of, values in asked.get(key, {}).items()}
    return Setting(**asked)


def with_maps() -> list[str]:
    """The mechanisms that have maps of their own."""
    return [name for name in list_attention() if mechanism_class(name).maps is not Mechanism.maps]


def study(
    backbone: Network,
    photo: PhotosAt,
    output: OutputAt = "runs/attention-maps",
    *,
    only: Sequence[str] = (),
    size: int | None = None,
    layer: int | None = None,
    distilled: Sequence[Path] = (),
) -> Iterator[str]:
    """Draw a picture ``NAME.jpg`` of each mechanism into ``output``, and yield a line for each.

    Args:
        backbone: a trained ViT, which is not changed.
        only: draw only these mechanisms.
        size, layer: used instead of those in a mechanism's entry.
        distilled: folders with conversions of ``backbone``, each drawn in place of the untrained one.
    """
    if conversion(backbone.model):
        raise ValueError(
            f"mechanism: {backbone.name} is converted already; give the network as it was trained"
        )
    names = _chosen(only)
    folders = {read_conversion(folder)[0].name: folder for folder in distilled}
    for name in set(folders) - set(names):
        raise ValueError(
            f"distilled: {folders[name]} holds {name}; this study draws {', '.join(names)}"
        )
    (photo,) = Split("attention maps").score([Path(photo)])
    image = load_image(photo)
    output = Path(output)
    check_folder(output)
    for name in names:
        sheet = _sheet(backbone, image, name, size, layer, folders.get(name))
        path = output / f"{name}.jpg"
        _save(sheet, path)
        yield f"{name}: {path}, {path.stat().st_size / 1000:.0f} kB"


def _chosen(only: Collection[str]) -> list[str]:
    known = with_maps()
    for name in only:
        if name not in known:
            raise ValueError(
                f"only: got {name!r}, no mechanism with maps of its own; choose from {', '.join(known)}"
            )
    return [name for name in known if not only or name in only]


def _sheet(
    backbone: Backbone,
    photo: Image.Image,
    name: str,
    size: int | None,
    layer: int | None,
    folder: Path | None,
) -> Image.Image:
    """The picture of one mechanism."""
    setting = setting_of(name)
    dense = resized(backbone, size or setting.size, setting.positions)
    if folder is None:
        options = dict(setting.options)
        network = converted(dense, name, None, options)
    else:
        options = read_conversion(folder)[0].options
        network = load_conversion(folder, backbone, dense)
    pixels = prepare(photo, dense.preprocessing)[0]
    calls = _calls(network, pixels)
    at = _layer(calls, name, setting.depth, layer)
    tile = Image.fromarray((255 * pixels.permute(1, 2, 0).numpy()).round().astype(np.uint8))
    tile = tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    cells = [Cell(tile, "photo", "as the network sees it")]
    maps = calls[at].maps
    grid = next(iter(maps.values())).shape[2:]
    if "received" in maps:
        before = _received(_calls(dense, pixels)[at], dense.prefix_tokens, grid)
        cells.append(map_tile(tile, "received, as trained", before))
    for key, values in maps.items():
        cells += _cells(tile, key, values[0], setting)
    columns = math.ceil(len(cells) / math.ceil(len(cells) / COLUMNS))
    return contact_sheet_image(
        [Row("", cells[i : i + columns]) for i in range(0, len(cells), columns)],
        format_mechanism(name, options),
        SIDE,
        legends=[AMOUNTS, *dict.fromkeys(setting.legends.values())],
        notes=[_caption(network, setting, grid, f"{at} of 0 to {len(calls) - 1}", folder)],
    )


@torch.no_grad()
def _calls(network: Backbone, pixels: Tensor) -> list[Call]:
    with record(network.model) as calls:
        network.logits(pixels[None].to(network.device, network.mean.dtype))
    return calls


def _layer(calls: Sequence[Call], name: str, depth: float, layer: int | None) -> int:
    """The layer to draw: ``layer``, or the one at ``depth`` among those that have maps."""
    some = [i for i, call in enumerate(calls) if call.maps]
    if not some:
        raise ValueError(f"only: {name} has no maps in this network; leave it out")
    if layer is not None and layer not in some:
        raise ValueError(
            f"layer: got {layer}; {name} has maps in layers {format_layers(some)}, choose one"
        )
    return some[round(depth * (len(some) - 1))] if layer is None else layer


@torch.no_grad()
def _received(call: Call, prefix: int, grid: Sequence[int]) -> Tensor:
    """(h, w): the attention that each patch gets from all tokens, averaged over heads; 1 is the mean."""
    ones = call.output.new_ones(1, 1, call.output.shape[2])
    return call.operator.vecmat(ones, "mean")[0, 0, prefix:].unflatten(-1, tuple(grid))


def _cells(tile: Image.Image, key: str, values: Tensor, setting: Setting) -> list[Cell]:
    """The tiles of a map, values (K, h, w)."""
    colours = setting.legends.get(key, AMOUNTS).cmap
    one_by_one = setting.channels.get(key)
    if one_by_one is None:
        mean = f"mean of {len(values)}, " if len(values) > 1 else ""
        return [map_tile(tile, key, values.mean(0), colours, mean)]
    what, numbers = one_by_one
    chosen = range(len(values)) if numbers is None else numbers
    return [map_tile(tile, f"{key}, {what} {i}", values[i], colours) for i in chosen]


def _caption(
    network: Backbone, setting: Setting, grid: Sequence[int], layer: str, folder: Path | None
) -> str:
    height, width = network.preprocessing.input_size
    tiled = ", positions tiled" if setting.positions == "tile" else ""
    modules = [m for m in network.model.modules() if isinstance(m, Mechanism)]
    training = "Converted without training"
    if folder is not None:
        training = "Trained by xattn distill"
    elif any(True for m in modules for _ in m.parameters()):
        training += "; the parameters of the mechanism are as they were initialised"
    base = network.name.partition(" ")[0]
    return (
        f"{base}, {height} x {width} pixels, {grid[0]} x {grid[1]} patches{tiled}, layer {layer}. "
        f"{training}."
    )


def _save(sheet: Image.Image, path: Path) -> None:
    """Save ``sheet`` as JPEG, in lower quality if it is large."""
    for quality in (88, 80, 70, 60, 50):
        stream = io.BytesIO()
        sheet.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= LARGEST:
            break
    with atomic_file(path) as temporary:
        temporary.write_bytes(stream.getvalue())
