"""Softmax attention with log-sum-exp by PyTorch's fused CPU kernel, or by tiles of rows.

No N x S matrix is stored except a bias of the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.kernels.softmax import reference
from xattn.kernels.softmax.reference import delta, per_key_head, per_query_head, widen

TILE = 2**20  # scores in a tile of rows, over batch and heads: 4 MB in float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    k, v = per_query_head(k, q), per_query_head(v, q)
    fused = _fused(q, k, v, bias, scale, causal)
    if fused is None:
        return _by_rows(q, k, v, bias, scale, causal)
    o, lse = fused
    if bias is None:
        return o, lse
    # For rows without a key the output of the fused kernels is undefined.
    empty = _empty_rows(bias, causal)
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
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    keys, values = per_query_head(k, q), per_query_head(v, q)
    grads = None
    if grad_lse is None:
        grads = _fused_backward(grad, q, keys, values, bias, o, lse, scale, causal, bias_grad)
    if grads is None:
        d = delta(grad, grad_lse, o)
        grads = _backward_by_rows(grad, q, keys, values, bias, lse, d, scale, causal, bias_grad)
    dq, dk, dv, db = grads
    db = None if db is None or bias is None else db.to(bias.dtype)
    return dq.to(q.dtype), per_key_head(dk, k), per_key_head(dv, v), db


def _by_rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    vw = widen(v)
    o, lse = q.new_empty(*q.shape[:3], v.shape[3]), vw.new_empty(q.shape[:3])
    for i, j, b in _rows(q, k, bias, causal):
        s = _scores(q, k, b, scale, causal, i, j)
        lse[..., i] = s.logsumexp(-1)
        o[..., i, :] = (reference.weights(s, lse[..., i]) @ vw[..., j, :]).to(o.dtype)
    return o, lse


def _backward_by_rows(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    d: Tensor,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    qw, kw, vw, g = (widen(x) for x in (q, k, v, grad))
    dq, dk, dv = torch.empty_like(qw), torch.zeros_like(kw), torch.zeros_like(vw)
    db = torch.zeros_like(widen(bias)) if bias_grad and bias is not None else None
    for i, j, b in _rows(q, k, bias, causal):
        p = reference.weights(_scores(qw, kw, b, scale, causal, i, j), lse[..., i])
        gi = g[..., i, :]
        dv[..., j, :] += p.transpose(-2, -1) @ gi
        ds = (gi @ vw[..., j, :].transpose(-2, -1)).sub_(d[..., i, None]).mul_(p)
        if db is not None:
            part = db[..., i if db.shape[2] > 1 else slice(None), j]
            part += ds.sum_to_size(part.shape)
        dq[..., i, :] = scale * (ds @ kw[..., j, :])
        dk[..., j, :] += ds.transpose(-2, -1) @ qw[..., i, :]
    return dq, dk.mul_(scale), dv, db


def _rows(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows of at most ``TILE`` scores, the keys that they see, and their part of the bias."""
    n, s = q.shape[2], k.shape[2]
    size = max(1, TILE // max(1, q.shape[0] * q.shape[1] * s))
    for start in range(0, n, size):
        i = slice(start, min(start + size, n))
        j = slice(0, i.stop if causal else s)
        part = None if bias is None else bias[..., i if bias.shape[2] > 1 else slice(None), j]
        yield i, j, part


def _scores(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    causal: bool,
    rows: slice,
    keys: slice,
) -> Tensor:
    """(B, H, rows, keys), with the part of the bias that belongs there."""
    s = reference.scores(q[..., rows, :], k[..., keys, :], bias, scale)
    return reference.hide_later(s, rows.start) if causal else s


def _empty_rows(bias: Tensor, causal: bool) -> Tensor:
    """Whether a row sees no key: (B or 1, H or 1, N or 1)."""
    seen = ~bias.isneginf()
    if not causal:
        return ~seen.any(-1)
    first = seen.byte().argmax(-1)  # the first key that is not hidden, 0 also if there is none
    return (first > torch.arange(bias.shape[3], device=bias.device)) | ~seen.any(-1)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor] | None:
    """(o, lse) of PyTorch's CPU flash attention; None if this build or input does not support it."""
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if op is None or q.device.type != "cpu":
        return None
    width = v.shape[-1]
    q, k, v = (_last_contiguous(x) for x in _equally_wide(q, k, v))
    try:
        o, lse = op(q, k, v, 0.0, causal, attn_mask=_mask(q, k, bias), scale=scale)
    except (RuntimeError, TypeError):
        return None
    return o[..., :width], lse


def _fused_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """The same kernel's gradients; None also if a row sees no key, which it does not support.

    A bias per key gets its gradient as one more feature: q . k + b / scale = (q, 1/scale) . (k, b).
    """
    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    if op is None or q.device.type != "cpu":
        return None
    if bias is not None and (
        (bias_grad and (bias.shape[2] > 1 or scale == 0)) or lse.isneginf().any()
    ):
        return None
    grad, mask = grad.to(q.dtype), None
    width, width_v = q.shape[-1], v.shape[-1]
    if bias_grad and bias is not None:
        column = bias.to(q.dtype).transpose(2, 3).expand(*k.shape[:3], 1)
        q, k = F.pad(q, (0, 1), value=1 / scale), torch.cat([k, column], -1)
    else:
        mask = _mask(q, k, bias)
    q, k, v, grad, o = (_last_contiguous(x) for x in _equally_wide(q, k, v, grad, o))
    try:
        grads = op(grad, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale)
    except (RuntimeError, TypeError):
        return None
    db = None
    if bias_grad and bias is not None:
        db = grads[1][..., width : width + 1].transpose(2, 3).sum_to_size(bias.shape)
    return grads[0][..., :width], grads[1][..., :width], grads[2][..., :width_v], db


def _mask(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    shape = torch.broadcast_shapes(bias.shape, (1, 1, q.shape[-2], k.shape[-2]))
    return _last_contiguous(bias.to(q.dtype)).expand(shape)


def _equally_wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Zeros behind the narrower ones: the fused kernels need keys and values of one width."""
    widths = [x.shape[-1] for x in tensors]
    if min(widths) == max(widths):
        return tensors
    return tuple(F.pad(x, (0, max(widths) - x.shape[-1])) for x in tensors)


def _last_contiguous(x: Tensor) -> Tensor:
    """The fused kernels read the last dimension as if it were contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
