"""Checks of the arguments of ops: shapes, dtypes and devices, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_attention(q: Tensor, k: Tensor, v: Tensor | None = None, causal: bool = False) -> None:
    """Check queries (B, H, N, D), keys (B, Hk, S, D) and values (B, Hk, S, Dv) of one dtype and device.

    Raises:
        ValueError: they do not match, Hk does not divide H, or N is not S although ``causal`` is set.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}; give (B, H, tokens, width)")
        check_alike(name, x, "q", q)
    (batch, heads, n, width), (key_batch, key_heads, s, key_width) = q.shape, k.shape
    if key_batch != batch or key_width != width or heads % key_heads:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}; q {tuple(q.shape)} needs the same B and D, and heads "
            f"that divide its {heads}"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)}; k {tuple(k.shape)} needs the same B, heads and S"
        )
    if causal and n != s:
        raise ValueError(
            f"causal: got {n} queries and {s} keys; give as many, or a bias that hides keys"
        )


def check_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Check a bias of scores, (B or 1, H or 1, N or 1, S), floating point on the device of ``q``."""
    if bias is None:
        return
    full = (*q.shape[:3], k.shape[2])
    if not broadcasts(bias, full) or bias.shape[3] != full[3]:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}; give (B or 1, H or 1, N or 1, S) for {full}"
        )
    check_floating("bias", bias, q)


def broadcasts(x: Tensor, shape: Sequence[int]) -> bool:
    """Whether every dimension of ``x`` is 1 or equal to the same dimension of ``shape``."""
    return x.ndim == len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=True))


def check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Check that ``x`` is floating point with the dtype and device of ``y``, which messages call
    ``other``."""
    if x.dtype != y.dtype or x.device != y.device or not x.is_floating_point():
        raise ValueError(
            f"{name}: got {x.dtype} on {x.device}, {other} is {y.dtype} on {y.device}; give "
            f"floating point of one kind"
        )


def check_floating(name: str, x: Tensor, q: Tensor) -> None:
    if not x.is_floating_point() or x.device != q.device:
        raise ValueError(f"{name}: got {x.dtype} on {x.device}; give floating point on {q.device}")


def check_int32(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != torch.int32 or x.device != q.device:
        raise ValueError(f"{name}: got {x.dtype} on {x.device}; give int32 on {q.device}")


def check_positive(**numbers: int) -> None:
    if min(numbers.values()) < 1:
        given = ", ".join(str(x) for x in numbers.values())
        raise ValueError(f"{', '.join(numbers)}: got {given}; give at least 1")


def score_scale(scale: float | None, q: Tensor) -> float:
    """The factor of all scores, 1 / sqrt(D) by default."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
