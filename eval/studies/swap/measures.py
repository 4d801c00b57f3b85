"""What the swap study measures of a network beside the one as it was trained, photo by photo.

right, same       whether the class is the true one, and the trained network's
patch cosine      mean over patches of cos(z_i, z'_i), last tokens of the two networks
class cosine      the same for the vector that the classifier reads
map agreement     rank correlation of both networks' maps of the class that the trained one predicts
AD, IC, ADD, insertion, deletion, ROAD    of the network's map of its own class, in its own eyes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.model.spec import parse_mechanism
from xattn.backbone import Backbone
from xattn.correlation import spearman
from xattn.eval.evaluation.engine import evaluate
from xattn.eval.metrics.base import Column, Probe
from xattn.eval.metrics.registry import create_probe
from xattn.eval.protocol import Protocol
from xattn.explainers import Explainer, create_explainer
from xattn.training.closeness import last_tokens

PIXELS = 8 * 224 * 224  # of the photos alive in a pass
LEVEL = 0.5  # of the pixels that a mask keeps: at 1 a map without contrast looks best

Values = dict[str, list[float]]
"""Of some photos, by measure."""


def batch_size(size: int) -> int:
    """Photos of ``size`` x ``size`` pixels a pass."""
    return max(1, round(PIXELS / size**2))


@dataclass(frozen=True)
class Explaining:
    """The explainer whose maps are compared and scored, as NAME:option=value, and the metrics' steps."""

    explainer: str
    steps: int

    def of(self, network: Backbone) -> Explainer:
        name, options = parse_mechanism(self.explainer)
        size = batch_size(network.preprocessing.input_size[0])
        return create_explainer(name, network, None, 0, size, **options)

    def probes(self, protocol: Protocol, mean: Sequence[float]) -> list[Probe]:
        colour = tuple(float(v) for v in mean)
        return [
            create_probe("masking", protocol, colour, metrics=("AD", "IC", "ADD")),
            create_probe("insertion-deletion", protocol, colour, steps=self.steps),
            create_probe("road", protocol, colour),
        ]


@dataclass
class Block:
    """Some photos, and what the network as it was trained makes of them, computed when it is needed."""

    images: Tensor
    """(n, 3, H, W) in [0, 1]"""
    labels: Tensor
    """LongTensor (n,)"""
    dense: Backbone
    explaining: Explaining

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Last tokens (n, N, C) and logits (n, K)."""
        return outputs(self.dense, self.images)

    @cached_property
    def maps(self) -> Tensor:
        """Of the predicted class, (n, 1, h, w)."""
        return self.explaining.of(self.dense).attribute(self.images, self.seen[1].argmax(1))


@torch.no_grad()
def outputs(network: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Last tokens (n, N, C) and logits (n, K) of all images, some at a time."""
    parts = [last_tokens(network, part) for part in images.split(batch_size(images.shape[-1]))]
    tokens, logits = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logits)


@torch.no_grad()
def quality(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """``right``, ``same``, ``patch cosine`` and ``class cosine`` of the photos ``at``."""
    tokens, logits = outputs(network, block.images[at])
    theirs, known = (x[at] for x in block.seen)
    patches = slice(network.prefix_tokens, None)
    near = F.cosine_similarity(tokens[:, patches].double(), theirs[:, patches].double(), dim=-1)
    read, known_read = (
        net.model.forward_head(x, pre_logits=True).double()  # type: ignore[operator]
        for net, x in ((network, tokens), (block.dense, theirs))
    )
    classes = logits.argmax(1)
    return {
        "right": (classes.cpu() == block.labels[at]).double().tolist(),
        "same": (classes == known.argmax(1)).double().tolist(),
        "patch cosine": near.mean(1).tolist(),
        "class cosine": F.cosine_similarity(read, known_read, dim=-1).tolist(),
    }


def agreement(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """``map agreement`` of the photos ``at``; NaN for a constant map."""
    explainer = block.explaining.of(network)
    own = explainer.attribute(block.images[at], block.seen[1][at].argmax(1))
    return {"map agreement": spearman(own, block.maps[at]).tolist()}


def fidelity(block: Block, at: Sequence[int], network: Backbone) -> Values:
    """The metrics of the photos ``at``; NaN for a map that is constant or not finite."""
    explainer = block.explaining.of(network)
    protocol = Protocol(levels=(LEVEL,))
    found = evaluate(
        network, {"map": explainer}, block.images[at],
        metrics=block.explaining.probes(protocol, network.preprocessing.mean), protocol=protocol,
        max_forward_batch=batch_size(block.images.shape[-1]), progress=False,
    )  # fmt: skip
    values = found.methods["map"].values
    return {name: values[column].tolist() for name, column in FIDELITY.items()}


FIDELITY = {
    "AD": Column("AD", LEVEL),
    "IC": Column("IC", LEVEL),
    "ADD": Column("ADD", LEVEL),
    "insertion": Column("insertion"),
    "deletion": Column("deletion"),
    "ROAD": Column("ROAD"),
}
Measure = Callable[[Block, Sequence[int], Backbone], Values]
PARTS: Mapping[str, Measure] = {"quality": quality, "maps": agreement, "fidelity": fidelity}


def plain(values: Values) -> dict[str, list[Any]]:
    """For JSON, which has no NaN."""
    return {key: [None if math.isnan(v) else v for v in column] for key, column in values.items()}
