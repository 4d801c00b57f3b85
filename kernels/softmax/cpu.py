"""Softmax attention with log-sum-exp by PyTorch's fused CPU kernel; backward by tiles of rows.

No N x S matrix is stored except a bias of the caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax import reference
from xattn.kernels.softmax.reference import delta, widen

TILE = 2**20  # scores in a tile of rows, over batch and heads: 4 MB in float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    fused = _fused(q, k, v, bias, scale)
    if fused is not None:
        o, lse = fused
    else:
        mask = None if bias is None else bias.to(q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        lse = torch.cat(
            [
                reference.scores(q[..., i, :], k, b, scale).logsumexp(-1)
                for i, b in _rows(q, k, bias)
            ],
            -1,
        )
    if bias is None:
        return o, lse
    # For rows without a key the output of the fused kernels is undefined.
    empty = bias.isneginf().all(-1)
    if not empty.any():
        return o, lse
    empty = empty.expand(lse.shape)
    lse = lse.masked_fill(empty, -torch.inf)
    return o.masked_fill(empty[..., None], 0.0), lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if grad_lse is None:
        fused = _fused_backward(grad, q, k, v, bias, o, lse, scale, bias_grad)
        if fused is not None:
            return fused
    d = delta(grad, grad_lse, o)
    kw, vw, g = widen(k), widen(v), widen(grad)
    dq, dk, dv = torch.empty_like(widen(q)), torch.zeros_like(kw), torch.zeros_like(vw)
    db = torch.zeros_like(widen(bias)) if bias_grad and bias is not None else None
    for i, b in _rows(q, k, bias):
        rows = widen(q[..., i, :])
        p = reference.weights(reference.scores(rows, k, b, scale), lse[..., i])
        gi = g[..., i, :]
        dv += p.transpose(-2, -1) @ gi
        ds = (gi @ vw.transpose(-2, -1)).sub_(d[..., i, None]).mul_(p)
        if db is not None and b is not None:
            part = db if bias is None or bias.shape[-2] == 1 else db[..., i, :]
            part += ds.sum_to_size(part.shape)
        dq[..., i, :] = scale * (ds @ kw)
        dk += ds.transpose(-2, -1) @ rows
    dk *= scale
    db = db.to(bias.dtype) if db is not None and bias is not None else None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), db


def _rows(q: Tensor, k: Tensor, bias: Tensor | None) -> list[tuple[slice, Tensor | None]]:
    """Slices of at most ``TILE`` scores over the rows, with their part of the bias."""
    size = max(1, TILE // max(1, q.shape[0] * q.shape[1] * k.shape[-2]))
    tiles: list[tuple[slice, Tensor | None]] = []
    for start in range(0, q.shape[-2], size):
        i = slice(start, start + size)
        part = bias if bias is None or bias.shape[-2] == 1 else bias[..., i, :]
        tiles.append((i, part))
    return tiles


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor] | None:
    """(o, lse) of PyTorch's CPU flash attention; None if this build or input does not support it."""
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if op is None or q.device.type != "cpu" or q.shape[-1] != v.shape[-1]:
        return None
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    try:
        o, lse = op(q, k, v, 0.0, False, attn_mask=_mask(q, k, bias), scale=scale)
    except (RuntimeError, TypeError):
        return None
    return o, lse


def _fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """The same kernel's gradients; None also if a row sees no key, which it does not support.

    A bias per key gets its gradient as one more feature: q . k + b / scale = (q, 1/scale) . (k, b).
    """
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if op is None or q.device.type != "cpu" or q.shape[-1] != v.shape[-1]:
        return None
    if bias is not None and (
        (bias_grad and (bias.shape[2] > 1 or scale == 0)) or lse.isneginf().any()
    ):
        return None
    grad, mask = grad.to(q.dtype), None
    if bias_grad and bias is not None:
        width = q.shape[-1]
        column = bias.to(q.dtype).transpose(2, 3).expand(*k.shape[:3], 1)
        q, k = F.pad(q, (0, 1), value=1 / scale), torch.cat([k, column], -1)
        v, o, grad = (F.pad(x, (0, 1)) for x in (v, o, grad))
    else:
        mask = _mask(q, k, bias)
    q, k, v, grad, o = (_last_contiguous(x) for x in (q, k, v, grad, o))
    try:
        grads = op(grad, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale)
    except (RuntimeError, TypeError):
        return None
    if not bias_grad or bias is None:
        return *grads, None
    db = grads[1][..., width:].transpose(2, 3).sum_to_size(bias.shape)
    return *(x[..., :width] for x in grads), db.to(bias.dtype)


def _mask(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    shape = torch.broadcast_shapes(bias.shape, (1, 1, q.shape[-2], k.shape[-2]))
    return _last_contiguous(bias.to(q.dtype)).expand(shape)


def _last_contiguous(x: Tensor) -> Tensor:
    """The fused kernels read the last dimension as if it were contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
