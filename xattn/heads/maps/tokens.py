"""What a ViT's class token takes from each patch, in every head of every block, on its way to a logit.

    path_lhn = a_lhn  g_l . O_h V_h x_ln        row_lhn = a_lhn  (w_k o gamma) . O_h V_h x_ln

x_ln (C) is patch n at the input of block l, a_lhn the attention of the class token in head h; V and O
project values and outputs. g_l (C) is the derivative of the log-odds of class k with respect to the
class token after the attention of block l. Only the token's own path counts: final norm, MLPs, norms,
and its own query, key and value. Paths through patches that read the class token are left out. Therefore
``path`` is a_lhn times the derivative with respect to a_lhn, without the biases of the values, which
belong to no patch. It is exact in the last two blocks, where no patch that has read the class token is
read again. ``row`` uses the classifier's row instead of g_l, like the class maps of
:mod:`~xattn.heads.class_reading`. The first block is left out.

The patches are not projected to keys and values; instead, products with the patches are computed once
for each head.

The head ``tokens`` weighs every head of every block but the first,

    S_k = sum_lh path_lh / sd(sum_lh path_lh) + sum_lh rho_lh row_lh / sd(sum of the last 3 blocks)
          + sum_lh beta_lh standardised(a_lh)

where rho starts at 1 in the last three blocks and at 0 elsewhere, and beta at 0. Without training, the
head equals the explainer ``token_path``, the path plus CAM. Training fits 2 (L - 1) H numbers for L
blocks, which are pulled towards their initial values, and needs no backward pass through patches.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.backbone.taps import block_taps
from xattn.heads.base import Frozen, Head, register_head
from xattn.heads.class_reading import ClassWeights, UnknownReading, before_norms, is_plain
from xattn.heads.fusion import row_index
from xattn.heads.maps.evidence import SMALLEST, standardise, standardised_mask
from xattn.kernels.softmax.reference import widen
from xattn.runtime.option_checks import NotNegative

LAST = 3  # number of blocks whose rows CAM reads


class TokenMaps(NamedTuple):
    """``path`` (B, M, L, H, h, w) of M classes in L blocks, ``row`` (B, M, R, H, h, w) in the last R,
    ``attention`` (B, L, H, h, w)."""

    path: Tensor
    row: Tensor
    attention: Tensor


class TokenModule(Frozen):
    """A module with copies of the backbone's weights."""

    def keep(self, name: str, value: Tensor | None, like: Tensor | None = None) -> None:
        """Store ``value`` or, if a layer has no such value, zeros with the shape of ``like``."""
        value = torch.zeros_like(like) if value is None else value  # type: ignore[arg-type]
        self.register_buffer(name, widen(value.detach()).clone(), persistent=False)


class Norm(TokenModule):
    """A LayerNorm with a ``back`` method that propagates a gradient from its output to its input."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.keep("weight", norm.weight)
        self.keep("bias", norm.bias, norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x), self.bias.to(x), self.eps)

    def pull_back(self, g: Tensor, x: Tensor) -> Tensor:
        """Derivatives (B, M, C) with respect to the input x (B, C), from the derivatives ``g`` (B, M, C)
        with respect to the output."""
        wide = widen(x)  # squares of half precision overflow
        centred = wide - wide.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        normal, g = (centred / deviation)[:, None], widen(g) * self.weight.to(wide)
        along = (g * normal).mean(-1, keepdim=True)
        return ((g - g.mean(-1, keepdim=True) - along * normal) / deviation[:, None]).to(x.dtype)


class TokenBlock(TokenModule):
    """The class token's path through one block, whose inputs are the patches (B, C, N) and the prefix
    tokens (B, P, C), class token first."""

    q: Tensor  # (H, D, C), like k and v
    k: Tensor
    v: Tensor
    q_bias: Tensor  # (H, D), like v_bias; the bias of keys adds the same to all scores
    v_bias: Tensor
    out: Tensor  # (C, H, D)
    out_bias: Tensor
    up: Tensor  # of the MLP
    up_bias: Tensor
    down: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention: Any = block.attn
        self.heads, self.scale = int(attention.num_heads), float(attention.scale)
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        biases = attention.qkv.bias
        biases = torch.zeros_like(attention.qkv.weight[:, 0]) if biases is None else biases
        for name, value in zip("qkv", attention.qkv.weight.chunk(3), strict=True):
            self.keep(name, value.unflatten(0, (self.heads, -1)))
        for name, value in zip(("q_bias", "", "v_bias"), biases.chunk(3), strict=True):
            if name:
                self.keep(name, value.unflatten(0, (self.heads, -1)))
        gains = [getattr(scale, "gamma", None) for scale in (block.ls1, block.ls2)]
        one = torch.ones_like(block.norm1.weight)
        gain, gain2 = (one if g is None else g for g in gains)
        self.keep("out", (attention.proj.weight * gain[:, None]).unflatten(1, (self.heads, -1)))
        bias = attention.proj.bias
        self.keep("out_bias", None if bias is None else bias * gain, one)
        self.keep("up", block.mlp.fc1.weight)
        self.keep("up_bias", block.mlp.fc1.bias, block.mlp.fc1.weight[:, 0])
        self.keep("down", block.mlp.fc2.weight * gain2[:, None])

    def read(self, patches: Tensor, prefix: Tensor) -> _Read:
        """The class token's attention, and the token after the block."""
        token = prefix[:, 0]
        x = self.norm1(torch.cat([prefix, patches.transpose(1, 2)], 1))  # (B, P + N, C)
        own = x[:, 0]
        q = (torch.einsum("hdc,bc->bhd", self.q.to(x), own) + self.q_bias.to(x)) * self.scale
        scores = torch.einsum("bhd,hdc->bhc", q, self.k.to(x)) @ x.transpose(1, 2)
        weights = scores.softmax(-1)
        values = torch.einsum("bhc,hdc->bhd", weights @ x, self.v.to(x)) + self.v_bias.to(x)
        token = token + torch.einsum("bhd,chd->bc", values, self.out.to(x)) + self.out_bias.to(x)
        return _Read(x, q, weights, token)

    def pull_back(self, g: Tensor, read: _Read, token: Tensor) -> tuple[Tensor, Tensor]:
        """From ``g`` (B, M, C), the derivative with respect to the block's output, compute what each token
        adds (B, M, H, P + N), and the derivative with respect to ``token``, the class token before the
        block."""
        x, q, weights = read.x, read.q, read.weights
        inner = F.linear(self.norm2(read.token), self.up.to(x), self.up_bias.to(x))
        slope = 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        slope = slope + inner * torch.exp(-inner.square() / 2) / math.sqrt(2 * math.pi)
        after = (g @ self.down.to(x)) * slope[:, None] @ self.up.to(x)
        after = g + self.norm2.pull_back(after, read.token)
        along, added = self.added(after, read)
        change = added - weights[:, None] * added.sum(-1, keepdim=True)  # by the scores
        seen = torch.einsum("bmhn,bnc->bmhc", change, x)
        by_query = torch.einsum("bmhc,hdc->bmhd", seen, self.k.to(x)) * self.scale
        by_own = torch.einsum("bmhd,hdc->bmc", by_query, self.q.to(x))
        by_own = by_own + torch.einsum("bmh,bhd,hdc->bmc", change[..., 0], q, self.k.to(x))
        by_own = by_own + torch.einsum("bh,bmhd,hdc->bmc", weights[..., 0], along, self.v.to(x))
        return added, after + self.norm1.pull_back(by_own, token)

    def added(self, g: Tensor, read: _Read) -> tuple[Tensor, Tensor]:
        """``g`` (B, M, C) propagated through each head's projection (B, M, H, D), and what each token adds
        to the product of g with the class token after the attention, without biases: (B, M, H, P + N)."""
        along = torch.einsum("bmc,chd->bmhd", g, self.out.to(g))
        rows = torch.einsum("bmhd,hdc->bmhc", along, self.v.to(g))
        return along, torch.einsum("bmhc,bnc->bmhn", rows, read.x) * read.weights[:, None]


class _Read(NamedTuple):
    x: Tensor  # (B, P + N, C), normalised
    q: Tensor  # (B, H, D), scaled
    weights: Tensor  # (B, H, P + N)
    token: Tensor  # (B, C), after the attention


class TokenPath(TokenModule):
    """``paths(taps, index, task) -> TokenMaps`` of all blocks but the first; ``taps`` come from
    :func:`block_taps`.

    Raises:
        UnknownReading: the network does not classify one class token by one linear layer, or its blocks are
            not timm's with plain attention and GELU.
    """

    weight: Tensor
    rows: Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        model = self._model(backbone)
        self.prefix = backbone.prefix_tokens
        weight = backbone.classifier_weight
        assert weight is not None
        self.keep("weight", weight)
        self.keep("rows", before_norms(weight, model.norm))
        self.norm = Norm(model.norm)
        self.blocks = nn.ModuleList(TokenBlock(b) for b in list(model.blocks)[1:])

    @staticmethod
    def _model(backbone: Backbone) -> Any:
        """The ViT, if its class token can be traced."""
        model: Any = backbone.model
        if not backbone.is_vit or not backbone.prefix_tokens:
            raise UnknownReading("it has no class token")
        if getattr(model, "global_pool", None) != "token" or backbone.classifier_weight is None:
            raise UnknownReading("it does not classify its class token by one linear layer")
        if getattr(model, "head_dist", None) is not None:
            raise UnknownReading("it classifies two tokens")
        if backbone.conversion:
            raise UnknownReading("its attention is not the softmax that it was built with")
        norms = (model.norm, *(n for b in model.blocks for n in (b.norm1, b.norm2)))
        fc_norm = getattr(model, "fc_norm", None)
        for block in list(model.blocks)[1:]:
            mlp: Any = getattr(block, "mlp", None)
            plain = type(block) is Block and is_plain(block.attn) and type(mlp) is Mlp
            exact = plain and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
            if not exact or not isinstance(mlp.norm, nn.Identity):
                raise UnknownReading(f"what its {type(block).__name__} computes is not known")
        if not all(isinstance(n, nn.LayerNorm) for n in norms) or not isinstance(
            fc_norm, nn.Identity | None
        ):
            raise UnknownReading("it has norms that are not LayerNorm")
        return model

    def forward(self, taps: Taps, index: Tensor | None, task: str, rows: int = 0) -> TokenMaps:
        """Compute the paths for the classes ``index`` (B, M), or for all, and the rows of the last
        ``rows`` blocks."""
        grid = taps.maps[0].shape[2:]
        prefixes = [p for p in taps.prefixes if p is not None]
        if len(prefixes) != len(taps.maps):
            raise ValueError(
                "taps: the prefix tokens of the block taps are missing; use taps from a pass "
                "of the backbone"
            )
        inputs = [(m.flatten(2), p) for m, p in zip(taps.maps[:-1], prefixes, strict=False)]
        reads = [b.read(*x) for b, x in zip(self.blocks, inputs, strict=True)]  # type: ignore[operator]
        weight = self.weight.to(taps.logits)
        g = self.norm.pull_back(self._start(weight, taps, index, task), prefixes[-1][:, 0])
        paths: list[Tensor] = []
        for block, read, (_, prefix) in zip(
            reversed(self.blocks), reversed(reads), reversed(inputs), strict=True
        ):
            added, g = block.pull_back(g, read, prefix[:, 0])  # type: ignore[operator]
            paths.insert(0, added)
        own = rows_of_classes(self.rows.to(taps.logits), index, taps.logits.shape[0])
        last = list(zip(self.blocks, reads, strict=True))[len(reads) - rows :]
        added = [block.added(own, read)[1] for block, read in last]  # type: ignore[operator]
        row = torch.stack(added or paths, 2)[:, :, :rows]
        parts = torch.stack(paths, 2), row, torch.stack([read.weights for read in reads], 1)
        return TokenMaps(*(part[..., self.prefix :].unflatten(-1, grid) for part in parts))

    def _start(self, weight: Tensor, taps: Taps, index: Tensor | None, task: str) -> Tensor:
        """The derivative (B, M, C) of the log-odds with respect to the final class token: w_k minus the
        mean of the other rows, weighted by their probabilities; for a multi-label network, w_k itself."""
        own = rows_of_classes(weight, index, taps.logits.shape[0])
        if task == "multilabel":
            return own
        weights = ClassWeights.of(taps.logits, task)
        mean, rest = ((w @ weight)[:, None, :, None] for w in (weights.p, weights.rest))
        return own - weights.others(own[..., None], mean, rest, index)[..., 0]


def rows_of_classes(weight: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """The rows of ``weight`` (K, C) of the classes ``index`` (B, M), or of all, (B, M, C)."""
    return weight.expand(batch, -1, -1) if index is None else weight[index]


def divide_by_deviation(maps: Tensor, of: Tensor | None = None) -> Tensor:
    """Maps (B, M, h, w) divided by the spatial standard deviation of other maps, ``of``, or by their own if
    ``of`` is None."""
    of = maps if of is None else of
    return maps / of.std((2, 3), correction=0, keepdim=True).clamp_min(SMALLEST)


@register_head("tokens", recipe="outcomes", taps=block_taps)
class TokenHead(Head):
    """The tokens head of a timm ViT that classifies its class token; it reads the outputs of all blocks.

    Args:
        pull: weight of the squared distance between the fitted numbers and their starting values.
        explain_with: show raw ``"scores"``, or the ``"mask"`` sigmoid(2 z + 1) of the scores z,
            standardised over the photo. Both rank cells in the same order, but interpolated pixels may
            rank differently.

    Raises:
        ValueError: the network is not a timm ViT that classifies its class token.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> head = xattn.create_head("tokens", net)
        >>> head(head.tapped(net)(torch.rand(2, 3, 32, 32)), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 2, 2])
    """

    start: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pull: NotNegative = 0.03,
        explain_with: Literal["scores", "mask"] = "scores",
    ) -> None:
        super().__init__(backbone, {"pull": pull, "explain_with": explain_with})
        try:
            self.paths = TokenPath(backbone)
        except UnknownReading as error:
            raise ValueError(
                f"head: 'tokens' follows the class token of a ViT, which {backbone.name} does not allow "
                f"({error}); train 'evidence' or 'ttame'"
            ) from None
        self.pull = pull
        shape = len(self.paths.blocks), int(self.paths.blocks[-1].heads)  # type: ignore[arg-type]
        self.register_buffer("start", torch.zeros(shape), persistent=False)
        self.start[-LAST:] = 1
        self.rows = nn.Parameter(self.start.clone())
        self.attention = nn.Parameter(torch.zeros(shape))

    def forward(self, taps: Taps, class_index: Tensor | int | None = None) -> Tensor:
        """Scores (B, M or K, h, w) on the grid of patches."""
        self.check_taps(taps)
        index = row_index(class_index, self.num_classes, taps.logits)
        path, row, attention = self.paths(taps, index, self.backbone_task, len(self.rows))
        path = divide_by_deviation(path.sum((2, 3)))
        rows = torch.einsum("lh,bmlhyx->bmyx", self.rows.to(path), row)
        attended = torch.einsum("lh,blhyx->byx", self.attention.to(path), standardise(attention))
        return path + divide_by_deviation(rows, row[:, :, -LAST:].sum((2, 3))) + attended[:, None]

    def auxiliary_loss(self) -> Tensor:
        """The weighted squared distance of the fitted numbers from their starting values."""
        moved = (self.rows - self.start).square().sum() + self.attention.square().sum()
        return self.pull * moved

    def mask(self, scores: Tensor) -> Tensor:
        """sigmoid(2 z + 1) of the standardised scores z."""
        return standardised_mask(scores)
