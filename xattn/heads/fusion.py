"""From feature maps to class maps: the final 1x1 convolution of a head, and the source of its rows.

    c_k = sum_i up( row_i(k) . u_i ) + bias(k),     u_i (B, C_i, h_i, w_i),  up = bilinear to (r, r)

A 1x1 convolution and bilinear up-sampling commute, so each tap is scored at its own resolution and
only the requested class maps are up-sampled. :class:`PerClassFusion` has one free row per class,
as in T-TAME (arXiv 2403.04523); :class:`ClassifierFusion` computes the rows from the frozen classifier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone
from xattn.backbone.taps import resized

TINY = 1e-30  # a classifier of zeros gives maps of zeros, not NaN


def class_rows(class_index: Tensor | int | None, num_classes: int, batch: int) -> Tensor | None:
    """Normalise ``class_index`` to a LongTensor (B or 1, M), or None for all classes.

    An int is one class for the batch, (B,) one class per sample, (B, M) or (1, M) several.
    """
    if class_index is None:
        return None
    if isinstance(class_index, bool) or not isinstance(class_index, int | Tensor):
        raise ValueError(
            f"class_index: got {type(class_index).__name__}; give an int or a LongTensor"
        )
    if isinstance(class_index, int):
        if not 0 <= class_index < num_classes:
            raise ValueError(f"class_index: {class_index} is out of range 0..{num_classes - 1}")
        return torch.tensor([[class_index]], device="cpu")
    if class_index.is_floating_point() or class_index.ndim not in (1, 2):
        raise ValueError(
            f"class_index: got {class_index.dtype} of shape {tuple(class_index.shape)}; "
            f"give integers of shape (B,), (B, M) or (1, M)"
        )
    index = class_index[:, None] if class_index.ndim == 1 else class_index
    if index.shape[0] not in (1, batch) or (class_index.ndim == 1 and index.shape[0] != batch):
        raise ValueError(f"class_index: got {index.shape[0]} targets for a batch of {batch}")
    if not torch.compiler.is_compiling():
        low, high = (int(v) for v in torch.aminmax(index)) if index.numel() else (0, 0)
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            raise ValueError(f"class_index: {bad} is out of range 0..{num_classes - 1}")
    return index


def row_index(class_index: Tensor | int | None, num_classes: int, logits: Tensor) -> Tensor | None:
    """The same indices as those of :func:`class_rows`, as (B, M) on the device of ``logits`` (B, K)."""
    batch = logits.shape[0]  # len would fix an exported graph's batch size
    index = class_rows(class_index, num_classes, batch)
    return None if index is None else index.to(logits.device).expand(batch, -1)


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear resize of (B, M, h, w) or (B, M, t, h, w) to ``size``, corners not aligned."""
    return maps if tuple(maps.shape[2:]) == tuple(size) else resized(maps, size)


class Fusion(nn.Module):
    """Base class that scores maps with rows, which a subclass provides. ``forward(maps, class_index,
    size)``."""

    num_classes: int

    def rows(self, index: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Rows [(1 or B, M, C_i)] and biases (1 or B, M) of the classes in ``index`` (1 or B, M)."""
        raise NotImplementedError

    def forward(
        self, maps: Sequence[Tensor], class_index: Tensor | int | None, size: tuple[int, int]
    ) -> Tensor:
        """maps [(B, C_i, h_i, w_i)] -> raw scores (B, M, *size)."""
        batch = maps[0].shape[0]
        index = class_rows(class_index, self.num_classes, batch)
        rows, bias = self.rows(None if index is None else index.to(maps[0].device))
        total: Tensor | None = None
        for u, row in zip(maps, rows, strict=True):
            score = torch.matmul(row.to(u.dtype), u.flatten(2)).unflatten(2, u.shape[2:])
            score = resize(score, size)
            total = score if total is None else total + score
        assert total is not None
        return total + bias[..., None, None].to(total.dtype)


class PerClassFusion(Fusion):
    """T-TAME's fusion: ``Conv2d(sum C_i, K, 1)``; at inference only the requested rows are computed."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.channels = list(channels)
        self.num_classes = num_classes
        self.conv = nn.Conv2d(sum(channels), num_classes, 1)

    def rows(self, index: Tensor | None) -> tuple[list[Tensor], Tensor]:
        weight = self.conv.weight.flatten(1)
        bias = self.conv.bias
        assert bias is not None
        if index is None:
            return list(weight[None].split(self.channels, -1)), bias[None]
        return list(weight[index].split(self.channels, -1)), bias[index]


class ClassifierFusion(Fusion):
    """Our fusion: the row of class k is an affine function of the classifier's own weight vector w_k.

        row_i(k) = P_i w~_k + q_i,      row_last(k) = s w_k + P w~_k + q,     bias(k) = b + p . w~_k

    with w~ = w scaled to unit root mean square, and P_i and q_i starting at 0. If the last of ``maps``
    is the pooled tap and the classifier pools linearly (``direct=True``), its row starts at w_k itself, so
    that an untrained head ranks pixels exactly as unrectified CAM does. Otherwise it starts at a
    random projection of w_k. No parameter belongs to a single class, so a few hundred photos suffice,
    and classes without training photos can be explained as well.
    """

    weight: Tensor

    def __init__(
        self, channels: Sequence[int], weight: Tensor, direct: bool, rank: int | None = 64
    ) -> None:
        super().__init__()
        self.num_classes, width = weight.shape
        weight = weight.detach().float()
        # The classifier belongs to the backbone: it is used from there and never saved with the head.
        self.register_buffer("weight", weight.clone(), persistent=False)
        self.direct = direct
        self.projections = nn.ModuleList(_projection(width, c, rank) for c in channels)
        self.class_bias = nn.Linear(width, 1)
        nn.init.zeros_(self.class_bias.weight)
        nn.init.zeros_(self.class_bias.bias)
        if direct:
            length = weight.norm(dim=1).mean().clamp_min(TINY)
            self.scale = nn.Parameter(1.0 / length)
        else:
            last = self.projections[-1]
            layer = last[-1] if isinstance(last, nn.Sequential) else last
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5 * width**-0.5)

    def rows(self, index: Tensor | None) -> tuple[list[Tensor], Tensor]:
        raw = self.weight[None] if index is None else self.weight[index]
        w = raw * (
            self.weight.square().mean().clamp_min(TINY).rsqrt() * self.weight.shape[1] ** -0.5
        )
        rows = [project(w) for project in self.projections]
        if self.direct:
            rows[-1] = rows[-1] + self.scale * raw
        return rows, self.class_bias(w).squeeze(-1)


def create_fusion(
    kind: str, backbone: Backbone, channels: Sequence[int], rank: int | None, raw_last: bool = True
) -> Fusion:
    """The fusion for maps with these ``channels``; with ``raw_last``, the rows of ``"classifier"`` also
    read the backbone's last tap.

    Raises:
        ValueError: ``"classifier"`` for a backbone without a single linear classifier.
    """
    if kind == "per_class":
        return PerClassFusion(channels, backbone.num_classes)
    weight = backbone.classifier_weight
    if weight is None:
        raise ValueError(
            f"fusion='classifier': {backbone.name} has no single linear classifier whose rows could "
            f"be used; choose fusion='per_class'"
        )
    if not raw_last:
        return ClassifierFusion(channels, weight, False, rank)
    direct = backbone.pools_linearly
    return ClassifierFusion([*channels, backbone.channels[-1]], weight, direct, rank)


def _projection(width: int, channels: int, rank: int | None) -> nn.Module:
    """An affine map R^width -> R^channels that starts at zero; low-rank if both sides are wide."""
    if rank is None or min(width, channels) <= rank:
        layer = nn.Linear(width, channels)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer
    first, second = nn.Linear(width, rank, bias=False), nn.Linear(rank, channels)
    nn.init.normal_(first.weight, std=rank**-0.5)
    nn.init.zeros_(second.weight)
    nn.init.zeros_(second.bias)
    return nn.Sequential(first, second)
