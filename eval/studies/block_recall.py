"""How near block-choosing mechanisms come to the exact choice, with a trained ViT's queries and keys.

    python -m xattn.eval.studies recall photos/ -b vit_tiny_patch16_224 --weights FILE

For a block of queries, the exact choice is as many blocks, namely those that get most of its dense
attention; see :mod:`xattn.attention.recall`. All blocks that are read are counted, and, where some
blocks are always read, the others are also counted apart. The control is a random choice of as many
blocks, including those that are always read. A folder that ``xattn distill`` wrote shows how trained
layers choose among the same queries and keys. Figures are means over layers, heads and photos, with
the standard error over photos.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xattn.attention import Blocks, Inputs, Mechanism, create_mechanism, record
from xattn.attention.model.spec import parse_mechanism
from xattn.attention.operators.base import SoftmaxOperator
from xattn.attention.recall import Choice, recall
from xattn.backbone import Backbone, load_conversion, resized
from xattn.backbone.conversion import read_conversion
from xattn.eval.evaluation.split import Split
from xattn.eval.studies.options import Network, PhotosAt
from xattn.explaining.naming import Source, named_photos
from xattn.photos.images import load_image
from xattn.photos.view import prepare

BATCH = 4
SETTINGS = (  # none is dense at 28 x 28 patches
    # Among 49 tiles of 4 x 4, each of which hip (by quarters) and llsa score.
    "hip:keep=256,block=16",
    "hip:keep=256,block=16,search=halves",
    "infllm_v2:block=4,stride=2,dense_below=0,selected=13",
    "llsa",
    "nsa:block=4,selected=8",
    # Among 196 tiles of 2 x 2, which these search in two rounds or more.
    "hip:keep=96,block=4",
    "hip:keep=96,block=4,search=halves",
    "llsa:block=2,selected=24",
)


@dataclass(frozen=True)
class Measured:
    """What was measured of one setting in one layer, for some photos."""

    read: float  # Blocks per list, on average.
    count: int  # All blocks.
    values: Mapping[bool, Tensor]
    """By ``forced`` (see :func:`xattn.attention.recall.recall`), those beside blocks that are always read
    only where there are such: (B, 4), blocks and mass of the choice, then those of random blocks."""


def study(
    backbone: Network,
    data: PhotosAt,
    sizes: Sequence[int] = (448,),
    photos: int = 16,
    settings: Sequence[str] = SETTINGS,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        backbone: a trained ViT with softmax attention; its positions are resized to the ``sizes``.
        data: photos, see :func:`xattn.explaining.naming.named_photos`.
        photos: how many of them to use; ``seed`` draws the photos and the random blocks.
        settings: mechanisms as NAME:option=value,..., or folders of conversions of ``backbone`` that
            xattn distill wrote, whose own layers are measured.
    """
    sources = named_photos(data)
    if min(photos, len(sources)) < 2:
        raise ValueError(f"photos: got {photos} of {len(sources)}; give at least 2 for an error")
    random.Random(seed).shuffle(sources)
    sources = sources[:photos]
    yield f"{backbone.name}, weights sha256 {backbone.fingerprint[:12]}, {len(sources)} photos"
    for size in sizes:
        network = resized(backbone, size)
        if not (network.is_vit and network.has_grid):
            raise ValueError(f"backbone: {backbone.name} has no patch grid; choose a ViT of timm")
        layers = {setting: _mechanisms(setting, backbone, network) for setting in settings}
        shown = Split("recall").score([source for _, source in sources])
        yield from _table(network, size, shown, layers, seed)


def _mechanisms(setting: str, backbone: Backbone, network: Backbone) -> dict[int, Mechanism]:
    """The mechanism that chooses blocks in each layer: one for all layers, or those of a conversion."""
    blocks: Any = network.model.blocks
    if Path(setting).is_dir():
        made, _ = read_conversion(setting)
        blocks = load_conversion(setting, backbone, network).model.blocks
        return {i: blocks[i].attn.mechanism for i in made.layers}
    name, options = parse_mechanism(setting)
    heads, dim = blocks[0].attn.num_heads, blocks[0].attn.qkv.in_features
    mechanism = create_mechanism(name, dim, heads, **options)
    return dict.fromkeys(
        range(len(blocks)), mechanism.to(network.device, network.mean.dtype).eval()
    )


def _table(
    network: Backbone,
    size: int,
    sources: Sequence[Source],
    mechanisms: Mapping[str, Mapping[int, Mechanism]],
    seed: int,
) -> Iterator[str]:
    generator = torch.Generator().manual_seed(seed)
    grid = network.grid(size, size)
    found: dict[str, list[list[Measured]]] = {setting: [] for setting in mechanisms}
    for start in range(0, len(sources), BATCH):
        images = [load_image(source) for source in sources[start : start + BATCH]]
        pixels = torch.stack([prepare(x, network.preprocessing, "crop")[0] for x in images])
        calls = _inputs(network, pixels.to(network.device, network.mean.dtype), grid)
        for setting, chosen in mechanisms.items():
            each = (measured(mechanism, calls[i], generator) for i, mechanism in chosen.items())
            layers = [layer for layer in each if layer is not None]
            if layers:
                found[setting].append(layers)
    yield f"\n{size} px, {grid[0]} x {grid[1]} patches\n"
    yield "| setting | blocks read | counted | recall, % | random, % | mass, % | random, % |"
    yield "| :-- | :-- | :-- | --: | --: | --: | --: |"
    for setting, batches in found.items():
        if not batches:
            yield f"| `{setting}` | all: dense | | | | | |"
            continue
        one = batches[0][0]
        read = statistics.mean(layer.read for layers in batches for layer in layers)
        for forced in one.values:
            means = [torch.stack([x.values[forced] for x in layers]).mean(0) for layers in batches]
            blocks, mass, *control = torch.cat(means).double().cpu().unbind(1)
            cells = " | ".join(_percent(x) for x in (blocks, control[0], mass, control[1]))
            counted = "all" if forced else "beside those always read"
            yield f"| `{setting}` | {read:.1f} of {one.count} | {counted} | {cells} |"


def _percent(x: Tensor) -> str:
    """Mean and standard error of values (photos,), in percent."""
    return f"{100 * float(x.mean()):.1f} ± {100 * float(x.std()) / len(x) ** 0.5:.1f}"


@torch.no_grad()
def _inputs(network: Backbone, images: Tensor, grid: tuple[int, int]) -> list[Inputs]:
    """The queries and keys of every layer."""
    with record(network.model) as calls:
        network.logits(images)
    prefix, found = network.prefix_tokens, []
    for call in calls:
        a: Any = call.operator
        whole = isinstance(a, SoftmaxOperator) and a.bias is None and not a.causal
        if not whole or a.shape[2] != a.shape[3] or a.shape[2] != prefix + grid[0] * grid[1]:
            break
        found.append(Inputs(a.q, a.k, call.value, None, grid, prefix, a.scale))
    if not found or len(found) < len(calls):
        raise ValueError(
            f"backbone: the attention of {network.name} is no plain softmax over all tokens; choose a "
            f"ViT of timm without --mechanism"
        )
    return found


@torch.no_grad()
def measured(mechanism: Mechanism, inputs: Inputs, generator: torch.Generator) -> Measured | None:
    """A mechanism's choice in one layer, and a random one, against the exact choice; None if the
    mechanism is dense there."""
    choice = mechanism.choice(inputs)
    if choice is None:
        return None
    control = random_choice(choice, inputs, generator)
    values = {}
    for forced in (True, False) if choice.forced is not None else (True,):
        pair = (recall(inputs, each, forced=forced) for each in (choice, control))
        values[forced] = torch.stack([x.mean(1) for each in pair for x in each], 1)
    read = float((choice.blocks.index >= 0).sum(3).float().mean())
    count = len(choice.tokens(inputs)) // choice.blocks.k_block
    return Measured(read, count, values)


def random_choice(choice: Choice, inputs: Inputs, generator: torch.Generator) -> Choice:
    """A choice with as many blocks in every list: those that are always read, and others at random. Not
    for causal inputs."""
    lists, device = choice.blocks.index, choice.blocks.index.device
    real = (choice.tokens(inputs) >= 0).unflatten(0, (-1, choice.blocks.k_block)).any(1)
    score = torch.rand(*lists.shape[:3], len(real), generator=generator, device="cpu").to(device)
    score = score.masked_fill(~real, -1.0).masked_fill(choice.always(len(real)), 2.0)
    values, index = score.topk(min(lists.shape[3], len(real)))
    room = torch.arange(index.shape[3], device=device) < (lists >= 0).sum(3, keepdim=True)
    index = index.masked_fill(~room | (values < 0), -1).int()
    blocks = Blocks(index, choice.blocks.q_block, choice.blocks.k_block)
    return Choice(blocks, choice.order, choice.forced)
