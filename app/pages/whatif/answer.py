"""The network's answer to a photo and to its changed copy, in numbers, words and bars.

Masks cover the model's input. They come from the browser, or from the cells in which a map is largest. A
mask is (rows, columns) bool on a raster with the input's shape and at most ``MOST_SIDE`` cells per side.
Masks from the browser are not trusted and must have exactly the size of the raster.
"""

from __future__ import annotations

import base64
import binascii
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xattn.app import models
from xattn.app.state import short
from xattn.app.triage import selection
from xattn.eval.fills import fill
from xattn.eval.functional import upsample
from xattn.explainers.masking.masked_passes import superpixels
from xattn.photos.view import prepare
from xattn.pictures.explained import probability_text

if TYPE_CHECKING:
    from xattn.backbone import Backbone
    from xattn.packs.reader import Pack


MOST_SIDE = 384  # cells of a raster's longer side
SEGMENTS = 60  # number of superpixels requested
Mask = NDArray[np.bool_]


def raster_of(input_size: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of masks for an input of (height, width) pixels."""
    scale = min(1.0, MOST_SIDE / max(input_size))
    rows, columns = (max(1, round(side * scale)) for side in input_size)
    return rows, columns


def encode_mask(mask: Mask) -> str:
    """The bits of a mask, row by row, most significant bit first, in base64."""
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def decode_mask(sent: Any, raster: tuple[int, int]) -> Mask:
    """The mask that was sent as ``{"rows", "columns", "bits"}``, where ``bits`` are as :func:`encode_mask`
    writes them.

    Raises:
        ValueError: the form, size or encoding is wrong; nothing is decoded before its length is checked.
    """
    rows, columns = raster
    want = f"give {rows} x {columns} bits in base64"
    if not isinstance(sent, Mapping) or not isinstance(sent.get("bits"), str):
        raise ValueError(f"mask: got no bits; {want}")
    if (sent.get("rows"), sent.get("columns")) != raster:
        size = " x ".join(str(sent.get(name))[:20] for name in ("rows", "columns"))
        raise ValueError(f"mask: got {size}; {want}")
    count = -(-rows * columns // 8)
    if len(sent["bits"]) != 4 * -(-count // 3):
        raise ValueError(f"mask: got {len(sent['bits']):,} characters; {want}")
    try:
        data = base64.b64decode(sent["bits"], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"mask: got characters that are not base64; {want}") from None
    if len(data) != count:
        raise ValueError(f"mask: got {len(data):,} bytes; {want}")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=rows * columns)
    return bits.reshape(raster).astype(bool)


def upsample_mask(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The mask (1, H, W) bool for the pixels of the input; each pixel gets the value of its cell."""
    rows, columns = (
        ((np.arange(side) + 0.5) * cells / side).astype(int)
        for side, cells in zip(size, mask.shape, strict=True)
    )
    return torch.from_numpy(mask[rows[:, None], columns])[None]


def strongest_cells(map: NDArray[Any], share: float, raster: tuple[int, int]) -> Mask:
    """A mask with a share ``share`` of all cells, namely those in which a map (h, w) is largest; ties go to
    the first cells."""
    values = upsample(torch.from_numpy(np.array(map, np.float32))[None, None], raster)[0, 0]
    count = round(share * values.numel())
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    mask = np.zeros(values.numel(), bool)
    mask[order.numpy()] = True
    return mask.reshape(raster)


def region_runs(pixels: Tensor, raster: tuple[int, int]) -> list[int]:
    """The SLIC superpixels of an input (3, H, W) as runs of the raster's cells, row by row: label, count,
    label, count, ..."""
    small = torch.nn.functional.interpolate(
        pixels[None], raster, mode="bilinear", align_corners=False, antialias=True
    )[0]
    labels = superpixels(small, SEGMENTS).flatten().numpy()
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    counts = np.diff(starts, append=len(labels))
    return np.stack([labels[starts], counts], axis=1).flatten().tolist()


TOP = 5  # top classes before, and as many after
FILLS = {"mean": "Mean colour", "blur": "Blur", "black": "Black"}


@dataclass(frozen=True, eq=False)
class NetworkAnswer:
    """A photo as the network sees it: ``pixels`` (3, H, W) in [0, 1], and the network's ``answer``
    (K,), float64."""

    pixels: Tensor
    answer: Tensor


def read_photo(pack: Pack, image_id: str, backbone: Backbone) -> NetworkAnswer:
    """A photo of the pack as its network sees it.

    Raises:
        PackError: the picture is missing or damaged. ValueError: there is not enough memory.
    """
    first = selection.table(pack).entries_of(image_id).index[0]
    mode = pack.view(first).mode
    pixels, _ = prepare(pack.photo(image_id), backbone.preprocessing, mode)
    return NetworkAnswer(pixels, predict(backbone, pixels))


def predict(backbone: Backbone, pixels: Tensor) -> Tensor:
    """The network's answer to pixels (3, H, W) in [0, 1]: a probability for each class, (K,) float64."""
    with models.exclusive_pass(f"for a pass of {backbone.name}"), torch.no_grad():
        images = pixels[None].to(backbone.device, backbone.mean.dtype)
        return backbone.probabilities(backbone.logits(images))[0].cpu()


def hide_cells(pixels: Tensor, hidden: Mask, kind: str, backbone: Backbone) -> Tensor:
    """The input (3, H, W) with the cells of ``hidden`` filled; ``kind`` is one of ``FILLS``."""
    return fill_cells(pixels, hidden, kind, backbone.preprocessing.mean)


def fill_cells(pixels: Tensor, hidden: Mask, kind: str, mean: Sequence[float]) -> Tensor:
    """Pixels (3, H, W) with the cells of ``hidden`` filled; ``mean`` is the colour of the kind "mean"."""
    removed = upsample_mask(hidden, (pixels.shape[1], pixels.shape[2]))
    return torch.where(removed, fill(pixels, removed, kind, mean=mean), pixels)


# ---------------------------------------------------------------------- words


def verdict(before: Tensor, after: Tensor | None, backbone: Backbone) -> str:
    """A sentence with the top class before the change, its probability before and after, and the new top
    class if it is another one.

    >>> from types import SimpleNamespace
    >>> names = SimpleNamespace(class_names=["tench, Tinca tinca", "hand"], task="multiclass")
    >>> verdict(torch.tensor([0.82, 0.1]), torch.tensor([0.31, 0.4]), names)
    'tench 82.0% → 31.0%; now first: hand 40.0%'
    """
    first = int(before.argmax())
    text = f"{short(backbone.class_names[first])} {_amount(before[first], backbone)}"
    if after is None:
        return text
    text += f" → {_amount(after[first], backbone)}"
    now = int(after.argmax())
    if now == first:
        return f"{text}; still first" if len(after) > 1 else text
    return f"{text}; now first: {short(backbone.class_names[now])} {_amount(after[now], backbone)}"


def classes_to_show(before: Tensor, after: Tensor | None) -> list[int]:
    """The classes to show: the top classes before the change, and then those after it."""
    count = min(TOP, len(before))
    answers = [before] if after is None else [before, after]
    return list(dict.fromkeys(k for p in answers for k in p.topk(count).indices.tolist()))


def bars(before: Tensor, after: Tensor | None, backbone: Backbone) -> str:
    """An HTML table of :func:`classes_to_show`, with bars for the values before and after, and with the
    change."""
    answers = {"before": before} if after is None else {"before": before, "after": after}
    most = 1.0
    if backbone.task == "regression":
        most = max(max(float(p.abs().max()) for p in answers.values()), 1e-12)
    rows = []
    for k in classes_to_show(before, after):
        values = {name: float(p[k]) for name, p in answers.items()}
        lines = "".join(
            f'<i class="{name}"><b style="width:{min(max(v / most, 0.0), 1.0):.2%}"></b></i>'
            for name, v in values.items()
        )
        numbers = [_amount(v, backbone) for v in values.values()]
        if after is not None:
            numbers.append(_difference(float(before[k]), float(after[k]), backbone))
        rows.append(
            f'<tr><th scope="row">{html.escape(short(backbone.class_names[k]))}</th>'
            f'<td aria-hidden="true">{lines}</td>{"".join(f"<td>{n}</td>" for n in numbers)}</tr>'
        )
    titles = [*answers, "change"] if after is not None else list(answers)
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        f'{_STYLE}<table class="answers"><thead><tr><th scope="col">class</th><td></td>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _amount(value: Tensor | float, backbone: Backbone) -> str:
    return probability_text(float(value), backbone.task == "regression")


def _difference(before: float, after: float, backbone: Backbone) -> str:
    """A change in percentage points; for outputs that are not probabilities, the plain difference."""
    if backbone.task == "regression":
        return f"{after - before:+.3g}".replace("-", "−")
    points = 100 * (after - before)
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "−")


_STYLE = """<style>
.answers{width:100%;border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
.answers tbody tr{border-top:1px solid light-dark(#e7e3dc,#2f2c28)}
.answers :is(th,td){padding:.4rem .75rem .4rem 0;text-align:right;font-weight:400;vertical-align:middle}
.answers :is(th,td):last-child{padding-right:0}
.answers thead th{color:var(--quiet);font-size:.8125rem;padding-block:.1rem}
.answers th:first-child{text-align:left;overflow-wrap:anywhere}
.answers td:nth-child(2){width:42%}
.answers td:nth-child(n+3){width:1%;white-space:nowrap}
.answers i{display:block;height:7px;border-radius:4px;overflow:hidden;
background:light-dark(#e7e3dc,#2f2c28)}
.answers i+i{margin-top:3px}
.answers b{display:block;height:100%;border-radius:4px}
.answers .before b{background:light-dark(#8c867d,#8f897f)}.answers .after b{background:var(--accent)}
@media(max-width:480px){.answers td:nth-child(2){width:30%}}
</style>"""
