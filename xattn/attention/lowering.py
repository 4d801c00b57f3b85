"""Which path attention over key segments takes: dense, with a mask, in bands, or lists of key blocks.

    o_i = sum_j p_ij v_j,   p_i = softmax over the union of the segments' visible keys

Each segment is attended alone; log-sum-exps L_s merge the parts exactly, L = logsumexp_s L_s and
o = sum_s exp(L_s - L) o_s, and because they are differentiable so is the whole. Mechanisms say what is
visible; only this module decides how that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import spread_heads, to_heads
from xattn.attention.segments import Blocks, Segment, visible_blocks
from xattn.kernels.block_sparse import block_sparse_attention
from xattn.kernels.softmax import softmax_attention

DENSE = 2048  # the most keys for which a mask is stored
BANDED = 1280  # up to so many keys bands of a stored mask beat lists
SMALL = 512  # below so many keys gathering never pays


def attend(
    q: Tensor, segments: Sequence[Segment], *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of ``q`` (B, H, N, D) over the union of the segments' keys.

    Returns:
        o (B, H, N, Dv) and the log-sum-exp (B, H, N); a row that sees no key has 0 and -inf.

    Raises:
        ValueError: no segment, or shapes, dtypes and indices that do not match.
    """
    if not segments:
        raise ValueError("segments: got none; give at least one Segment(k, v)")
    parts = [_shifted(_attend(q, s, scale, backend), s.offset) for s in segments]
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part[1] for part in parts])
    # Where no segment has a key, exp(-inf - -inf) would be NaN, also in the backward pass.
    empty = lse.isneginf().all(0)
    lse = lse.masked_fill(empty, 0.0)
    total = lse.logsumexp(0)
    share = (lse - total).exp()[..., None].to(q.dtype)
    first, *rest = (w * part[0] for w, part in zip(share, parts, strict=True))
    return sum(rest, first), total.masked_fill(empty, -torch.inf)


def attend_output(
    q: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float | None = None,
    backend: str = "auto",
    every_row: bool = False,
) -> Tensor:
    """o of :func:`attend`, by PyTorch's own attention where that can answer: for short inputs the
    log-sum-exp costs as much as a tenth of the call.

    Args:
        every_row: whether every row is known to see a key in spite of a bias.
    """
    if backend == "auto" and len(segments) == 1 and segments[0].v is not None:
        s, heads = segments[0], q.shape[1]
        fixed = s.bias is None or (every_row and not needs_grad(s.bias))
        if fixed and s.rule is None and (s.blocks is None or reads_all(s.k, s.blocks)):
            bias = None if s.bias is None else to_heads(s.bias, heads)[:, :, None, :]
            k, v = spread_heads(s.k, heads), spread_heads(s.v, heads)  # type: ignore[arg-type]
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return attend(q, segments, scale=scale, backend=backend)[0]


def needs_grad(x: Tensor) -> bool:
    """Whether a gradient of ``x`` may be asked for, now."""
    return torch.is_grad_enabled() and x.requires_grad


def _shifted(part: tuple[Tensor, Tensor], offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """A part whose scores all grow by their query's ``offset``: only the log-sum-exp does."""
    o, lse = part
    return part if offset is None else (o, lse + to_heads(offset, o.shape[1]).to(lse.dtype))


def _attend(q: Tensor, s: Segment, scale: float | None, backend: str) -> tuple[Tensor, Tensor]:
    if s.v is None:
        raise ValueError("segments: got one without values; give Segment(k, v)")
    bias = None if s.bias is None else to_heads(s.bias, q.shape[1])[:, :, None, :]
    if s.blocks is None and s.rule is None:
        return softmax_attention(q, s.k, s.v, bias, scale=scale, backend=backend)
    blocks = s.blocks or visible_blocks(s.rule, 64, 64)  # type: ignore[arg-type]
    if backend == "auto" and s.rule is None and reads_all(s.k, blocks):
        return softmax_attention(q, s.k, s.v, bias, scale=scale)
    return block_sparse_attention(
        q,
        s.k,
        s.v,
        blocks.index.to(q.device),
        q_block=blocks.q_block,
        k_block=blocks.k_block,
        bias=s.bias,
        box=None if s.rule is None else s.rule.to(q.device),
        scale=scale,
        backend=backend,
    )


def mask_is_faster(q: Tensor, keys: int, blocks: Blocks, backend: str, fixed: bool) -> bool:
    """Whether dense attention with a stored mask beats gathering the listed keys.

    Never on a GPU, with a backend of the caller's choice, or above 2048 keys, where the mask would
    take too much memory. Lists of single queries share no gathered key, so they need longer inputs.
    Of other lists a mask has to be ``fixed``, made once: to make one takes longer than to gather.
    """
    if backend != "auto" or q.device.type != "cpu" or keys > DENSE:
        return False
    if blocks.q_block == 1:
        return True
    return fixed and (keys < SMALL or 3 * blocks.index.shape[-1] * blocks.k_block > keys)


def bands_are_faster(q: Tensor, keys: int, backend: str) -> bool:
    """Whether a kept mask in bands, where it falls into some, beats gathering the listed keys."""
    return backend == "auto" and q.device.type == "cpu" and keys <= BANDED


def reads_all(k: Tensor, blocks: Blocks) -> bool:
    """Whether every list holds every block; False on a GPU, where looking would stall the stream, and
    in compiled code, which cannot look."""
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return blocks.holds_all(-(-k.shape[2] // blocks.k_block))
