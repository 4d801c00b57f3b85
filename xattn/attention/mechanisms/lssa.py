"""Length-scaled softplus attention (LSSA), also with re-weighting (LSSAR): l1 norms replace the softmax.

    a_ij = softplus(ln D ln N_i  q_i . k_j / (|q_i| |k_j|)),   A_ij = a_ij / sum_m a_im             lssa
    b_ij = max(N_i A_ij - O_i, 0)^p,                           W_ij = b_ij / sum_m b_im             lssar

N_i is the number of keys that query i sees: all of them or, if causal, the first i. In each row, N_i A_ij
has a mean of 1. With O_i = 1, therefore, only keys with more than the mean attention count, and the power
sharpens the differences between them. The factor ln N_i keeps rows equally sharp whether there are many or
few keys. The method is from Gao et al., arXiv 2501.13428.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.softplus import SoftplusOperator
from xattn.kernels.backend import without_autocast
from xattn.kernels.softmax.reference import widen

EPS_STYLES = ("none", "reference")
FLOOR = 1e-8  # lower bound of both norms in the published form


class _LengthScaled(Mechanism):
    """Base class of both forms, which scales queries and keys to length 1, and computes maps."""

    def made(self, inputs: Inputs, power: int, offset: float, eps_style: str) -> SoftplusOperator:
        """Create the operator. ``inputs.scale`` has no effect, because the lengths of q and k cancel."""
        with without_autocast(inputs.q):
            q, k = _unit(inputs.q), _unit(inputs.k)
        return SoftplusOperator(
            q,
            k,
            math.log(q.shape[-1]),
            power=power,
            offset=offset,
            eps=FLOOR if eps_style == "reference" else 0.0,
            causal=inputs.causal,
            backend=self.backend,
        )

    def maps(self, operator: SoftplusOperator, inputs: Inputs) -> dict[str, Tensor]:  # type: ignore[override]
        """Return ``received``, the attention that each patch gets from all tokens, in multiples of the
        mean, averaged over heads. With prefix tokens, except in causal calls, also return ``first``: the
        row of the first prefix token in multiples of a uniform row, (B, H, h, w)."""
        own = operator.shape[2] == operator.shape[3]
        if inputs.grid is None or len(inputs.grid) != 2 or not own:
            return {}
        ones = operator.q.new_ones(operator.shape[0], 1, operator.shape[2])
        found = {"received": operator.vecmat(ones, "mean")}
        if inputs.prefix and not inputs.causal:
            row = operator.rows(torch.zeros(1, dtype=torch.long, device=operator.device))
            found["first"] = row[:, :, 0] * operator.shape[3]
        return {
            name: x[..., inputs.prefix :].unflatten(-1, inputs.grid) for name, x in found.items()
        }


@register_attention(
    "lssa",
    paper="arXiv 2501.13428",
    complexity="N^2 D",
    causal=True,
    cross=True,
    cases=({},),
)
class LSSA(_LengthScaled):
    """Softplus attention with l1 norms.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        eps_style: "none", or "reference" to limit each sum from below by 1e-8, as in the published form.
            Rows then sum to slightly less than 1.

    Raises:
        ValueError: if ``eps_style`` is unknown, or heads have fewer than 2 channels.

    Half-precision inputs are computed in float32. On GPUs, the products use TF32.
    """

    def __init__(
        self, dim: int, num_heads: int, eps_style: str = "none", *, backend: str = "auto"
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.eps_style = _known(eps_style)
        _wide_enough(dim, num_heads)

    def operator(self, inputs: Inputs) -> SoftplusOperator:
        return self.made(inputs, 1, 0.0, self.eps_style)


@register_attention(
    "lssar",
    paper="arXiv 2501.13428",
    complexity="N^2 D",
    causal=True,
    cross=True,
    cases=({}, {"power": 3, "eps_style": "reference"}),
    studies={"swap": ({}, {"options": {"power": 3}})},
)
class LSSAR(_LengthScaled):
    """Softplus attention with re-weighting: by default, each row keeps only the keys above its mean.

    Args:
        dim, num_heads, backend, eps_style: see :class:`LSSA`.
        power: p, a whole number; the part above the mean is raised to this power. The published value is
            15; in the paper, 3 was better for lengths below 1,000.
        offset: O, from 0 to 1. It is set to 0 in the first three rows of a causal call. Without
            ``eps_style="reference"``, it is also 0 in constant rows, so that they stay uniform.

    Raises:
        ValueError: as in :class:`LSSA`, or if ``power`` or ``offset`` is out of range.

    Each row is divided by its maximum before the power is taken. This does not change the result, but it
    prevents the powers of small numbers from underflowing.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        power: int = 15,
        offset: float = 1.0,
        eps_style: str = "none",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.power, self.offset = check_whole("power", power), offset
        if not 0 <= offset <= 1:
            raise ValueError(f"offset: got {offset}; give a share of the mean from 0 to 1")
        self.eps_style = _known(eps_style)
        _wide_enough(dim, num_heads)

    def operator(self, inputs: Inputs) -> SoftplusOperator:
        return self.made(inputs, self.power, self.offset, self.eps_style)


def _known(eps_style: str) -> str:
    if eps_style not in EPS_STYLES:
        raise ValueError(f"eps_style: got {eps_style!r}; choose one of {', '.join(EPS_STYLES)}")
    return eps_style


def _wide_enough(dim: int, num_heads: int) -> None:
    if dim // num_heads < 2:
        raise ValueError(
            f"num_heads: got {num_heads} for dim {dim}; give heads of at least 2 channels, because "
            f"scores scale with ln D"
        )


def _unit(x: Tensor) -> Tensor:
    """Return x / |x| in float32 or wider; 0 for x = 0."""
    return torch.nn.functional.normalize(widen(x), dim=-1)
