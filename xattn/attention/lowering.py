"""Which path attention over key segments takes: dense, with a mask, in bands, or lists of key blocks.

    o_i = sum_j p_ij v_j,   p_i = softmax over the union of the segments' visible keys

Each segment is attended alone, and log-sum-exps merge them exactly, see :mod:`xattn.attention.union`.
Mechanisms say what is visible; only this module decides how that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn.attention.inputs import spread_heads, to_heads
from xattn.attention.segments import Blocks, Segment, visible_blocks
from xattn.attention.union import Part, attend_union
from xattn.kernels import block_sparse, grouped, softmax

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
    return attend_union([_part(q, s, scale, backend) for s in segments])


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
        if (
            fixed
            and not s.shift
            and s.marks is None
            and s.rule is None
            and (s.blocks is None or reads_all(s.k, s.blocks))
        ):
            bias = None if s.bias is None else to_heads(s.bias, heads)[:, :, None, :]
            k, v = spread_heads(s.k, heads), spread_heads(s.v, heads)  # type: ignore[arg-type]
            return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    return attend(q, segments, scale=scale, backend=backend)[0]


def needs_grad(x: Tensor) -> bool:
    """Whether a gradient of ``x`` may be asked for, now."""
    return torch.is_grad_enabled() and x.requires_grad


def _part(q: Tensor, s: Segment, scale: float | None, backend: str) -> Part:
    if s.v is None:
        raise ValueError("segments: got one without values; give Segment(k, v)")
    offset = None if s.offset is None else to_heads(s.offset, q.shape[1])
    if s.marks is not None:
        return Part("grouped", _grouped(q, s, scale, backend), s.shift, offset)
    if s.rule is None and (s.blocks is None or (backend == "auto" and reads_all(s.k, s.blocks))):
        bias = None if s.bias is None else to_heads(s.bias, q.shape[1])[:, :, None, :]
        dense = softmax.problem(q, s.k, s.v, bias, scale=scale, backend=backend)
        return Part("softmax", dense, s.shift, offset)
    blocks = s.blocks or visible_blocks(s.rule, 64, 64)  # type: ignore[arg-type]
    sparse = block_sparse.problem(
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
    return Part("block_sparse", sparse, s.shift, offset)


def _grouped(q: Tensor, s: Segment, scale: float | None, backend: str) -> grouped.Problem:
    if s.blocks is None or s.rule is not None:
        raise ValueError("segments: marks need blocks and no rule; give Segment(k, v, blocks)")
    assert s.v is not None and s.marks is not None
    return grouped.problem(
        q,
        s.k,
        s.v,
        s.marks,
        s.blocks.index.to(q.device),
        q_block=s.blocks.q_block,
        k_block=s.blocks.k_block,
        bias=s.bias,
        weight=s.weight,
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
