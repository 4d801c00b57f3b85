"""Compute attention over key segments: dense, with a mask, in bands, or with lists of key blocks.

    o_i = sum_j p_ij v_j,   p_i = softmax over the union of the segments' visible keys

Mechanisms specify what is visible, and only this module decides how to compute it. Attention to each
segment is computed by an op that also returns its log-sum-exp L_s. The outputs o_s are then merged exactly:

    L = log sum_s exp(L_s + c_s),   o = sum_s exp(L_s + c_s - L) o_s

c_s is a constant that is added to all scores of segment s. The forward pass merges the segments one after
the other. The backward pass runs each op's own backward pass, but gives it o and L - c_s of the union
instead of o_s and L_s. Each op then returns the part of the union's gradient that belongs to its segment,
because p_ij = exp(s_ij + c_s - L) for every key j of the segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.attention.inputs import may_read_values, on_cpu, to_heads
from xattn.attention.operators.base import fused_attention
from xattn.attention.selection import Blocks, Segment, visible_blocks
from xattn.kernels import block_sparse, grouped, softmax
from xattn.kernels.op import LAYOUTS


@dataclass(frozen=True)
class UnionPart:
    """One part of a union: the name of an op that returns (o, lse), and the record of its arguments."""

    name: str
    problem: Any
    shift: float = 0.0
    """c, added to all scores of the part."""
    offset: Tensor | None = None
    """(B or 1, H or 1, N), added to all scores of a query; it may have a gradient."""


def attend_union(parts: Sequence[UnionPart]) -> tuple[Tensor, Tensor]:
    """Compute o (B, H, N, Dv) and the log-sum-exp (B, H, N). A row that sees no key gets 0 and -inf."""
    offsets = any(part.offset is not None for part in parts)
    if len(parts) == 1 and not parts[0].shift and not offsets:
        return _alone(parts[0])
    if offsets or torch.compiler.is_compiling():
        return _merged(parts)
    calls, tensors = [], []
    for part in parts:
        count = LAYOUTS[part.name][0]
        calls.append((part.name, part.shift, count, tuple(part.problem[count:])))
        tensors += part.problem[:count]
    fields = [LAYOUTS[part.name][1] for part in parts]
    return _Union.apply(calls, fields, _merge_of(parts), *tensors)  # type: ignore[no-any-return]


def _alone(part: UnionPart) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.xattn, f"{part.name}_forward")(*part.problem)  # type: ignore[no-any-return]


def _merged(parts: Sequence[UnionPart]) -> tuple[Tensor, Tensor]:
    """Compute the union in differentiable steps. This is for compiled code, which cannot trace
    :class:`_Union`, and for the gradient of offsets."""
    outputs, logs = [], []
    for part in parts:
        o, own = _alone(part)
        own = own + part.shift
        outputs.append(o)
        logs.append(own if part.offset is None else own + part.offset.to(own.dtype))
    lse = torch.stack(logs)
    # If no part has a key, exp(-inf - -inf) would be NaN, also in the backward pass.
    empty = lse.isneginf().all(0)
    lse = lse.masked_fill(empty, 0.0)
    total = lse.logsumexp(0)
    share = (lse - total).exp()[..., None].to(outputs[0].dtype)
    first, *rest = (w * own for w, own in zip(share, outputs, strict=True))
    return sum(rest, first), total.masked_fill(empty, -torch.inf)


def merge_outputs(o: Tensor, lse: Tensor, own: Tensor, own_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two parts, given their outputs and log-sum-exps. This overwrites ``o``."""
    total = torch.logaddexp(lse, own_lse)
    share = (own_lse - total).exp().masked_fill(own_lse.isneginf(), 0.0)
    return o.lerp_(own, share[..., None].to(o.dtype)), total


def _merge_of(parts: Sequence[UnionPart]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that merges two parts: :func:`merge_outputs` or its Triton kernel."""
    if any(part.problem.backend != "triton" for part in parts):
        return merge_outputs
    from xattn.kernels.tiles import merge  # needs Triton

    return merge


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Any, fields: Any, merge: Any, *tensors: Tensor | None) -> Any:
        found: tuple[Tensor, ...] = ()
        at = 0
        for name, shift, count, rest in calls:
            op = getattr(torch.ops.xattn, f"{name}_forward")
            own, lse = op(*tensors[at : at + count], *rest)
            lse = lse + shift if shift else lse
            found = merge(*found, own, lse) if found else (own, lse)
            at += count
        o, total = found
        ctx.calls, ctx.fields = calls, fields
        ctx.save_for_backward(*tensors, o, total)
        ctx.set_materialize_grads(False)
        return o, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:  # type: ignore[override]
        *tensors, o, total = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(tensors)
        if grad is None and grad_lse is None:
            return None, None, None, *found
        grad = torch.zeros_like(o) if grad is None else grad
        at = 0
        for (name, shift, count, rest), own in zip(ctx.calls, ctx.fields, strict=True):
            wanted = [ctx.needs_input_grad[3 + at + i] for i in own]
            if any(wanted):
                op = getattr(torch.ops.xattn, f"{name}_backward")
                given = tensors[at : at + count]
                own_total = total - shift if shift else total
                flat = op(grad, grad_lse, o, own_total, *given, *rest, wanted)
                for i, x, wants in zip(own, flat, wanted, strict=True):
                    found[at + i] = x if wants else None
            at += count
        return None, None, None, *found


DENSE = 2048  # largest number of keys for which a mask is stored
BANDED = 1280  # largest number of keys for which bands of a stored mask are faster than lists
SMALL = 512  # with fewer keys, a stored mask is always faster than gathering keys


def attend(
    q: Tensor, segments: Sequence[Segment], *, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute attention of ``q`` (B, H, N, D) over the union of the segments' keys.

    Returns:
        o (B, H, N, Dv) and the log-sum-exp (B, H, N). A row that sees no key gets 0 and -inf.

    Raises:
        ValueError: if there is no segment, or if shapes, dtypes or indices do not match.

    Example:
        >>> import torch
        >>> from xattn.attention import Segment, attend
        >>> q, k, v = torch.rand(3, 1, 2, 5, 8)
        >>> output, lse = attend(q, [Segment(k, v)])
        >>> output.shape, lse.shape
        (torch.Size([1, 2, 5, 8]), torch.Size([1, 2, 5]))
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
    """Compute only the o of :func:`attend`, with PyTorch's own attention if possible.

    For short inputs, computing the log-sum-exp would take up to a tenth of the time of a call.

    Args:
        every_row: whether every row is known to see a key, even though there is a bias.
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
            return fused_attention(q, s.k, s.v, bias, scale=scale)  # type: ignore[arg-type]
    return attend(q, segments, scale=scale, backend=backend)[0]


def needs_grad(x: Tensor) -> bool:
    """Return whether a gradient of ``x`` may currently be needed."""
    return torch.is_grad_enabled() and x.requires_grad


def _part(q: Tensor, s: Segment, scale: float | None, backend: str) -> UnionPart:
    if s.v is None:
        raise ValueError("segments: got one without values; give Segment(k, v)")
    offset = None if s.offset is None else to_heads(s.offset, q.shape[1])
    if s.marks is not None:
        return UnionPart("grouped", _grouped(q, s, scale, backend), s.shift, offset)
    if s.rule is None and (s.blocks is None or (backend == "auto" and reads_all(s.k, s.blocks))):
        bias = None if s.bias is None else to_heads(s.bias, q.shape[1])[:, :, None, :]
        dense = softmax.softmax_attention.problem(q, s.k, s.v, bias, scale=scale, backend=backend)
        return UnionPart("softmax", dense, s.shift, offset)
    blocks = s.blocks or visible_blocks(s.rule, 64, 64)  # type: ignore[arg-type]
    sparse = block_sparse.block_sparse_attention.problem(
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
    return UnionPart("block_sparse", sparse, s.shift, offset)


def _grouped(q: Tensor, s: Segment, scale: float | None, backend: str) -> grouped.Problem:
    if s.blocks is None or s.rule is not None:
        raise ValueError("segments: marks need blocks and no rule; give Segment(k, v, blocks)")
    assert s.v is not None and s.marks is not None
    return grouped.grouped_attention.problem(
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
    """Return whether dense attention with a stored mask is faster than gathering the listed keys.

    The answer is always False on a GPU, with a backend chosen by the caller, and above 2048 keys, where the
    mask would take too much memory. Otherwise the answer is True for lists of single queries, which share
    no gathered keys. For other lists the answer can only be True if the mask is ``fixed`` and therefore
    built only once; building a mask for every call would take longer than gathering.
    """
    if backend != "auto" or not on_cpu(q) or keys > DENSE:
        return False
    if blocks.q_block == 1:
        return True
    return fixed and (keys < SMALL or 3 * blocks.index.shape[-1] * blocks.k_block > keys)


def bands_are_faster(q: Tensor, keys: int, backend: str) -> bool:
    """Return whether a stored mask that divides into bands is faster than gathering the listed keys."""
    return backend == "auto" and on_cpu(q) and keys <= BANDED


def reads_all(k: Tensor, blocks: Blocks) -> bool:
    """Return whether every list contains every block. The answer is always False on a GPU, where reading
    the lists would stall the stream, and in compiled code, which cannot read values."""
    if not may_read_values(k):
        return False
    return blocks.holds_all(-(-k.shape[2] // blocks.k_block))
