"""The networks of the study of positions: copies of a ViT with another encoding, trained for minutes.

    L = KL(softmax z || softmax z'),   z the logits of the network as it was trained

All weights of the copy learn; no labels are read. Where an encoding takes the place of the network's own
positions, each patch gets the mean of these, which says nothing about its place. Order, flips and jitter
are pure functions of seed and step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from xattn.attention.positions import Rotation
from xattn.backbone import Backbone, converted
from xattn.photos.images import load_image
from xattn.photos.view import prepare
from xattn.training.distilling import share_of_peak


@dataclass(frozen=True)
class PositionStudyConfig:
    """What the study of positions trains, on how many photos, and at which sizes it tests."""

    encodings: tuple[str, ...] = (
        "absolute",
        "none",
        "axial",
        "axial:span=14",
        "liere:init_std=0",
        "comrope:form=ap,init_std=0",
        "comrope:form=ld,init_std=0",
    )
    """"absolute", the network's own positions; "none"; or rotations, as NAME:option=value,..."""
    size: int = 224
    """Pixels a side in training."""
    sizes: tuple[int, ...] = (112, 160, 224, 336, 448)
    """Pixels a side in tests."""
    photos: int = 500
    """How many photos, drawn by the seed; every other one is trained on, the rest are tested."""
    keep_absolute: bool = False
    """Rotate beside the network's own positions, not in their place."""
    epochs: int = 6
    """Passes over the photos to train on, the same for every encoding."""
    batch_size: int = 16
    """Photos a step."""
    lr: float = 1e-4
    """Of AdamW, for the network's weights; rises for a twentieth of the steps, then half a cosine to 0."""
    rotation_lr: float = 1e-2
    """Of what a rotation learns."""
    weight_decay: float = 0.01
    """Of the network's matrices."""
    seed: int = 0
    """Of photos, order, flips and jitter."""

    def quick(self) -> PositionStudyConfig:
        """A few photos and steps, to see that all runs: no figure of it means anything."""
        sizes = (self.size // 2, self.size)
        return replace(self, photos=min(self.photos, 16), epochs=1, batch_size=4, sizes=sizes)


ABSOLUTE, NONE = "absolute", "none"


def pixels_of(paths: Sequence[Path], backbone: Backbone) -> Tensor:
    """Photos as the network sees them, uint8 (n, 3, H, W)."""
    preprocessing = backbone.preprocessing
    found = [prepare(load_image(path), preprocessing, "crop")[0] for path in paths]
    return (torch.stack(found) * 255).round().to(torch.uint8)


def images_of(pixels: Tensor, backbone: Backbone) -> Tensor:
    """The inverse, on the network's device: (n, 3, H, W) in [0, 1]."""
    return pixels.to(backbone.device, backbone.mean.dtype) / 255


def student_of(teacher: Backbone, encoding: str, keep_absolute: bool = False) -> Backbone:
    """A copy of ``teacher`` with an encoding of positions, nothing of it shared.

    Raises:
        ValueError: an unknown encoding or one that does not fit, or a network without positions of its own.
    """
    positions = getattr(teacher.model, "pos_embed", None)
    if not isinstance(positions, nn.Parameter):
        raise ValueError(
            f"backbone: {teacher.name} adds no trained positions to its tokens; choose a ViT that does, "
            f"such as vit_tiny_patch16_224"
        )
    network = copy.deepcopy(teacher)
    if encoding not in (ABSOLUTE, NONE):
        network = converted(network, "softmax", None, {"rotate": encoding})
    network.model.requires_grad_(True)
    if encoding != ABSOLUTE and not (keep_absolute and encoding != NONE):
        own: Any = network.model.pos_embed
        patches = math.prod(network.model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            own[:, -patches:] = own[:, -patches:].mean(1, keepdim=True)
        own.requires_grad_(False)
    return network


@torch.no_grad()
def targets_of(teacher: Backbone, pixels: Tensor, batch_size: int) -> Tensor:
    """Logits of the photos as they are and mirrored, (2, n, K)."""
    both = []
    for view in (pixels, pixels.flip(-1)):
        parts = [teacher.logits(images_of(part, teacher)) for part in view.split(batch_size)]
        both.append(torch.cat(parts).float().cpu())
    return torch.stack(both)


def train(
    network: Backbone,
    pixels: Tensor,
    targets: Tensor,
    config: PositionStudyConfig,
    title: str = "",
    progress: bool = True,
) -> float:
    """Train ``network`` in place on the logits ``targets`` (2, n, K) of ``pixels``; the last loss.

    Raises:
        RuntimeError: a loss that is not finite.
    """
    per_epoch = -(-len(pixels) // config.batch_size)
    total, last = per_epoch * config.epochs, float("nan")
    optimizer = _optimizer(network.model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    network.model.eval()
    for module in network.model.modules():
        if isinstance(module, Rotation):
            module.train()  # for its jitter; the network drops nothing
    with tqdm(total=total, desc=title, unit="step", disable=not progress) as bar:
        for step in range(total):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share_of_peak(step, total)
            index, flips = _batch(len(pixels), step, per_epoch, config)
            some = pixels[index]
            some[flips] = some[flips].flip(-1)
            wanted = targets[flips.long(), index].to(network.device)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed * 1_000_003 + step)
                found = network.logits(images_of(some, network)).float()
            loss = F.kl_div(
                found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            last = float(loss.detach())
            if not math.isfinite(last):
                raise RuntimeError(f"{title}: the loss of step {step} is {last}; give a smaller lr")
            bar.set_postfix(loss=f"{last:.3f}")
            bar.update()
    network.model.eval().requires_grad_(False)
    return last


def _batch(
    photos: int, step: int, per_epoch: int, config: PositionStudyConfig
) -> tuple[Tensor, Tensor]:
    """Numbers of the photos of a step, and which of them are mirrored."""
    epoch, at = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(photos, generator=generator, device="cpu")
    flips = torch.rand(photos, generator=generator, device="cpu") < 0.5
    index = order[at * config.batch_size : (at + 1) * config.batch_size]
    return index, flips[index]


def _optimizer(model: nn.Module, config: PositionStudyConfig) -> torch.optim.Optimizer:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    turns = [p for name, p in named if ".rotate." in name]
    rest = [p for name, p in named if ".rotate." not in name]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {"params": turns, "weight_decay": 0.0, "lr": config.rotation_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr)
