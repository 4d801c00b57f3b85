"""Base class of explainers that read attention; it provides each layer's operator and the row that the
classifier reads.

In each layer of a ViT, every head has an attention matrix A (N x N); none is ever stored. The explainers
start from a row vector with the weight of each token in the classifier's input, and multiply it by A
from the last layer to the first, which takes O(N) memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from xattn.attention.record import Call, record
from xattn.backbone import Backbone
from xattn.backbone.families.traced import token_grid
from xattn.explainers.base import Choose, Explainer

Start = str | Sequence[int]
Fusion = Literal["mean", "max", "min"]
CLASS_AND_PATCHES = "class+patches"


@dataclass(frozen=True)
class AttentionPass:
    """The attention in one pass over B images of N tokens: prefix tokens, then an (h, w) grid, for clips
    (t, h, w)."""

    logits: Tensor
    layers: list[Call]
    """Self-attention from the first layer to the last; operators of shape (B, H, N, N)."""
    pool: Call | None
    """Attention pooling by a single query that belongs to the pooling layer, (B, H, 1, N)."""
    grid: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.layers[0].operator.shape[2]

    @property
    def prefix(self) -> int:
        return self.tokens - math.prod(self.grid)


@dataclass(kw_only=True, eq=False, repr=False)
class AttentionExplainer(Explainer):
    """Base class of explainers that read a ViT-like classifier's self-attention over all tokens.

    Args:
        start: the tokens that the classifier reads. "auto" detects them (class token, class and
            distillation token, average over patches, or the row of attention pooling); "class" is the
            first token, "patches" the average over the patches, and "class+patches" the mean of both.
            With token numbers, the rows of these tokens are averaged.

    Raises:
        ValueError: the model has no such attention (the message describes what it has instead), or it
            does not pool its tokens by a weighted average and ``start`` is not given.

    Example:
        >>> import torch, xattn
        >>> from xattn.explainers import AttentionExplainer
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> isinstance(xattn.create_explainer("rollout", net), AttentionExplainer)
        True
    """

    gradients: ClassVar[bool] = False
    """Whether the pass is recorded for a backward pass."""

    start: Start | None = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        backbone = self.backbone
        with self._guard(), torch.no_grad():
            image = torch.zeros(
                1, backbone.mean.shape[1], *backbone.preprocessing.places, device="cpu"
            )
            image = self._move(image)
            reading = read_attention(backbone, image)
            self.start = _start_tokens(backbone, reading, self.start)
            self._check(reading)

    def _check(self, reading: AttentionPass) -> None:
        """Raise a ``ValueError`` if options do not fit the model's layers."""

    @abstractmethod
    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        """Rows (B, M, N) of weights over the tokens for classes (B, M); (B, 1, N) if they do not depend on
        the class."""

    def _read(self, images: Tensor) -> AttentionPass:
        """Run the pass from which the maps are computed."""
        return read_attention(self.backbone, images)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self._attribute_classes(images, lambda _: target[:, None])[2]

    def _attribute_classes(self, images: Tensor, choose: Choose) -> tuple[Tensor, Tensor, Tensor]:
        if self.gradients:
            images.requires_grad_()
        with torch.set_grad_enabled(self.gradients):
            reading = self._read(images)
        logits = reading.logits.detach()
        classes = self._chosen(choose, logits)
        rows = self._rows(reading, classes)
        maps = rows[..., reading.prefix :].unflatten(-1, reading.grid)
        return logits, classes, maps.expand(-1, classes.shape[1], *reading.grid)

    def _start_row(self, reading: AttentionPass) -> Tensor | None:
        """The starting row (B, 1, N), which sums to 1; None if the row of attention pooling is used
        instead."""
        if self.start is None:
            return None
        logits = reading.logits.detach()
        logits = logits if logits.dtype == torch.float64 else logits.float()
        row = logits.new_zeros(len(logits), 1, reading.tokens)
        first, last = reading.prefix, reading.tokens
        if self.start == CLASS_AND_PATCHES:
            row[..., first:], row[..., 0] = 1, last - first
        else:
            row[..., list(range(first, last)) if self.start == "patches" else list(self.start)] = 1
        return row / row.sum(-1, keepdim=True)


def read_attention(backbone: Backbone, images: Tensor) -> AttentionPass:
    """One pass over images (B, 3, H, W) in [0, 1], without gradients unless they are enabled.

    Raises:
        NoAttention: the model does not have self-attention over all tokens in every layer.
    """
    with record(backbone.model) as calls:
        logits = backbone.logits(images)
    pool = calls[-1] if len(calls) > 1 and calls[-1].operator.shape[2] == 1 else None
    layers = calls[:-1] if pool else calls
    patches = _check_layers(backbone, layers, images) - backbone.prefix_tokens
    return AttentionPass(logits, layers, pool, patch_grid(backbone, images, patches))


def first_row(call: Call) -> Tensor:
    """The row of A for the first query, (B, H, 1, S)."""
    return call.operator.rows(torch.zeros(1, dtype=torch.long, device=call.value.device))


def patch_grid(backbone: Backbone, images: Tensor, patches: int) -> tuple[int, ...]:
    """(h, w) of the patches, for clips (t, h, w); inferred from the image's aspect ratio if the model does
    not report it."""
    if images.ndim == 5:
        grid = token_grid(patches, images.shape[2:], getattr(backbone.model, "steps", 1))
        if grid is None:
            raise ValueError(f"backbone: {patches} patch tokens of {backbone.name} form no grid")
        return grid
    height, width = images.shape[-2:]
    if backbone.has_grid:
        rows, columns = backbone.grid(height, width)
    else:
        rows = max(1, round((patches * height / width) ** 0.5))
        columns = patches // rows
    if rows * columns != patches:
        raise ValueError(
            f"backbone: {patches} patch tokens of {backbone.name} do not form a grid on images of "
            f"{height} x {width}"
        )
    return rows, columns


def choose_layer(layer: int, count: int, argument: str = "layer") -> int:
    """Return ``layer`` as a number in 0..count-1, where negative numbers count from the end; raise a
    ``ValueError`` if it is out of range."""
    if not -count <= layer < count:
        raise ValueError(f"{argument}: got {layer}; the model has {count} layers, 0..{count - 1}")
    return layer % count


def layers_text(layers: Sequence[int]) -> str:
    """Layer numbers, in order, as text: "layer 3", "layers 0 to 5", "layers 1, 4"."""
    first, last = layers[0], layers[-1]
    if len(layers) == 1:
        return f"layer {first}"
    whole = len(layers) > 2 and last - first == len(layers) - 1
    return f"layers {first} to {last}" if whole else f"layers {', '.join(map(str, layers))}"


def fuse(per_head: Tensor, fusion: str) -> Tensor:
    """Mean, maximum or minimum over heads, (B, H, ...) -> (B, ...)."""
    if fusion == "mean":
        return per_head.mean(1)
    return per_head.amax(1) if fusion == "max" else per_head.amin(1)


# ---------------------------------------------------------------------- attention of a model


class NoAttention(ValueError):
    """Raised for a model whose attention cannot be read as one (B, H, N, N) operator per layer.

    Attributes: ``found``: what the model does instead, worded to follow its name ("attends inside
    windows"); ``calls``: how often it calls attention.
    """

    def __init__(self, name: str, found: str, calls: int) -> None:
        super().__init__(
            f"backbone: {name} {found}; this explainer needs self-attention over all tokens in every "
            f"layer; use 'gradcam' or 'occlusion'"
        )
        self.found, self.calls = found, calls


def _check_layers(backbone: Backbone, layers: Sequence[Call], images: Tensor) -> int:
    """Return the number of tokens; raise :class:`NoAttention` unless every layer attends over all of
    them."""
    found = _objection(backbone, layers, images)
    if found:
        raise NoAttention(backbone.name, found, len(layers))
    return layers[0].operator.shape[2]


def _objection(backbone: Backbone, layers: Sequence[Call], images: Tensor) -> str | None:
    if not layers:
        return f"makes no call to F.scaled_dot_product_attention{_remedy(backbone)}"
    expected = layers[0].operator.shape[2]
    if backbone.is_vit:
        height, width = backbone.tap_sizes[-1]
        if backbone.has_grid:
            height, width = backbone.grid(*images.shape[-2:])
        expected = backbone.prefix_tokens + height * width
    for call in layers:
        batch, _, queries, keys = call.operator.shape
        if queries != keys:
            return f"attends from {queries} to {keys} tokens"
        if batch != images.shape[0]:
            return f"attends inside windows ({batch / images.shape[0]:.4g} x {keys} tokens)"
        if keys != expected:
            return f"attends over {keys} entries, not over its {expected} tokens"
    depth = _depth(backbone)
    if depth is None:
        return "has no list of blocks to compare its attention calls with"
    if depth != len(layers):
        return f"makes {len(layers)} attention calls in {depth} blocks"
    return None


def _remedy(backbone: Backbone) -> str:
    """Advice on loading a transformers model whose layers were built for another attention
    implementation."""
    config = getattr(getattr(backbone.model, "network", None), "config", None)
    chosen = getattr(config, "_attn_implementation", "sdpa")
    if not backbone.is_vit or chosen == "sdpa":
        return ""
    return f' (it was built for {chosen!r}; load it with attn_implementation="sdpa")'


def _depth(backbone: Backbone) -> int | None:
    """The number of attention layers, since some layers may not be recorded and others may attend
    twice."""
    blocks = getattr(backbone.model, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList):
        return len(blocks)
    return sum(isinstance(m, nn.MultiheadAttention) for m in backbone.modules()) or None


# ---------------------------------------------------------------------- what the classifier reads


def _start_tokens(
    backbone: Backbone, reading: AttentionPass, start: Start | None
) -> str | tuple[int, ...] | None:
    """Token numbers, "patches", or None for the row of attention pooling, as detected by "auto"."""
    if start == "auto" or (start is None and reading.pool):
        return None if reading.pool else _tokens_read(backbone, reading)
    if start == "patches":
        return "patches"
    if start in ("class", CLASS_AND_PATCHES) and not reading.prefix:
        raise ValueError(f"start={start!r}: {backbone.name} has no class token; use 'patches'")
    if start == CLASS_AND_PATCHES:
        return CLASS_AND_PATCHES
    start = (0,) if start == "class" else start
    if start is None or isinstance(start, str):
        raise ValueError(
            f"start: got {start!r}; give 'auto', 'class', 'patches', 'class+patches' or token numbers"
        )
    chosen = tuple(dict.fromkeys(start))
    if not chosen or min(chosen) < 0 or max(chosen) >= reading.tokens:
        raise ValueError(f"start: got {start}; give token numbers in 0..{reading.tokens - 1}")
    return chosen


def _tokens_read(backbone: Backbone, reading: AttentionPass) -> str | tuple[int, ...]:
    """The tokens that the head reads: those with a nonzero gradient when the head pools random tokens."""
    remedy = "give start='class', 'patches' or token numbers"
    if backbone.adapter:  # its head cannot be run by itself
        if reading.prefix > 1:
            raise ValueError(
                f"start: it is not known which of the {reading.prefix} prefix tokens of "
                f"{backbone.name} the classifier reads; {remedy}"
            )
        return (0,) if reading.prefix else "patches"
    if getattr(backbone.model, "global_pool", "") == "token+avg":  # DINOv2 in transformers
        return CLASS_AND_PATCHES
    if "max" in str(getattr(backbone.model, "global_pool", "")):
        raise ValueError(
            f"start: {backbone.name} pools by a maximum, not by one row of weights; {remedy}"
        )
    with torch.inference_mode(False), torch.enable_grad():
        width: int = backbone.model.num_features  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(1, reading.tokens, width, generator=generator, device="cpu")
        tokens = tokens.to(reading.logits).requires_grad_()
        pooled = backbone.model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
        direction = torch.randn(pooled.shape, generator=generator, device="cpu").to(pooled)
        grad = torch.autograd.grad(pooled, tokens, direction)[0]
    weights = grad[0].float().norm(dim=-1)
    read = weights.nonzero()[:, 0].tolist()
    if not read or weights[read].min() < 0.9 * weights.max():
        raise ValueError(
            f"start: the head of {backbone.name} reads {len(read)} of {reading.tokens} tokens, but not "
            f"as one average; {remedy}"
        )
    return "patches" if read == list(range(reading.prefix, reading.tokens)) else tuple(read)
