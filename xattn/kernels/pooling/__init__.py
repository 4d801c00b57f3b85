"""Softmax pooling: a few queries attend to many wide tokens; the scores may also be given directly.

    o, lse = softmax_pooling(q, k, v, bias),   s = scale q k^T + bias,   o = exp(s - lse) v

Heads with learned queries pool the tokens of an image in this way (attention: Vaswani et al., arXiv
1706.03762). The scores are written once and are small compared with the tokens. A perturbation of the
scores is a bias, so the gradient of the bias is the gradient with respect to the scores. Without q and k,
the bias holds the scores.
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose
from xattn.kernels.checks import check_alike
from xattn.kernels.op import register
from xattn.kernels.pooling import reference
from xattn.kernels.pooling.reference import Problem
from xattn.kernels.softmax.reference import wide


def softmax_pooling(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute ``softmax(scale q k^T + bias) v`` and the log-sum-exp of the scores.

    Args:
        q: (B or 1, Q, D); ``k``: (B, T, D), keys that all queries share. Give both or neither.
        v: (B, G, T, V); each group of values serves Q / G consecutive queries. It has the dtype and device
            of q and k.
        bias: (B, Q, T), added to the scores; without q and k it holds the scores themselves. -inf hides a
            token. Differentiable.
        scale: 1 / sqrt(D) by default.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, Q, V) in the dtype of ``v``, and lse (B, Q) in float32 (float64 for float64). A row that
        sees no token has o = 0 and lse = -inf, and passes no gradient on. The weights are
        ``exp(scores - lse)``. Both have first and second derivatives, the latter in plain PyTorch.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check(q, k, v, bias)
    if scale is None:
        scale = 1.0 if q is None else q.shape[-1] ** -0.5
    found: tuple[Tensor, Tensor] = _op(
        Problem(q, k, v, bias, float(scale), choose(backend, v.device, v.dtype))
    )
    return found


def check(q: Tensor | None, k: Tensor | None, v: Tensor, bias: Tensor | None) -> None:
    """Raise a ``ValueError`` that names the tensor whose shape, dtype or device does not match."""
    if v.ndim != 4 or 0 in v.shape or not v.is_floating_point():
        raise ValueError(
            f"v: got {v.dtype} of shape {tuple(v.shape)}; give floating point (B, G, T, V)"
        )
    batch, groups, tokens, _ = v.shape
    if (q is None) != (k is None) or (q is None and bias is None):
        raise ValueError("q, k, bias: give queries and keys, or the scores as bias, or all three")
    if q is not None and k is not None:
        check_alike("q", q, "v", v)
        check_alike("k", k, "v", v)
        if k.ndim != 3 or k.shape[:2] != (batch, tokens):
            raise ValueError(f"k: got shape {tuple(k.shape)}; v needs ({batch}, {tokens}, D)")
        fits = q.ndim == 3 and q.shape[0] in (1, batch) and q.shape[2] == k.shape[2]
        if not fits or not q.shape[1]:
            raise ValueError(
                f"q: got shape {tuple(q.shape)}; keys {tuple(k.shape)} need ({batch} or 1, Q, "
                f"{k.shape[2]})"
            )
    queries = bias.shape[1] if q is None and bias is not None and bias.ndim > 1 else 0
    queries = queries if q is None else q.shape[1]
    if bias is not None:
        if bias.shape != (batch, queries, tokens) or bias.device != v.device:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)} on {bias.device}; give ({batch}, "
                f"{queries or 'Q'}, {tokens}) on {v.device}"
            )
        if not bias.is_floating_point():
            raise ValueError(f"bias: got {bias.dtype}; give floating point, -inf hides a token")
    if queries % groups:
        raise ValueError(f"v: got {groups} groups for {queries} queries; give a divisor of them")


def _empty(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    (batch, queries, tokens), kind = p.sizes, wide(p.v.dtype)
    kept = (0,) if p.q is None and p.backend == "triton" else (queries, tokens)
    return (
        p.v.new_empty(batch, queries, p.v.shape[3]),
        p.v.new_empty(batch, queries, dtype=kind),
        p.v.new_empty(batch, *kept, dtype=kind),
    )


_op = register(
    "pooling",
    Problem,
    outputs=("o", "lse"),
    kept=("kept",),
    empty=_empty,
    gradients=("q", "k", "v", "bias"),
    second=reference.second,
    batched=True,
)
