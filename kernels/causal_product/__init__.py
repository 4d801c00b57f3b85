"""Causal low-rank products, in time and memory linear in the number of tokens.

    Y_i = L_i . sum_(j <= i) R_j (x) X_j,   that is Y = tril(L R^T) X

Attention with features in place of softmax has this form. The sum, an (f, m) state, is carried from
chunk to chunk; the gradients are three more such products, two of them over later tokens. Chunks as in
Hua et al. 2022, arXiv 2202.10447, and Yang et al. 2023, arXiv 2312.06635.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xattn.kernels.backend import choose, own_precision
from xattn.kernels.causal_product import cpu, reference
from xattn.kernels.op import define


def causal_product(
    left: Tensor, right: Tensor, x: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """``tril(left right^T) x``, or ``triu(left right^T) x`` if ``reverse``.

    The transposed product, r A for A = tril(left right^T), is
    ``causal_product(right, left, r^T, reverse=True)``.

    Args:
        left: (..., N, f), with any leading dimensions, for instance (B, H); ``right``: (..., N, f);
            ``x``: (..., N, m), all of one dtype and device.
        reverse: sum over the tokens j >= i in place of j <= i.
        backend: "reference", or "cpu", which is plain PyTorch and runs on every device; "auto" is "cpu".

    Returns:
        (..., N, m) in the dtype of ``x``; sums are in float32 at least, also under autocast. Gradients
        of any order; both passes take O(N (f + m)) memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, or a backend that the op lacks.
    """
    _check(left, right, x)
    if backend == "triton":
        raise ValueError(
            "backend: got 'triton'; causal products have 'auto', 'cpu' and 'reference'"
        )
    backend = "cpu" if backend == "auto" else choose(backend, x.device)
    flat = (t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (left, right, x))
    return torch.ops.xattn.causal_product(*flat, reverse, backend).view(x.shape)


def _check(left: Tensor, right: Tensor, x: Tensor) -> None:
    for name, t in (("left", left), ("right", right), ("x", x)):
        if t.ndim < 2 or 0 in t.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; give (..., N, width)")
        if t.dtype != left.dtype or t.device != left.device or not t.is_floating_point():
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device}, left is {left.dtype} on {left.device}; give "
                f"floating point of one kind"
            )
    if right.shape != left.shape:
        raise ValueError(f"right: got shape {tuple(right.shape)}; left has {tuple(left.shape)}")
    if x.shape[:-1] != left.shape[:-1]:
        needed = ", ".join(str(size) for size in left.shape[:-1])
        raise ValueError(f"x: got shape {tuple(x.shape)}; left needs ({needed}, m)")


def _product(left: Tensor, right: Tensor, x: Tensor, reverse: bool, backend: str) -> Tensor:
    with own_precision(x):
        return (reference if backend == "reference" else cpu).forward(left, right, x, reverse)


define(
    "xattn::causal_product",
    "(Tensor left, Tensor right, Tensor x, bool reverse, str backend) -> Tensor",
    _product,
    lambda left, right, x, reverse, backend: x.new_empty(x.shape),
)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    """dL_i = sum_j R_j (X_j . dY_i),  dR_j = sum_i L_i (X_j . dY_i),  dX_j = sum_i dY_i (L_i . R_j)."""
    left, right, x = ctx.saved_tensors
    product = torch.ops.xattn.causal_product
    same, other = (ctx.reverse, ctx.backend), (not ctx.reverse, ctx.backend)
    wanted = ctx.needs_input_grad
    return (
        product(grad, x, right, *same) if wanted[0] else None,
        product(x, grad, left, *other) if wanted[1] else None,
        product(right, left, grad, *other) if wanted[2] else None,
        None,
        None,
    )


torch.library.register_autograd("xattn::causal_product", _differentiate, setup_context=_setup)
