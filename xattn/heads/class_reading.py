"""How a classifier reads the places of a feature map: one map per class, linear in the classifier's rows.

    pooled maps        map_k = w_k . f
    a class token      map_k = sum_i sum_h A_ih o (w_k o gamma) O_ih V_ih x_i
    a probed network   the exact class maps of the trained head

f (B, C, h, w) is averaged and then classified; x_i (B, C, N) are the patches that block i reads. A class
token sees the patches through attention: A_ih (N) are its weights in head h of block i, V and O the block's
projections of values and outputs, gamma the gain of the final norm. The map is the part of logit k that the
blocks add to the class token, patch by patch, with the final norm's scale left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xattn.backbone import Backbone, Taps
from xattn.backbone.taps import parse_tap
from xattn.heads.attentive import AttentiveHead
from xattn.heads.probed import Probed


class ReadMaps(NamedTuple):
    """``own`` (B, M, h, w) of the classes asked for; ``mean`` (B, 1, h, w) over all classes, weighted by
    their probabilities; ``extra`` (B, E, h, w), maps that belong to no class."""

    own: Tensor
    mean: Tensor
    extra: Tensor | None = None


class ClassReading(nn.Module):
    """``reading(taps, index, p) -> ReadMaps``, index (B, M) or None for all classes, p (B, K).

    It holds weights of the backbone, which are looked up there and never saved with a head.
    """

    extras = 0

    def forward(self, taps: Taps, index: Tensor | None, p: Tensor) -> ReadMaps:
        raise NotImplementedError


class _RowReading(ClassReading):
    """A reading by the rows (K, C) of one linear classifier."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float().clone(), persistent=False)

    def forward(self, taps: Taps, index: Tensor | None, p: Tensor) -> ReadMaps:
        weight = self.weight.to(p.dtype)
        own = weight.expand(len(p), -1, -1) if index is None else weight[index]
        rows = torch.cat([own, (p @ weight)[:, None]], 1)
        maps, extra = self.read(taps, rows)
        return ReadMaps(maps[:, :-1], maps[:, -1:], extra)

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, R, h, w) of ``rows`` (B, R, C), and the maps that belong to no class."""
        raise NotImplementedError


class PooledReading(_RowReading):
    """Rows of the classifier on the last map, which is averaged before it."""

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        last = taps.maps[-1]
        return torch.matmul(rows, last.flatten(2)).unflatten(2, last.shape[2:]), None


class TokenReading(_RowReading):
    """What the class token read from each patch in the blocks whose ``norm1`` is tapped."""

    def __init__(self, backbone: Backbone, blocks: dict[int, nn.Module]) -> None:
        weight = backbone.classifier_weight
        assert weight is not None
        super().__init__(_before_final_norm(weight, backbone.model))
        self.places = list(blocks)  # of the taps that are read
        self.extras = len(blocks)
        self.layers = nn.ModuleList(_TokenAttention(block) for block in blocks.values())

    def read(self, taps: Taps, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        total: Tensor | None = None
        weights = []
        for place, layer in zip(self.places, self.layers, strict=True):
            prefix = taps.prefixes[place] if taps.prefixes else None
            if prefix is None:
                raise ValueError("taps: they lack the class tokens; take them from a pass")
            added, attention = layer(taps.maps[place], prefix, rows)
            total = added if total is None else total + added
            weights.append(attention)
        assert total is not None
        return total, torch.cat(weights, 1)


class _TokenAttention(nn.Module):
    """The class token's row of softmax attention in one block: (B, C, h, w), (B, P, C), (B, R, C) -> what
    it adds to each row of the classifier (B, R, h, w), and its mean weights (B, 1, h, w)."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    v_weight: Tensor
    out: Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        attention = block.attn
        heads = int(attention.num_heads)  # type: ignore[arg-type,union-attr]
        q, k, v = attention.qkv.weight.detach().float().chunk(3)  # type: ignore[union-attr,operator]
        self.scale = float(attention.scale)  # type: ignore[arg-type,union-attr]
        bias = attention.qkv.bias  # type: ignore[union-attr]
        q_bias = q.new_zeros(len(q)) if bias is None else bias.detach().float().chunk(3)[0]  # type: ignore[operator]
        out = attention.proj.weight.detach().float()  # type: ignore[union-attr,operator]
        gamma = getattr(getattr(block, "ls1", None), "gamma", None)
        if gamma is not None:
            out = out * gamma.detach().float()[:, None]
        for name, value in (("q_weight", q), ("k_weight", k), ("v_weight", v)):
            self.register_buffer(name, value.unflatten(0, (heads, -1)).clone(), persistent=False)
        self.register_buffer("q_bias", q_bias.unflatten(0, (heads, -1)).clone(), persistent=False)
        self.register_buffer("out", out.unflatten(1, (heads, -1)).clone(), persistent=False)

    def forward(self, patches: Tensor, prefix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        grid, x = patches.shape[2:], patches.flatten(2)
        kept = {n: b.to(x.dtype) for n, b in self.named_buffers()}
        q = torch.einsum("hdc,bc->bhd", kept["q_weight"], prefix[:, 0]) + kept["q_bias"]
        keys = torch.einsum("bhd,hdc->bhc", q * self.scale, kept["k_weight"])
        scores = torch.cat([keys @ prefix.transpose(1, 2), keys @ x], -1)
        attention = scores.softmax(-1)[..., prefix.shape[1] :]
        values = torch.einsum("brc,chd,hde->brhe", rows, kept["out"], kept["v_weight"])
        added = torch.einsum("brhe,ben->brhn", values, x)
        added = (added * attention[:, None]).sum(2)
        return added.unflatten(2, grid), attention.mean(1, keepdim=True).unflatten(2, grid)


class ProbeReading(ClassReading):
    """The exact class maps of the head that stands in a probed network's classifier."""

    def __init__(self, probe: AttentiveHead) -> None:
        super().__init__()
        self._probe = [probe]  # in a list, so that its weights are not this module's

    def forward(self, taps: Taps, index: Tensor | None, p: Tensor) -> ReadMaps:
        with torch.no_grad():
            maps = self._probe[0](taps)
        mean = torch.einsum("bk,bkhw->bhw", p, maps)[:, None]
        if index is None:
            return ReadMaps(maps, mean)
        return ReadMaps(
            maps.gather(1, index[..., None, None].expand(-1, -1, *maps.shape[2:])), mean
        )


def class_reading(backbone: Backbone) -> ClassReading:
    """How ``backbone`` reads its last taps, by class.

    Raises:
        ValueError: it does not end in one linear classifier of pooled maps or of a class token.
    """
    if isinstance(backbone, Probed):
        return ProbeReading(backbone.probe)
    weight = backbone.classifier_weight
    if weight is None:
        raise _refusal(backbone, "it has no single linear classifier")
    if backbone.pools_linearly:
        return PooledReading(weight)
    if not backbone.is_vit:
        raise _refusal(backbone, "its last tap is not the map that is averaged and classified")
    pool = getattr(backbone.model, "global_pool", None)
    if pool == "avg":
        if backbone.taps[-1] != "head":
            taps = " ".join([*backbone.taps[1:], "head"])
            raise _refusal(
                backbone,
                f"it averages its final tokens, which are not tapped; load it with --taps {taps}",
            )
        return PooledReading(_before_fc_norm(weight, backbone.model))
    if pool != "token":
        raise _refusal(backbone, f"it pools its tokens by {pool!r}")
    return TokenReading(backbone, _read_blocks(backbone))


def _read_blocks(backbone: Backbone) -> dict[int, nn.Module]:
    """The blocks behind the ``norm1`` taps, by the place of the tap."""
    if getattr(backbone.model, "head_dist", None) is not None:
        raise _refusal(backbone, "it classifies two tokens")
    if backbone.conversion:
        raise _refusal(backbone, "its attention is not the softmax that it was built with")
    blocks = {}
    for place, tap in enumerate(backbone.taps):
        kind, index, _ = parse_tap(tap)
        if kind != "norm1":
            continue
        block = backbone.model.blocks[index]  # type: ignore[index,union-attr]
        attention = getattr(block, "attn", None)
        plain = type(attention).__name__ == "Attention" and hasattr(attention, "qkv")
        identity = all(
            isinstance(getattr(attention, name, nn.Identity()), nn.Identity)
            for name in ("q_norm", "k_norm", "norm")
        )
        odd = [
            n
            for n in ("gate", "relative_position_bias_table")
            if getattr(attention, n, None) is not None
        ]
        if (
            not plain
            or not identity
            or odd
            or attention.qkv.out_features != 3 * attention.proj.in_features
        ):  # type: ignore[union-attr]
            raise _refusal(
                backbone,
                f"the class token's attention in a {type(block).__name__} cannot be read from taps",
            )
        blocks[place] = block
    if not blocks:
        raise _refusal(
            backbone,
            "none of its taps is what a block's attention reads; load it with --taps norm1",
        )
    return blocks


def _before_final_norm(weight: Tensor, model: nn.Module) -> Tensor:
    """Rows for what is added to the class token, by the gains of the norms before the classifier."""
    for name in ("fc_norm", "norm"):
        norm = getattr(model, name, None)
        if isinstance(norm, nn.LayerNorm) and norm.weight is not None:
            weight = weight * norm.weight
            weight = weight - weight.mean(
                1, keepdim=True
            )  # the norm removes the mean over channels
    return weight


def _before_fc_norm(weight: Tensor, model: nn.Module) -> Tensor:
    norm = getattr(model, "fc_norm", None)
    return (
        weight * norm.weight
        if isinstance(norm, nn.LayerNorm) and norm.weight is not None
        else weight
    )


def _refusal(backbone: Backbone, reason: str) -> ValueError:
    return ValueError(
        f"head: evidence needs the classifier's rows, and {backbone.name} does not show how it uses them "
        f"({reason}); train 'ttame' with fusion='per_class', or a classifier of your own with xattn probe"
    )
