"""Attention sinks of a trained ViT: where they are, which heads to calibrate, and what maps gain.

    python -m xattn.eval.studies sinks photos/ --labels classes.json -b vit_tiny_patch16_224 --weights FILE

A head is calibrated (:mod:`xattn.attention.mechanisms.act`) if that alone raises the mean
log-probability of the true classes of the validation photos, which are every other photo;
``by="accuracy"`` counts correct photos, as the paper does, but needs many of them. The other photos
are for testing. An artefact is a patch whose value is over 5 times the mean of its explanation's map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xattn.attention import Inputs, convert, converted_copy, create_mechanism, record
from xattn.attention.mechanisms.act import ACT
from xattn.attention.operators.base import SoftmaxOperator
from xattn.backbone import Backbone
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import LabelsAt, Network, PhotosAt
from xattn.explainers import create_explainer
from xattn.explaining.naming import named_photos
from xattn.explaining.passes import true_classes_of
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.pictures.overlay import colorize

BATCH = 8
STRIDE = 8
Heads = Mapping[int, tuple[int, ...]]


def calibrated(backbone: Backbone, heads: Heads, **options: Any) -> Backbone:
    """A copy that shares the weights, with its ``heads`` (numbers by layer) calibrated."""
    made: Backbone | None = None
    for layer, chosen in heads.items():
        own = {**options, "heads": list(chosen)}
        if not chosen:
            continue
        if made is None:
            made = converted_copy(backbone, "act", [layer], own)
        else:
            convert(made, "act", [layer], own)
    return backbone if made is None else made


@torch.no_grad()
def search_heads(
    backbone: Backbone,
    images: Tensor,
    classes: Tensor,
    *,
    layers: Sequence[int] | None = None,
    by: str = "likelihood",
    progress: Callable[[str], object] = lambda line: None,
    **options: Any,
) -> dict[int, tuple[int, ...]]:
    """The heads whose individual calibration helps, by layer.

    Args:
        images: (B, 3, H, W) in [0, 1]; ``classes``: LongTensor (B,), the true ones.
        layers: the layers to search; all by default.
        by: the criterion, "likelihood" (mean log-probability of the true classes) or "accuracy".
        options: options of ``act``, except ``heads``.
    """
    if by not in ("likelihood", "accuracy"):
        raise ValueError(f"by: got {by!r}; give 'likelihood' or 'accuracy'")

    def score(network: Backbone) -> float:
        right, likelihood = judged(network, images, classes)
        return float((likelihood if by == "likelihood" else right.double()).mean())

    blocks: Any = backbone.model.blocks
    base, found = score(backbone), {}
    for layer in range(len(blocks)) if layers is None else layers:
        better = []
        for head in range(blocks[layer].attn.num_heads):
            if score(calibrated(backbone, {layer: (head,)}, **options)) > base:
                better.append(head)
        found[layer] = tuple(better)
        progress(f"layer {layer}: heads {', '.join(map(str, better)) or 'none'}")
    return found


@torch.no_grad()
def judged(network: Backbone, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly, bool (B,), and its class's log-probability (B,)."""
    logits = torch.cat([network.logits(x) for x in images.split(BATCH)]).double()
    right = logits.argmax(1) == classes
    return right, logits.log_softmax(1).gather(1, classes[:, None])[:, 0]


def study(
    backbone: Network,
    data: PhotosAt,
    labels: LabelsAt = "folders",
    every: int = 1,
    picture: Path | None = None,
    by: str = "likelihood",
    explainer: str = "rollout",
) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        data, labels, every: photos and their classes, as for ``python -m xattn.eval.studies swap``.
        picture: a file for a picture of four photos with their maps before and after calibration.
        by: the criterion of the search for heads.
        explainer: the explainer whose maps are shown.
    """
    sources = named_photos(data)[::every]
    truth = true_classes_of(sources, labels, backbone)
    known = [(s, k) for name, s in sources if (k := truth.get(name, (None, None))[0]) is not None]
    if len(known) < 2:
        raise ValueError(f"labels: {len(known)} of {len(sources)} photos have a class; give 2")
    pixels = [prepare(load_image(s), backbone.preprocessing, "crop")[0] for s, _ in known]
    images = torch.stack(pixels).to(backbone.device, backbone.mean.dtype)
    classes = torch.tensor([k for _, k in known], device=backbone.device)
    yield f"{backbone.name}, {len(known)} photos, half of them to search heads with"
    yield from _sinks(backbone, Split("sinks, as trained").score(images))
    lines: list[str] = []
    split = Split("sinks", images)
    own, rest = split.choose(slice(0, None, 2)), split.score(slice(1, None, 2))
    heads = search_heads(backbone, images[own], classes[own], by=by, progress=lines.append)
    yield f"\nHeads that the search ({by}) calibrates:\n"
    yield from (f"* {line}" for line in lines)
    blocks: Any = backbone.model.blocks
    every_head = {i: tuple(range(b.attn.num_heads)) for i, b in enumerate(blocks)}
    networks = {
        "as trained": backbone,
        "all heads": calibrated(backbone, every_head),
        "searched heads": calibrated(backbone, heads),
    }
    yield f"\n| {len(images[rest])} other photos | right, % | log-probability | artefacts a map |"
    yield "| :-- | --: | --: | --: |"
    shown = []
    for name, network in networks.items():
        right, likelihood = judged(network, images[rest], classes[rest])
        maps = _maps(network, images[rest], classes[rest], explainer)
        shown.append(maps)
        peaks = (maps > 5.0 * maps.mean((1, 2), keepdim=True)).sum((1, 2))
        yield (
            f"| {name} | {100 * float(right.double().mean()):.1f} | {float(likelihood.mean()):.3f} "
            f"| {float(peaks.double().mean()):.2f} |"
        )
    if picture is not None:
        draw(images[rest][:4], [maps[:4] for maps in shown], picture)
        yield f"\npicture: {picture}"


@torch.no_grad()
def _sinks(backbone: Backbone, images: Tensor) -> Iterator[str]:
    """A table of sinks by layer and head, and of how many are found from a subset of the queries."""
    yield f"\n| layer | sinks a photo, by head | recall of every {STRIDE}-th query, % |"
    yield "| --: | :-- | --: |"
    counts: dict[int, Tensor] = {}
    recalled: dict[int, list[int]] = {}
    for part in images.split(BATCH):
        with record(backbone.model) as calls:
            backbone.logits(part)
        for i, call in enumerate(calls):
            operator, prefix = call.operator, backbone.prefix_tokens
            assert isinstance(operator, SoftmaxOperator)
            heads, width = operator.shape[1], operator.q.shape[-1]
            act: Any = create_mechanism("act", heads * width, heads, stride=STRIDE)
            assert isinstance(act, ACT)
            asked = Inputs(operator.q, operator.k, call.value, prefix=prefix, scale=operator.scale)
            found = act.sinks(act.received_attention(operator, asked, 1), prefix)
            counts[i] = counts.get(i, 0) + found.sum((0, 2)).cpu()
            recalled[i] = [
                a + b for a, b in zip(recalled.get(i, (0, 0)), act.sink_recall(asked), strict=True)
            ]
    for i, total in counts.items():
        a, b = recalled[i]
        each = ", ".join(f"{float(n) / len(images):.1f}" for n in total)
        yield f"| {i} | {each} | {f'{100 * a / b:.1f}' if b else ''} |"
    a, b = (sum(x) for x in zip(*recalled.values(), strict=True))
    yield f"| all | | {f'{100 * a / b:.1f}' if b else ''} |"


def _maps(network: Backbone, images: Tensor, classes: Tensor, explainer: str) -> Tensor:
    made = create_explainer(explainer, network)
    parts = zip(images.split(BATCH), classes.split(BATCH), strict=True)
    return torch.cat([made.attribute(x, k)[:, 0].float().cpu() for x, k in parts])


def draw(images: Tensor, maps: Sequence[Tensor], path: Path, side: int = 112) -> None:
    """Draw a row for each photo: the photo, then its maps, all on the scale of the row's first map."""
    rows = []
    for i, image in enumerate(images.cpu()):
        photo = Image.fromarray((255 * image.permute(1, 2, 0).numpy()).astype(np.uint8))
        cells = [np.asarray(photo.resize((side, side)))]
        top = float(maps[0][i].max()) or 1.0
        for of in maps:
            coloured = Image.fromarray(colorize((of[i] / top).clamp(0, 1).numpy()))
            cells.append(np.asarray(coloured.resize((side, side), Image.Resampling.NEAREST)))
        rows.append(np.concatenate(cells, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)
