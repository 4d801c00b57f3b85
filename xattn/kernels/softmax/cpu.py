"""Softmax attention with log-sum-exp by PyTorch's fused CPU kernel, or by tiles of rows.

No N x S matrix is stored, except for the caller's bias.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.backend import tile_entries
from xattn.kernels.softmax import reference
from xattn.kernels.softmax.reference import (
    Problem,
    delta,
    per_key_head,
    per_query_head,
    row_by_row,
    widen,
)

TILE = 2**20  # scores in a tile of rows, over batch and heads: 4 MB in float32


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    p = _each_head(p)
    fused = _fused(p)
    if fused is None:
        return _by_rows(p)
    o, lse = fused
    if p.bias is None:
        return o, lse
    # For rows without a key the output of the fused kernels is undefined.
    empty = _empty_rows(p.bias, p.causal)
    if not empty.any():
        return o, lse
    empty = empty.expand(lse.shape)
    return o.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)


def backward(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    wanted: Collection[str],
) -> dict[str, Tensor]:
    own = _each_head(p)
    bias_grad = "bias" in wanted
    found = None
    if grads[1] is None:
        found = _fused_backward(own, outputs, grads[0], bias_grad)
    if found is None:
        found = _backward_by_rows(own, outputs, grads, bias_grad)
    found["q"] = found["q"].to(p.q.dtype)
    found["k"], found["v"] = per_key_head(found["k"], p.k), per_key_head(found["v"], p.v)
    if p.bias is not None and bias_grad:
        found["bias"] = found["bias"].to(p.bias.dtype)
    return found


def _each_head(p: Problem) -> Problem:
    """The same problem with keys and values for every query head."""
    if p.k.shape[1] == p.q.shape[1]:
        return p
    return p._replace(k=per_query_head(p.k, p.q), v=per_query_head(p.v, p.q))


def _by_rows(p: Problem) -> tuple[Tensor, Tensor]:
    v = widen(p.v)
    o, lse = p.q.new_empty(*p.q.shape[:3], v.shape[3]), v.new_empty(p.q.shape[:3])
    for i, j, s in _row_scores(p):
        lse[..., i] = s.logsumexp(-1)
        o[..., i, :] = (reference.weights(s, lse[..., i]) @ v[..., j, :]).to(o.dtype)
    return o, lse


def _backward_by_rows(
    p: Problem,
    outputs: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    bias_grad: bool,
) -> dict[str, Tensor]:
    (o, lse), (grad, grad_lse) = outputs, grads
    d = delta(grad, grad_lse, o)
    q, k, v, g = (widen(x) for x in (p.q, p.k, p.v, grad))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    db = torch.zeros_like(widen(p.bias)) if bias_grad and p.bias is not None else None
    for i, j, s in _row_scores(p._replace(q=q, k=k)):
        a = reference.weights(s, lse[..., i])
        gi = g[..., i, :]
        dv[..., j, :] += a.transpose(-2, -1) @ gi
        ds = (gi @ v[..., j, :].transpose(-2, -1)).sub_(d[..., i, None]).mul_(a)
        if db is not None:
            part = _part(db, i, j)
            part += ds.sum_to_size(part.shape)
        dq[..., i, :] = p.scale * (ds @ k[..., j, :])
        dk[..., j, :] += ds.transpose(-2, -1) @ q[..., i, :]
    found = {"q": dq, "k": dk.mul_(p.scale), "v": dv}
    return found if db is None else {**found, "bias": db}


def _row_scores(p: Problem) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of rows, the keys that they see, and their scores (B, H, rows, keys), at most ``TILE``."""
    n, s = p.q.shape[2], p.k.shape[2]
    size = max(1, tile_entries(p.q.device, TILE) // max(1, p.q.shape[0] * p.q.shape[1] * s))
    for start in range(0, n, size):
        i = slice(start, min(start + size, n))
        j = slice(0, i.stop if p.causal else s)
        bias = None if p.bias is None else _part(p.bias, i, j)
        tile = reference.scores(p.q[..., i, :], p.k[..., j, :], bias, p.scale)
        yield i, j, reference.hide_later(tile, start) if p.causal else tile


def _part(bias: Tensor, rows: slice, keys: slice) -> Tensor:
    return bias[..., rows if bias.shape[2] > 1 else slice(None), keys]


def _empty_rows(bias: Tensor, causal: bool) -> Tensor:
    """Whether a row sees no key: (B or 1, H or 1, N or 1)."""
    seen = ~bias.isneginf()
    if not causal:
        return ~seen.any(-1)
    first = seen.byte().argmax(-1)  # the first key that is not hidden; also 0 if there is none
    return (first > torch.arange(bias.shape[3], device=bias.device)) | ~seen.any(-1)


def _fused(p: Problem) -> tuple[Tensor, Tensor] | None:
    """(o, lse) of PyTorch's CPU flash attention; None if this build or input does not support it."""
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if op is None or p.q.device.type != "cpu":
        return None
    q, k, v = (row_by_row(x) for x in _equally_wide(p.q, p.k, p.v))
    mask = _mask(p.q, p.k, p.bias)
    try:
        o, lse = op(q, k, v, 0.0, p.causal, attn_mask=mask, scale=p.scale)
    except (RuntimeError, TypeError):
        return None
    width = p.v.shape[3]
    return o if o.shape[3] == width else o[..., :width], lse


def _fused_backward(
    p: Problem, outputs: tuple[Tensor, Tensor], grad: Tensor, bias_grad: bool
) -> dict[str, Tensor] | None:
    """The gradients by the same kernel; also None if a row sees no key, which it does not support.

    The gradient of a bias per key is that of one more feature: q . k + b / scale = (q, 1/scale) . (k, b).
    """
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if op is None or p.q.device.type != "cpu":
        return None
    (o, lse), bias = outputs, p.bias
    if bias is not None and (
        (bias_grad and (bias.shape[2] > 1 or p.scale == 0)) or lse.isneginf().any()
    ):
        return None
    q, k, mask = p.q, p.k, None
    width, width_v = q.shape[-1], p.v.shape[-1]
    if bias_grad and bias is not None:
        column = bias.to(q.dtype).transpose(2, 3).expand(*k.shape[:3], 1)
        q, k = F.pad(q, (0, 1), value=1 / p.scale), torch.cat([k, column], -1)
    else:
        mask = _mask(q, k, bias)
    q, k, v, g, o = (row_by_row(x) for x in _equally_wide(q, k, p.v, grad.to(q.dtype), o))
    try:
        dq, dk, dv = op(g, q, k, v, o, lse, 0.0, p.causal, attn_mask=mask, scale=p.scale)
    except (RuntimeError, TypeError):
        return None
    found = {"q": dq[..., :width], "k": dk[..., :width], "v": dv[..., :width_v]}
    if bias_grad and bias is not None:
        found["bias"] = dk[..., width : width + 1].transpose(2, 3).sum_to_size(bias.shape)
    return found


def _mask(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    shape = torch.broadcast_shapes(bias.shape, (1, 1, q.shape[-2], k.shape[-2]))
    return row_by_row(bias.to(q.dtype)).expand(shape)


def _equally_wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad narrower tensors with zeros, since the fused kernels need keys and values of one width."""
    widths = [x.shape[-1] for x in tensors]
    if min(widths) == max(widths):
        return tensors
    return tuple(F.pad(x, (0, max(widths) - x.shape[-1])) for x in tensors)
