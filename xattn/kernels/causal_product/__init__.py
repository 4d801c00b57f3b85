"""Causal low-rank products, in time and memory linear in the number of tokens.

    Y_i = L_i . sum_(j <= i) R_j (x) X_j,   that is Y = tril(L R^T) X

Attention with features instead of softmax has this form. The sum, a state (f, m), is carried from chunk to
chunk. The gradients are three more such products, two of them over later tokens. Chunks are as in Hua et
al. 2022, arXiv 2202.10447, and Yang et al. 2023, arXiv 2312.06635.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from xattn.kernels.backend import choose
from xattn.kernels.causal_product.reference import Problem
from xattn.kernels.checks import check_alike
from xattn.kernels.op import register


def causal_product(
    left: Tensor, right: Tensor, x: Tensor, *, reverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Compute ``tril(left right^T) x``, or ``triu(left right^T) x`` if ``reverse``.

    The transposed product, r A for A = tril(left right^T), is
    ``causal_product(right, left, r^T, reverse=True)``.

    Args:
        left: (..., N, f), with any leading dimensions, for instance (B, H); ``right``: (..., N, f);
            ``x``: (..., N, m), all of one dtype and device.
        reverse: sum over the tokens j >= i instead of j <= i.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        (..., N, m) in the dtype of ``x``. Sums are in float32 at least, also under autocast; a GPU may
        multiply float32 in TF32 where PyTorch's products may do so. The result has gradients of any order;
        the forward and the backward pass take O(N (f + m)) memory.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    _check(left, right, x)
    backend = choose(backend, x.device, x.dtype)
    a, b, c = (t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (left, right, x))
    return _op(Problem(a, b, c, reverse, backend)).view(x.shape)


def _check(left: Tensor, right: Tensor, x: Tensor) -> None:
    for name, t in (("left", left), ("right", right), ("x", x)):
        if t.ndim < 2 or 0 in t.shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}; give (..., N, width)")
        check_alike(name, t, "left", left)
    if right.shape != left.shape:
        raise ValueError(f"right: got shape {tuple(right.shape)}; left has {tuple(left.shape)}")
    if x.shape[:-1] != left.shape[:-1]:
        needed = ", ".join(str(size) for size in left.shape[:-1])
        raise ValueError(f"x: got shape {tuple(x.shape)}; left needs ({needed}, m)")


def _backward(
    p: Problem, grads: Sequence[Tensor | None], wanted: Collection[str]
) -> dict[str, Tensor]:
    """dL_i = sum_j R_j (X_j . dY_i),  dR_j = sum_i L_i (X_j . dY_i),  dX_j = sum_i dY_i (L_i . R_j)."""
    (grad,) = grads
    assert grad is not None
    later = not p.reverse
    problems = {
        "left": p._replace(left=grad, right=p.x, x=p.right),
        "right": p._replace(left=p.x, right=grad, x=p.left, reverse=later),
        "x": p._replace(left=p.right, right=p.left, x=grad, reverse=later),
    }
    return {field: _op(problem) for field, problem in problems.items() if field in wanted}


_op = register(
    "causal_product",
    Problem,
    outputs=("out",),
    empty=lambda p: (torch.empty_like(p.x, memory_format=torch.contiguous_format),),
    gradients=("left", "right", "x"),
    backward=_backward,
)
