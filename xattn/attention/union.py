"""Softmax attention over a union of parts, each of them a call of an op that gives its log-sum-exp.

    L = log sum_s exp(L_s + c_s),   o = sum_s exp(L_s + c_s - L) o_s

c_s is a constant that is added to all scores of part s. Forward, parts are merged as they come. Backward
needs no part of its own: with the union's o and L - c_s in place of o_s and L_s, the backward of an op
gives what the union passes on to that part, because p_ij = exp(s_ij + c_s - L) whichever part key j is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xattn.kernels.op import LAYOUTS


@dataclass(frozen=True)
class Part:
    """A call of the op ``name`` with outputs (o, lse) for a record of its arguments."""

    name: str
    problem: Any
    shift: float = 0.0
    """c, added to all of its scores."""
    offset: Tensor | None = None
    """(B or 1, H or 1, N), added to all scores of a query; it may have a gradient."""


def attend_union(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """o (B, H, N, Dv) and the log-sum-exp (B, H, N); a row that sees no key has 0 and -inf."""
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
    return _Union.apply(calls, fields, *tensors)  # type: ignore[no-any-return]


def _alone(part: Part) -> tuple[Tensor, Tensor]:
    return getattr(torch.ops.xattn, f"{part.name}_forward")(*part.problem)  # type: ignore[no-any-return]


def _merged(parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
    """The union by differentiable steps: for compiled code, which cannot trace :class:`_Union`, and for
    the gradient of offsets."""
    outputs, logs = [], []
    for part in parts:
        o, own = _alone(part)
        own = own + part.shift
        outputs.append(o)
        logs.append(own if part.offset is None else own + part.offset.to(own.dtype))
    lse = torch.stack(logs)
    # Where no part has a key, exp(-inf - -inf) would be NaN, also in the backward pass.
    empty = lse.isneginf().all(0)
    lse = lse.masked_fill(empty, 0.0)
    total = lse.logsumexp(0)
    share = (lse - total).exp()[..., None].to(outputs[0].dtype)
    first, *rest = (w * own for w, own in zip(share, outputs, strict=True))
    return sum(rest, first), total.masked_fill(empty, -torch.inf)


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Any, fields: Any, *tensors: Tensor | None) -> Any:
        at, o, total = 0, None, None
        for name, shift, count, rest in calls:
            op = getattr(torch.ops.xattn, f"{name}_forward")
            own, lse = op(*tensors[at : at + count], *rest)
            lse = lse + shift
            if o is None or total is None:
                o, total = own, lse
            else:
                new = torch.logaddexp(total, lse)
                share = (lse - new).exp().masked_fill(lse.isneginf(), 0.0)
                o, total = o.lerp_(own, share[..., None].to(o.dtype)), new
            at += count
        ctx.calls, ctx.fields = calls, fields
        ctx.save_for_backward(*tensors, o, total)
        ctx.set_materialize_grads(False)
        return o, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:  # type: ignore[override]
        *tensors, o, total = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(tensors)
        if grad is None and grad_lse is None:
            return None, None, *found
        grad = torch.zeros_like(o) if grad is None else grad
        at = 0
        for (name, shift, count, rest), own in zip(ctx.calls, ctx.fields, strict=True):
            wanted = [ctx.needs_input_grad[2 + at + i] for i in own]
            if any(wanted):
                op = getattr(torch.ops.xattn, f"{name}_backward")
                given = tensors[at : at + count]
                flat = op(grad, grad_lse, o, total - shift, *given, *rest, wanted)
                for i, x, wants in zip(own, flat, wanted, strict=True):
                    found[at + i] = x if wants else None
            at += count
        return None, None, *found
