"""Attention rollout: r <- r M_l from the last layer to the first, M = residual I + (1 - residual) A.

Abnar & Zuidema 2020, arXiv 2005.00928. A is the layer's attention with its heads fused, the rows of M are
normalised, and r starts as the row that the classifier reads: the product of all M is never formed. The map
is the same for every class.

Rollout needs rows that sum to 1. If the rows of A do not, the fused rows are divided by their sums
before the residual is added. If entries may be negative, A is replaced with |A| before the heads are
fused, and the rows are divided in the same way. With a residual, a row of zeros leaves a token
unchanged. The operator declares which case applies (``stochastic``, ``signed``), and the map's
provenance names the layers that were changed in this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from xattn.attention.operators.base import Operator
from xattn.attention.statistics import row_shares
from xattn.explainers.base import register_explainer
from xattn.explainers.relevance.attention import (
    AttentionExplainer,
    AttentionPass,
    Fusion,
    choose_layer,
    first_row,
    fuse,
    layers_text,
)
from xattn.runtime.option_checks import Condition, Share


@register_explainer("rollout", title="Attention rollout", networks=("vit",))
@dataclass(kw_only=True, eq=False, repr=False)
class Rollout(AttentionExplainer):
    """Attention rollout.

    Fusion by mean without ``discard`` takes O(N) memory. Otherwise, and for a signed A, A is computed in
    chunks of rows: once, or three times with ``discard``, whose threshold takes two passes.

    Args:
        fusion: how heads are combined: "mean", "max" or "min".
        residual: weight of the skip connection, in [0, 1].
        discard: share in [0, 1) of the N^2 fused entries of a layer that are set to 0 before the residual
            is added, smallest first; entries equal to the smallest kept entry are kept.
        keep_class: never discard attention to the class token, column 0, in models that have one.
        start_layer: earlier layers are ignored.
        start: see :class:`~xattn.explainers.relevance.attention.AttentionExplainer`.

    Example:
        >>> import torch, xattn
        >>> net = xattn.load_backbone("test_vit", weights=None, input_size=32)
        >>> method = xattn.create_explainer("rollout", net)
        >>> method.attribute(torch.rand(1, 3, 32, 32), target=3).shape
        torch.Size([1, 1, 2, 2])
    """

    clips = True

    fusion: Fusion = "mean"
    residual: Annotated[float, Condition(lambda x: 0 <= x <= 1, "a weight in [0, 1]")] = 0.5
    discard: Share = 0.0
    keep_class: bool = True
    start_layer: int = 0

    def _check(self, reading: AttentionPass) -> None:
        self.start_layer = choose_layer(self.start_layer, len(reading.layers), "start_layer")
        used = list(enumerate(call.operator for call in reading.layers))[self.start_layer :]
        signed = [i for i, operator in used if operator.signed]
        scaled = [i for i, o in used if not (o.signed or o.stochastic)]
        if signed:
            self._note(
                f"{layers_text(signed)}: entries of A may be negative; normalised rows of |A| are used"
            )
        if scaled:
            self._note(f"{layers_text(scaled)}: rows of A do not sum to 1; they are normalised")

    @torch.no_grad()
    def _rows(self, reading: AttentionPass, classes: Tensor) -> Tensor:
        r = self._start_row(reading)
        if r is None:
            assert reading.pool is not None
            r = row_shares(_fused(reading.pool.operator, first_row(reading.pool), self.fusion))
        kept_columns = 1 if self.keep_class and reading.prefix else 0
        for call in reversed(reading.layers[self.start_layer :]):
            r = self._through(call.operator, r, kept_columns)
        return r

    def _through(self, operator: Operator, r: Tensor, kept_columns: int) -> Tensor:
        if self.fusion == "mean" and not self.discard:
            return rollout_step(operator, r, self.residual)
        lowest = _smallest_kept(operator, self.fusion, self.discard) if self.discard else None
        chunks = _fused_rows(operator, self.fusion)
        if lowest is not None:
            chunks = ((i, _keep(a, lowest, kept_columns)) for i, a in chunks)
        return _through_rows(chunks, r, self.residual)


def rollout_step(operator: Operator, r: Tensor, residual: float = 0.5) -> Tensor:
    """r M, M = residual I + (1 - residual) A with normalised rows: (B, R, N) -> (B, R, N).

    For a stochastic operator, A is the mean over heads; for other operators, it is that mean with each
    row divided by its sum. Both take O(N) memory. For a signed operator, A is the mean of |A|, divided
    in the same way. It is computed in chunks of rows, because a product of |A| with a vector needs its
    entries. Rows of zeros are left as they are.
    """
    if operator.signed:
        return _through_rows(_fused_rows(operator, "mean"), r, residual)
    share = 1 - residual
    sums = operator.row_sums().mean(1)[:, None]
    if operator.stochastic:
        r = _over(r, residual + share * sums)
        return residual * r + share * operator.vecmat(r, "mean")
    r = _over(r, residual + share * (sums > 0))
    return residual * r + share * operator.vecmat(_over(r, sums), "mean")


def _through_rows(chunks: Iterable[tuple[slice, Tensor]], r: Tensor, residual: float) -> Tensor:
    """r M as in :func:`rollout_step`, from rows of the fused A."""
    share, out = 1 - residual, torch.zeros_like(r)
    for i, a in chunks:
        part = _over(r[..., i], (residual + share * a.sum(-1))[:, None])
        out[..., i] += residual * part
        out += share * (part @ a)
    return out


def _over(r: Tensor, sums: Tensor) -> Tensor:
    """r / sums; 0 where a row is all zero."""
    return torch.where(sums > 0, r / sums, 0.0)


@torch.no_grad()
def rollout_row(operators: Sequence[Operator], token: int, residual: float = 0.5) -> Tensor:
    """The share that each input token has in ``token`` of the last operator's output: the token's row of
    M_l ... M_0, (B, N).

    Args:
        operators: of shape (B, H, N, N), first layer to layer l; each as in :func:`rollout_step`.
    """
    r = torch.zeros_like(operators[-1].row_sums()[:, :1])
    r[..., token] = 1
    for operator in reversed(operators):
        r = rollout_step(operator, r, residual)
    return r[:, 0]


def _fused_rows(operator: Operator, fusion: str) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows of A, heads fused: (B, rows, N)."""
    for i in operator.row_chunks():
        yield i, _fused(operator, operator.tile(i, slice(None)), fusion)


def _fused(operator: Operator, rows: Tensor, fusion: str) -> Tensor:
    """Rows (B, H, R, S) of A, or of |A| if it is signed, fused to (B, R, S) and normalised unless rows of A
    already sum to 1."""
    if operator.signed:
        return row_shares(fuse(rows.abs(), fusion))
    fused = fuse(rows, fusion)
    return fused if operator.stochastic else row_shares(fused)


def _keep(a: Tensor, lowest: Tensor, columns: int) -> Tensor:
    """``a`` (B, R, S) with entries below ``lowest`` (B,) set to 0, except in the first ``columns``."""
    kept = _sort_keys(a) >= lowest[:, None, None]
    kept[..., :columns] = True
    return a * kept


# ---------------------------------------------------------------------- the exact discard threshold
#
# Radix selection over the 32 bits of the entries: one pass counts the upper 16 bits, a second the lower 16
# bits of entries whose upper 16 match. Counts take 512 KB per image, for any N.


def _smallest_kept(operator: Operator, fusion: str, discard: float) -> Tensor:
    """The entry of ascending rank floor(discard N S), from 0, as a key of ``_sort_keys``: (B,)."""
    batch, _, queries, keys = operator.shape
    entries = queries * keys
    first = min(int(discard * entries), entries - 1)
    rank = torch.full((batch,), first, device=operator.row_sums().device)
    upper, rank = _bin(
        ((_sort_keys(a) >> 16) + 2**15 for _, a in _fused_rows(operator, fusion)), rank
    )
    mine = upper[:, None, None] - 2**15
    lower, _ = _bin(
        (
            torch.where(bits >> 16 == mine, bits & 0xFFFF, -1)
            for bits in (_sort_keys(a) for _, a in _fused_rows(operator, fusion))
        ),
        rank,
    )
    return ((upper - 2**15) << 16) | lower


def _bin(chunks: Iterable[Tensor], rank: Tensor) -> tuple[Tensor, Tensor]:
    """For keys (B, ...) in 0..2^16 - 1 (-1 is ignored): the key of ascending ``rank`` (B,), and the
    rank that remains among the entries of that key."""
    batch, bins = rank.shape[0], 2**16 + 1
    offset = bins * torch.arange(batch, device=rank.device)[:, None]
    counts = rank.new_zeros(batch * bins)
    for keys in chunks:
        counts += torch.bincount((keys.flatten(1) + 1 + offset).flatten(), minlength=batch * bins)
    upto = counts.view(batch, bins)[:, 1:].cumsum(1)
    key = (upto <= rank[:, None]).sum(1)
    smaller = upto.gather(1, (key - 1).clamp_min(0)[:, None])[:, 0]
    return key, torch.where(key > 0, rank - smaller, rank)


def _sort_keys(a: Tensor) -> Tensor:
    """Float32 bits as integers (int64) in the same order as the numbers: keys for the radix selection."""
    bits = (a.float() + 0.0).view(torch.int32)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
