"""Class maps of a classifier's feature map: one map per class, linear in the classifier's rows.

    pooled maps        map_k = w_k . f,   or (w_k o gamma) . f if a norm follows the mean
    a class token      map_k = sum_i sum_h A_ih o (w_k o gamma) O_ih V_ih x_i
    a probed network   the exact class maps of the trained head
    detections         <f, mean f in the box>, only for evidence, see DetectionReading

f (B, C, h, w) is averaged and then classified; gamma is the gain of the last norm; x_i (B, C, N) are the
patches that block i reads. A class token sees the patches through attention: A_ih (N) are its weights in
head h of block i, V and O the block's projections of values and outputs. The map is what the blocks add to
the class token's part of logit k, patch by patch. The norm's divisor is omitted: it is the same at all
positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.backbone.families.transformers_networks import Projections, TransformersBlock
from xattn.backbone.pooled_features import linear_classifier
from xattn.backbone.taps import parse_tap
from xattn.heads.attentive import AttentiveHead
from xattn.heads.fusion import resize
from xattn.heads.probed import Probed
from xattn.kernels.softmax.reference import widen


class ReadMaps(NamedTuple):
    """``own`` (B, M, h, w), the maps of the requested classes; ``others`` (B, M, h, w), for each requested
    class the mean map over all other classes, weighted by their probabilities; ``extra`` (B, E, h, w), maps
    that belong to no class."""

    own: Tensor
    others: Tensor
    extra: Tensor | None = None


class ClassReading(nn.Module):
    """``reading(taps, index, task) -> ReadMaps``, index (B, M) or None for all classes.

    It uses weights of the backbone, which are never saved with a head.
    """

    extras = 0

    def forward(self, taps: Taps, index: Tensor | None, task: str) -> ReadMaps:
        raise NotImplementedError

    def own(self, taps: Taps, index: Tensor) -> Tensor:
        """Only the maps (B, M, h, w) of the classes ``index`` (B, M)."""
        raise NotImplementedError


class ClassWeights(NamedTuple):
    """Probabilities ``p`` (B, K), the most probable classes ``top`` (B, 1), and ``rest`` (B, K), the
    weights of all other classes once the top class is left out."""

    p: Tensor
    top: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, task: str) -> ClassWeights:
        log_p = F.logsigmoid(logits) if task == "multilabel" else logits.log_softmax(1)
        top = log_p.argmax(1, keepdim=True)
        others = log_p.scatter(1, top, -torch.inf)
        rest = others.softmax(1) if logits.shape[1] > 1 else torch.zeros_like(logits)
        return cls(log_p.exp(), top, rest)

    def others(self, own: Tensor, mean: Tensor, rest: Tensor, index: Tensor | None) -> Tensor:
        """For each class of ``index`` (B, M), the mean map over all other classes. It is computed from the
        map of the class itself, ``own`` (B, M, h, w), and from two weighted sums of all maps (B, 1, h, w):
        ``mean``, weighted by the probabilities, and ``rest``, weighted by the attribute ``rest``.

        For the most probable class, which may have nearly all of the probability, the result is ``rest``
        itself, because computing the mean as a difference would lose precision.
        """
        if index is None:
            index = torch.arange(self.p.shape[1], device=self.p.device).expand_as(self.p)
        p = self.p.gather(1, index)
        is_top = index == self.top
        left = torch.where(is_top, 1.0, self.p.sum(1, keepdim=True) - p)
        p, left, is_top = (v.view(*v.shape, *[1] * (own.ndim - 2)) for v in (p, left, is_top))
        return torch.where(is_top, rest, (mean - p * own) / left)


class RowReading(ClassReading):
    """Base class of class maps from the rows (K, C) of one linear classifier."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", widen(weight.detach()).clone(), persistent=False)

    def forward(self, taps: Taps, index: Tensor | None, task: str) -> ReadMaps:
        weights = ClassWeights.of(taps.logits, task)
        weight = self.weight.to(weights.p.dtype)
        own = weight.expand(weights.p.shape[0], -1, -1) if index is None else weight[index]
        rows = torch.cat([own, (weights.p @ weight)[:, None], (weights.rest @ weight)[:, None]], 1)
        maps, extra = self.read(taps, rows)
        others = weights.others(maps[:, :-2], maps[:, -2:-1], maps[:, -1:], index)
        return ReadMaps(maps[:, :-2], others, extra)

    def own(self, taps: Taps, index: Tensor) -> Tensor:
        return self.read(taps, self.weight.to(taps.logits.dtype)[index])[0]

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, R, h, w) of ``rows`` (B, R, C), and the maps that belong to no class."""
        raise NotImplementedError


class PooledReading(RowReading):
    """Apply the classifier's rows to the last map, which the network averages before it classifies."""

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        last = taps.maps[-1]
        return torch.matmul(rows, last.flatten(2)).unflatten(2, last.shape[2:]), None


class TokenReading(RowReading):
    """What the class token reads from each patch in ``blocks``, which are keyed by the position of the tap
    before each block."""

    def __init__(self, weight: Tensor, blocks: dict[int, Projections]) -> None:
        super().__init__(weight)
        self.places = list(blocks)
        self.extras = len(blocks)
        self.layers = nn.ModuleList(TokenAttention(found) for found in blocks.values())

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        added, weights = [], []
        for place, layer in zip(self.places, self.layers, strict=True):
            prefix = taps.prefixes[place] if taps.prefixes else None
            if prefix is None:
                raise ValueError(
                    "taps: the prefix tokens of the norm1 taps (prefixes) are missing; use taps from a "
                    "pass of the backbone"
                )
            of_rows, attention = layer(taps.maps[place], prefix, rows)
            added.append(of_rows)
            weights.append(attention)
        return torch.stack(added).sum(0), torch.cat(weights, 1)


class TokenAttention(nn.Module):
    """The class token's row of softmax attention in one block: ``layer(patches, prefix, rows)`` takes
    (B, C, h, w), (B, P, C) and (B, R, C). It returns what each patch adds to the products of the class
    token with the rows (B, R, h, w), without biases, and the mean of the heads' weights (B, 1, h, w)."""

    q_weight: Tensor  # (H, D, C), like k_weight and v_weight
    q_bias: Tensor  # (H, D); a bias of keys shifts all scores alike, a bias of values all patches
    k_weight: Tensor
    v_weight: Tensor
    out: Tensor  # (C, H, D)

    def __init__(self, made: Projections) -> None:
        super().__init__()
        self.scale = made.scale
        for name, value in (("q_weight", made.q), ("k_weight", made.k), ("v_weight", made.v)):
            self._keep(name, widen(value.detach()).unflatten(0, (made.heads, -1)))
        bias = made.q.new_zeros(len(made.q)) if made.q_bias is None else made.q_bias
        self._keep("q_bias", widen(bias.detach()).unflatten(0, (made.heads, -1)))
        out = widen(made.out.detach())
        out = out if made.gain is None else out * widen(made.gain.detach())[:, None]
        self._keep("out", out.unflatten(1, (made.heads, -1)))

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.clone(), persistent=False)

    def forward(self, patches: Tensor, prefix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        grid, x = patches.shape[2:], patches.flatten(2)
        kept = {name: buffer.to(x.dtype) for name, buffer in self.named_buffers()}
        q = torch.einsum("hdc,bc->bhd", kept["q_weight"], prefix[:, 0]) + kept["q_bias"]
        keys = torch.einsum("bhd,hdc->bhc", q * self.scale, kept["k_weight"])
        scores = torch.cat([keys @ prefix.transpose(1, 2), keys @ x], -1)
        attention = scores.softmax(-1)[..., prefix.shape[1] :]
        values = torch.einsum("brc,chd,hde->brhe", rows, kept["out"], kept["v_weight"])
        added = (torch.einsum("brhe,ben->brhn", values, x) * attention[:, None]).sum(2)
        return added.unflatten(2, grid), attention.mean(1, keepdim=True).unflatten(2, grid)


class ProbeReading(ClassReading):
    """The exact class maps of the head that is the classifier of a probed network."""

    def __init__(self, probe: AttentiveHead) -> None:
        super().__init__()
        self._probe = [probe]  # in a list, so that this module does not own its weights

    def forward(self, taps: Taps, index: Tensor | None, task: str) -> ReadMaps:
        weights, maps = ClassWeights.of(taps.logits, task), self._maps(taps)
        mean, rest = (torch.einsum("bk,bkhw->bhw", w, maps)[:, None] for w in weights[::2])
        if index is None:
            return ReadMaps(maps, weights.others(maps, mean, rest, index))
        own = _of_classes(maps, index)
        return ReadMaps(own, weights.others(own, mean, rest, index))

    def own(self, taps: Taps, index: Tensor) -> Tensor:
        return _of_classes(self._maps(taps), index)

    @torch.no_grad()
    def _maps(self, taps: Taps) -> Tensor:
        """Maps of all classes, (B, K, h, w)."""
        maps: Tensor = self._probe[0](taps)
        return maps


def _of_classes(maps: Tensor, index: Tensor) -> Tensor:
    """The maps of the classes ``index`` (B, M), selected from maps (B, K, h, w) of all."""
    return maps.gather(1, index[..., None, None].expand(-1, -1, *maps.shape[2:]))


class DetectionReading(ClassReading):
    """Reads the maps of detections in ``boxes`` (K, 4): what resembles the object, and where its box is.

        own_k = mean over levels of <f - mean f, v_k> / its deviation,    v_k = mean of f - mean f in box k
        own_k - others_k = the share of each cell that is inside box k

    f (C, h, w) is a feature map of the detector, and k a detection. A detection has no row of a classifier,
    and the heads of the families have no part in common, so the mean feature of the box takes the row's
    place: it is known after one pass, for any family and for boxes that were never seen. The outcomes are
    the probabilities of the view on masked photos, so the usual table and objective train the head.
    """

    boxes: Tensor  # (K, 4), as Backbone.boxes

    def __init__(self, boxes: Tensor) -> None:
        super().__init__()
        self.register_buffer("boxes", boxes, persistent=False)

    def forward(self, taps: Taps, index: Tensor | None, task: str) -> ReadMaps:
        boxes = self.boxes[None] if index is None else self.boxes[index]
        boxes = boxes.expand(len(taps.logits), -1, -1)
        size = max((tuple(f.shape[2:]) for f in taps.maps), key=lambda s: s[0] * s[1])
        own = torch.stack([resize(_likeness(widen(f), boxes), size) for f in taps.maps]).mean(0)
        return ReadMaps(own, own - covered(boxes, size))

    def own(self, taps: Taps, index: Tensor) -> Tensor:
        return self(taps, index, "multilabel").own


def _likeness(f: Tensor, boxes: Tensor) -> Tensor:
    """(B, M, h, w) with mean 0 and deviation 1: products of the centred f (B, C, h, w) with its means in
    ``boxes`` (B, M, 4)."""
    centred = f - f.mean((2, 3), keepdim=True)
    inside = covered(boxes, f.shape[2:]).to(f.dtype)
    means = torch.einsum("bmhw,bchw->bmc", inside, centred)
    means = means / inside.sum((2, 3)).clamp_min(1e-12)[..., None]
    maps = torch.einsum("bmc,bchw->bmhw", means, centred)
    return maps / maps.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def covered(boxes: Tensor, size: tuple[int, ...]) -> Tensor:
    """The share (B, M, h, w) of each cell of a grid of ``size`` (h, w) that is inside each of ``boxes`` (B,
    M, 4).

    >>> covered(torch.tensor([[[0.0, 0.0, 0.5, 0.75]]]), (2, 2))
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.0000]]]])
    """
    x, y = (
        (
            torch.minimum(boxes[..., axis + 2, None] * count, cells + 1)
            - torch.maximum(boxes[..., axis, None] * count, cells)
        ).clamp_min(0)
        for axis, count in enumerate(size[::-1])
        for cells in (torch.arange(count, device=boxes.device),)
    )
    return y[..., :, None] * x[..., None, :]


# ---------------------------------------------------------------------- choosing the reading for a network


def class_reading(backbone: Backbone, asked: str = "head: evidence") -> ClassReading:
    """The class reading of the last taps of ``backbone``. Error messages begin with ``asked``, which names
    the part of the toolkit that needs the reading.

    Raises:
        ValueError: the network has no classes, or does not end in one linear classifier of pooled maps or
            of a class token.
    """
    backbone.require_classes()
    try:
        return _fitting_reading(backbone)
    except UnknownReading as error:
        remedy = (
            "train 'ttame' with fusion='per_class' (--head ttame --fusion per_class), or a classifier of "
            "your own with xattn probe"
        )
        from xattn.detection.detector import Detections, Detector

        if backbone.reads_clips or isinstance(backbone, Detector | Detections):
            remedy = "use 'gradcam' or 'occlusion'"  # which ttame and probes do not replace
        if isinstance(backbone, Detector) and asked == "head: evidence":
            remedy = "give detections, detector.of(detector.detect(photo))"
        raise ValueError(
            f"{asked} needs the classifier's rows, and {backbone.name} does not show how it uses them "
            f"({error}); {remedy}"
        ) from None


class UnknownReading(Exception):
    """Raised if no class reading of a network is known; the text gives the reason."""


def _fitting_reading(backbone: Backbone) -> ClassReading:
    if isinstance(backbone, Probed):
        return ProbeReading(backbone.probe)
    weight = backbone.classifier_weight
    if weight is None:
        raise UnknownReading("it has no single linear classifier")
    if backbone.pools_linearly:
        return PooledReading(weight)
    if backbone.is_vit:
        return _vit_reading(backbone, weight)
    if backbone.adapter:
        return PooledReading(before_norms(weight, _norm_of_mean(backbone, weight)))
    if backbone.taps[-1] != "head":
        raise UnknownReading(f"its last tap, {backbone.taps[-1]}, is not the map that it pools")
    norm = getattr(getattr(backbone.model, "head", None), "norm", None)  # as in ConvNeXt
    return _pooled_reading(backbone, weight, norm)


def _pooled_reading(backbone: Backbone, weight: Tensor, norm: nn.Module | None) -> PooledReading:
    """For a network that averages the tap ``"head"``, then normalises and classifies it."""
    if weight.shape[1] != backbone.channels[-1] or not _averages(backbone, norm):
        raise UnknownReading("it does more than average its last map and classify it linearly")
    return PooledReading(before_norms(weight, norm))


def _vit_reading(backbone: Backbone, weight: Tensor) -> RowReading:
    model: Any = backbone.model
    pool, fc_norm = getattr(model, "global_pool", None), getattr(model, "fc_norm", None)
    if pool == "avg":
        if backbone.taps[-1] != "head":
            taps = " ".join([*backbone.taps[1:], "head"])
            raise UnknownReading(
                f"it averages its final tokens, which are not tapped; load it with --taps {taps}"
            )
        return _pooled_reading(backbone, weight, fc_norm)
    if pool != "token" or backbone.prefix_tokens == 0:
        raise UnknownReading(f"it pools its tokens by {pool!r}, not by 'token' or 'avg'")
    if getattr(model, "head_dist", None) is not None:
        raise UnknownReading("it classifies two tokens")
    rows = before_norms(weight, fc_norm, getattr(model, "norm", None))
    return TokenReading(rows, _read_blocks(backbone))


def _read_blocks(backbone: Backbone) -> dict[int, Projections]:
    """The attention of the blocks after the ``norm1`` taps, by position of the tap."""
    if backbone.conversion:
        raise UnknownReading("its attention is not the softmax that it was built with")
    blocks: dict[int, Projections] = {}
    for place, tap in enumerate(backbone.taps):
        kind, index, _ = parse_tap(tap)
        if kind != "norm1":
            continue
        block = backbone.model.blocks[index]  # type: ignore[index,union-attr]
        found = _projections(block)
        if found is None:
            name = f"{type(block).__name__} with {type(getattr(block, 'attn', block)).__name__}"
            raise UnknownReading(f"what the class token reads in its {name} is not known")
        blocks[place] = found
    if not blocks:
        raise UnknownReading(
            "none of its taps is what a block's attention reads; load it with --taps norm1"
        )
    return blocks


def _projections(block: Any) -> Projections | None:
    """The projections of a block's attention; None unless it is plain softmax attention."""
    if isinstance(block, TransformersBlock):
        return block.projections()
    if not isinstance(block, Block) or not is_plain(block.attn):
        return None
    attention: Any = block.attn
    q, k, v = attention.qkv.weight.chunk(3)
    bias = attention.qkv.bias
    bias = None if bias is None else bias[: len(q)]
    gain = getattr(block.ls1, "gamma", None)  # if there is a layer scale
    heads, scale = int(attention.num_heads), float(attention.scale)
    return Projections(q, k, v, bias, attention.proj.weight, gain, heads, scale)


def is_plain(attention: Any) -> bool:
    """Whether an attention module computes only softmax(q k) v and a projection, without norms or gates."""
    if (
        type(attention) is not Attention
        or attention.qkv.out_features != 3 * attention.proj.in_features
    ):
        return False
    if getattr(attention, "gate", None) is not None:
        return False
    between = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm"))
    return all(norm is None or isinstance(norm, nn.Identity) for norm in between)


def before_norms(rows: Tensor, *norms: nn.Module | None) -> Tensor:
    """The rows (K, C) rewritten for the input of ``norms``, last norm first, up to the scale by which the
    norms divide.

    w . LayerNorm(x) = (w gamma - mean(w gamma)) . x / deviation(x) + constant
    """
    for norm in norms:
        gain = getattr(norm, "weight", None)
        rows = rows if gain is None else rows * gain
        if isinstance(norm, nn.LayerNorm):
            rows = rows - rows.mean(1, keepdim=True)
    return rows


@torch.no_grad()
def _averages(backbone: Backbone, norm: nn.Module | None) -> bool:
    """Whether the logits of the final features are W norm(mean over patches) + b."""
    model: Any = backbone.model
    weight, bias = linear_classifier(model)
    assert weight is not None
    count = math.prod(backbone.tap_sizes[-1])
    draw = torch.Generator().manual_seed(0)
    size = (2, backbone.prefix_tokens + count, weight.shape[1])
    tokens = torch.rand(size, generator=draw, device="cpu").to(weight) - 0.3
    mean = tokens[:, backbone.prefix_tokens :].mean(1)
    if not backbone.is_vit:
        tokens = tokens.unflatten(1, backbone.tap_sizes[-1])
        tokens = tokens if backbone.channels_last else tokens.permute(0, 3, 1, 2)
    return _classifies(model.forward_head(tokens), mean, norm, weight, bias)


@torch.no_grad()
def _norm_of_mean(backbone: Backbone, weight: Tensor) -> nn.LayerNorm:
    """The norm that an adapted network applies to the mean of its last map before it classifies it."""
    draw, size = torch.Generator().manual_seed(0), backbone.preprocessing.places
    image = torch.rand(1, backbone.mean.shape[1], *size, generator=draw, device="cpu")
    taps = backbone(image.to(weight))
    mean = taps.maps[-1].flatten(2).mean(2)
    for norm in backbone.model.modules():
        if isinstance(norm, nn.LayerNorm) and norm.normalized_shape == mean.shape[1:]:
            if _classifies(taps.logits, mean, norm, weight, backbone.classifier_bias):
                return norm
    raise UnknownReading("its last map is not averaged and classified by one linear layer")


def _classifies(
    logits: Tensor, mean: Tensor, norm: nn.Module | None, weight: Tensor, bias: Tensor | None
) -> bool:
    """Whether ``logits`` (B, K) are W norm(mean) + b, for features ``mean`` (B, C)."""
    if isinstance(norm, nn.LayerNorm):  # also one for maps
        mean = F.layer_norm(mean, mean.shape[1:], norm.weight, norm.bias, norm.eps)
    elif norm is not None:
        mean = norm(mean)
    expected = F.linear(mean, weight, bias)
    return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)
