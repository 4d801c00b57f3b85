"""Softmax attention whose log-sum-exp is a differentiable output.

    o, lse = softmax_attention(q, k, v)

Since lse has a gradient, attention over several key segments needs only plain PyTorch in addition: attend
to each segment, then merge by L = logsumexp(lse), o = sum exp(lse - L) o. Source: FlashAttention-2 (arXiv
2307.08691).
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.backend import choose, width_limit
from xattn.kernels.checks import check_attention, check_bias, score_scale
from xattn.kernels.op import calls_op, register
from xattn.kernels.softmax.reference import Problem, empty_outputs

_op = register(
    "softmax",
    Problem,
    outputs=("o", "lse"),
    empty=empty_outputs,
    gradients=("q", "k", "v", "bias"),
)


@calls_op(_op, tuple[Tensor, Tensor])
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Problem:
    """Compute ``softmax(scale q k^T + bias) v`` and the log-sum-exp of the scores.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D); ``v``: (B, Hk, S, Dv), of one dtype and device. Query
            head h reads key head h // (H // Hk).
        bias: (B or 1, H or 1, N or 1, S), added to the scores; -inf hides a key. Differentiable.
        scale: 1 / sqrt(D) by default.
        causal: whether query i sees only keys 0 to i; needs N = S and takes about half the time.
        backend: see :func:`xattn.kernels.backend.choose`.

    Returns:
        o (B, H, N, Dv) in the dtype of ``q``, and lse (B, H, N) in float32 (float64 for float64). A
        row that sees no key has o = 0 and lse = -inf, and passes no gradient on.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_attention(q, k, v, causal)
    check_bias(bias, q, k)
    path = choose(backend, q.device, q.dtype, width_limit(q, v))
    return Problem(q, k, v, bias, score_scale(scale, q), causal, path)
