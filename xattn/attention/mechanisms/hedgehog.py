"""Hedgehog: linear attention with a learned feature map in place of the exponential.

    A_ij = phi_q(q_i) . phi_k(k_j) / sum_m phi_q(q_i) . phi_k(k_m)

    exp      phi(x) = [exp(u), exp(-u)]
    softmax  phi(x) = [softmax(u), softmax(-u)]
    joint    phi(x) = softmax([2 u, -2 u])
    elu      phi(x) = elu(x) + 1                      the usual baseline, which learns nothing

Here u = x W + b; each head has one W and b for queries and another for keys. W is initialised to the
identity, so a converted layer has to be trained, for example to reproduce the rows of the softmax layer
that it replaces. In causal calls, the sums include only the tokens up to the query. Prefix tokens are
treated like other tokens.

The method is from Zhang et al. 2024, arXiv 2402.04347. The map ``softmax`` is from LoLCATs (arXiv
2410.10254), ``joint`` with biases is from the library flash-linear-attention, and ``elu`` is from
Katharopoulos et al. 2020 (arXiv 2006.16236).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import LowRankOperator
from xattn.attention.operators.base import Operator
from xattn.attention.operators.causal_low_rank import CausalLowRankOperator
from xattn.kernels.backend import without_autocast
from xattn.kernels.causal_product import causal_product
from xattn.kernels.softmax.reference import widen

FEATURES = ("exp", "softmax", "joint", "elu")
LEAST = 1e-12  # lower bound of the features softmax and joint, so that no row is empty


@register_attention(
    "hedgehog",
    paper="arXiv 2402.04347",
    complexity="N f D",
    causal=True,
    cross=True,
    cases=(
        {},
        {"feature": "softmax", "width": 5},
        {"feature": "joint", "bias": True},
        {"feature": "elu"},
    ),
)
class Hedgehog(Mechanism):
    """Linear attention with the feature maps of Hedgehog.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        feature: "exp", "softmax", "joint" or "elu"; the module docstring defines them.
        width: the number of columns of W, f / 2, since there is one feature of each sign per column; by
            default the width of a head.
        bias: whether u has a bias, which starts at zero.

    Raises:
        ValueError: if ``feature`` is unknown, or "elu" is combined with ``width`` or ``bias``.

    Feature maps are computed in float32 or wider.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feature: str = "exp",
        width: int | None = None,
        bias: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        if feature not in FEATURES:
            raise ValueError(f"feature: got {feature!r}; choose one of {', '.join(FEATURES)}")
        self.feature = feature
        if feature == "elu":
            if width is not None or bias:
                raise ValueError("width, bias: the feature map 'elu' has neither; leave them out")
            return
        head = dim // num_heads
        columns = head if width is None else check_whole("width", width)
        identity = torch.eye(head, columns).repeat(num_heads, 1, 1)
        self.q_map, self.k_map = nn.Parameter(identity), nn.Parameter(identity.clone())
        zeros = torch.zeros(num_heads, 1, columns)
        self.q_bias = nn.Parameter(zeros) if bias else None
        self.k_bias = nn.Parameter(zeros.clone()) if bias else None

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Compute phi_q (B, H, N, f) and phi_k (B, H, S, f), up to factors that cancel in A."""
        with without_autocast(q):
            if self.feature == "elu":
                return _elu_plus_one(widen(q)), _elu_plus_one(widen(k))
            zq = self._signed(q, self.q_map, self.q_bias)
            zk = self._signed(k, self.k_map, self.k_bias)
            if self.feature == "exp":
                return _exponentials(zq, zk)
            return self._shares(zq), self._shares(zk)

    def _signed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute [u, -u], (B, H, N, f)."""
        u = widen(x) @ widen(weight)
        u = u if bias is None else u + widen(bias)
        return torch.cat([u, -u], -1)

    def _shares(self, z: Tensor) -> Tensor:
        if self.feature == "joint":
            return (2 * z).softmax(-1).clamp_min(LEAST)
        return z.unflatten(-1, (2, -1)).softmax(-1).flatten(-2).clamp_min(LEAST)

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.scale is not None
        k = inputs.k
        q = inputs.q * (inputs.scale * k.shape[-1] ** 0.5)  # 1 unless the model has its own scale
        left, right = self.features(q, k)
        tiny = torch.finfo(left.dtype).tiny
        if inputs.causal:
            ones, backend = torch.ones_like(left[..., :1]), self.backend
            total = causal_product(left, right, ones, backend=backend)
            low_rank: Any = partial(CausalLowRankOperator, backend=backend)
        else:
            with without_autocast(q):
                total = left @ right.sum(-2)[..., None]
            low_rank = LowRankOperator
        right = right.transpose(-2, -1)
        operator = low_rank(left / total.clamp_min(tiny), right, stochastic=True, signed=False)
        if self.feature != "elu":
            operator.selection = self.q_map.shape[2] * (q.shape[2] + k.shape[2]) / 2
        return operator

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``received``, the attention that each patch gets from all tokens, averaged over heads."""
        own = operator.shape[2] == operator.shape[3]
        if inputs.grid is None or len(inputs.grid) != 2 or not own:
            return {}
        ones = inputs.q.new_ones(operator.shape[0], 1, operator.shape[2])
        received = operator.vecmat(ones, "mean")[..., inputs.prefix :]
        return {"received": received.unflatten(-1, inputs.grid)}


def _exponentials(zq: Tensor, zk: Tensor) -> tuple[Tensor, Tensor]:
    """Compute exp(zq) and exp(zk) in place and without overflow, up to factors that cancel in A.

    The largest exponent of each feature over all keys is moved from the keys to the queries, and each query
    is divided by its largest feature. Constants per feature, exp(zq + c) exp(zk - c), and per query cancel
    in A; a constant per key would not. Every query then has a feature whose product with some key is 1, so
    no row of the bidirectional form is empty. In the causal form, a row is empty if all its keys are
    smaller than later ones by a factor of e^-87.
    """
    largest = zk.detach().amax(-2, keepdim=True)
    zq = zq.add_(largest)  # in place: with many tokens, memory traffic dominates
    return zq.sub_(zq.detach().amax(-1, keepdim=True)).exp_(), zk.sub_(largest).exp_()


def _elu_plus_one(x: Tensor) -> Tensor:
    """Compute elu(x) + 1, which is exact even where elu(x) rounds to -1."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())
