"""Attention received: the weighted sum of every column of attention, without storing N x S.

    m_j = sum_i w_i P_ij,   P_ij = exp(scale q_i . k_j + bias_ij - lse_i)

A column mass is the product of one row vector per head with attention, so it runs on the kernels of
:mod:`xattn.kernels.vecmat`. Its use as token importance follows SpAtten (arXiv 2012.09852).
"""

from __future__ import annotations

from torch import Tensor

from xattn.kernels.checks import broadcasts, check_attention, check_bias, check_floating
from xattn.kernels.vecmat import vecmat


def column_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """How much attention each key receives from all queries.

    Args:
        q: (B, H, N, D); ``k``: (B, Hk, S, D), of one dtype and device.
        lse: (B, H, N), as :func:`xattn.kernels.softmax.softmax_attention` returns it.
        weights: (B or 1, H or 1, N), w of the queries; 1 by default. 1 / N gives a mean, and a single
            1 the row of that query.
        bias, scale, causal, backend: as for :func:`xattn.kernels.vecmat.vecmat`.

    Returns:
        (B, H, S) in float32 (float64 for float64), with gradients for every tensor given. Without
        weights, the sum over keys is the number of queries that see a key.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    check_attention(q, k, causal=causal)
    check_bias(bias, q, k)
    shape = tuple(q.shape[:3])
    if weights is None:
        weights = lse.new_ones((shape[0], 1, shape[2]))
    if not broadcasts(weights, shape) or weights.shape[2] != shape[2]:
        raise ValueError(
            f"weights: got shape {tuple(weights.shape)}; give (B or 1, H or 1, N) for {shape}"
        )
    check_floating("weights", weights, q)
    r = weights[:, :, None].expand(*shape[:2], 1, shape[2])
    mass = vecmat(
        q, k, lse, r, bias=bias, scale=scale, causal=causal, reduce="none", backend=backend
    )
    return mass.squeeze(2)
