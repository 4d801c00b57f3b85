"""Flow-Attention: linear attention in which keys compete for the flow to the queries.

    A_ij = a_i / I_i  Q_i . K_j  c_j          Q = sigmoid(q), K = sigmoid(k)
    a_i  = sigmoid(I'_i N / S)                allocation: the share of its incoming flow that query i takes
    c_j  = S softmax_j(clamp(O'_j))           competition: the weight that key j wins, with a mean of 1

I_i is the flow into query i. I' is the flow into each query after the flow out of every key has been
normalised to 1, and O' is the flow out of each key after the flow into every query has been normalised to 1
(:mod:`xattn.kernels.flows`). Rows of A do not sum to 1. In causal calls, all sums run over tokens 0 to i,
and c_j = (j + 1) exp(O'_j) / sum_(m <= j) exp(O'_m), which does not depend on later tokens. Prefix tokens
are treated like other tokens. The method is from Wu et al. 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from xattn.attention.base import Mechanism, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import ColumnsOperator, GatedOperator, LowRankOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.causal_low_rank import CausalLowRankOperator
from xattn.kernels.backend import without_autocast
from xattn.kernels.flows import flows
from xattn.kernels.softmax.reference import widen

EPS = {"core": 0.0, "vision": 1e-6}  # what each eps_style adds to the flow itself


class Shares(NamedTuple):
    """The quantities that the maps of a call show."""

    allocation: Tensor
    """a, (B, H, N), in (0, 1)."""
    competition: Tensor
    """c, (B, H, S); except in causal calls, its mean over the keys is 1."""


@register_attention(
    "flow",
    paper="arXiv 2202.06258",
    complexity="N D^2",
    causal=True,
    cross=True,
    cases=({}, {"clamp": None}, {"eps_style": "vision", "clamp": (-0.9, 1.1)}),
    studies={"attention-maps": {"depth": 0.0}},
)
class Flow(Mechanism):
    """Flow-Attention, which has no parameters.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        clamp: the limits (lowest, highest) to which O' is clamped before keys compete; None does not clamp.
            The mean of O' is 1, so the published limits, which are the default, clamp about half of the
            keys. Clamped keys compete as equals and pass on no gradient. ``operator.logged["saturation"]``
            is the share of keys that were clamped.
        eps_style: where 1e-6 is added. "core" adds it to both factors of every flow, "vision" also to the
            flow itself. The authors' two programs use one variant each.

    Raises:
        ValueError: if the limits are not in ascending order.

    Features and flows are computed in float32 or wider.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        clamp: tuple[float, float] | None = (-1.0, 1.0),
        eps_style: Literal["core", "vision"] = "core",
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if clamp is not None and not clamp[0] < clamp[1]:
            raise ValueError(f"clamp: got {clamp}; give (lowest, highest), in this order, or None")
        self.clamp, self.eps_style = clamp, eps_style

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.scale is not None
        own = inputs.scale * inputs.k.shape[-1] ** 0.5  # 1 unless the model has its own scale
        with without_autocast(inputs.q):
            # expit instead of sigmoid, because attn_lrp treats sigmoid as a gate
            q = torch.special.expit(widen(inputs.q) if own == 1 else widen(inputs.q) * own)
            k = torch.special.expit(widen(inputs.k))
            # There is no kernel for bidirectional flows.
            bare = self.backend == "triton" and not inputs.causal
            backend, added = "auto" if bare else self.backend, EPS[self.eps_style]
            found = flows(q, k, added=added, causal=inputs.causal, backend=backend)
            clamped = found.conserved if self.clamp is None else found.conserved.clamp(*self.clamp)
            shares = self.shares(found.refined, clamped, inputs.causal)
        scores: Operator
        right = k.transpose(-2, -1)
        if inputs.causal:
            scores = CausalLowRankOperator(q, right, signed=False, backend=self.backend)
        else:
            scores = LowRankOperator(q, right, signed=False)
        won = ColumnsOperator(scores, shares.competition)
        operator = GatedOperator(won, shares.allocation / found.incoming, signed=False)
        operator.context = shares
        changed = clamped != found.conserved
        operator.logged = {"saturation": changed.mean(dtype=clamped.dtype)}
        return operator

    def shares(self, refined: Tensor, conserved: Tensor, causal: bool) -> Shares:
        """Compute allocation and competition from I' (B, H, N) and the clamped O' (B, H, S)."""
        n, s = refined.shape[2], conserved.shape[2]
        if not causal:
            refined = refined if n == s else refined * (n / s)
            return Shares(refined.sigmoid(), s * conserved.softmax(-1))
        count = torch.arange(1, s + 1, device=conserved.device, dtype=conserved.dtype)
        competition = count * (conserved - conserved.logcumsumexp(-1)).exp()
        return Shares(refined.sigmoid(), competition)

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``competition``, the weight c of each patch as a key, and ``allocation``, the weight a of
        each patch as a query, both per head; and ``received``, the sum of A over the queries, averaged over
        heads."""
        own = operator.shape[2] == operator.shape[3]
        if inputs.grid is None or len(inputs.grid) != 2 or not own:
            return {}
        ones = inputs.q.new_ones(operator.shape[0], 1, operator.shape[2])
        found = {
            "competition": operator.context.competition,
            "allocation": operator.context.allocation,
            "received": operator.vecmat(ones, "mean"),
        }
        return {
            name: x[..., inputs.prefix :].unflatten(-1, inputs.grid) for name, x in found.items()
        }
