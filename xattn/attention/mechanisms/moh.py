"""Mixture-of-head attention: each token assigns weights to the heads and uses only a few of them.

    A_i = diag(g_i) softmax(q_i k_i^T / sqrt(D))        for head i

    shared heads   g_i = b_1 M_s softmax(W_1 x)_i
    routed heads   g_i = b_2 k P_i / (sum of the k largest P),  P = softmax(W_r x);  0 for the others
                   [b_1, b_2] = 2 softmax(W_0 x)

There are M_s shared heads, which all tokens use, and M_r routed heads, of which each token uses k. If all W
are zero, every head in use has the factor 1. The balance loss is M_r sum_i mean(P_i) mean(g_i > 0), where
the means are over all tokens. This loss equals k if the heads are used equally. The method is from Jin et
al., arXiv 2410.11842; the factors 2, M_s and k follow the authors' code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn.attention.base import Mechanism, check_whole, register_attention
from xattn.attention.inputs import Inputs
from xattn.attention.operators.algebra import GatedOperator
from xattn.attention.operators.base import Operator, SoftmaxOperator
from xattn.kernels.softmax.reference import widen


@register_attention(
    "moh",
    paper="arXiv 2410.11842",
    complexity="N^2 D",
    causal=True,
    grouped=True,
    cases=({"shared": 0, "active": 1}, {"shared": 1}, {"shared": 2}),
    bench=({},),
    studies={"attention-maps": {"channels": {"gates": ("head",)}}},
)
class MoH(Mechanism):
    """Softmax attention in which each token selects heads.

    Args:
        dim, num_heads, backend: see :class:`~xattn.attention.base.Mechanism`.
        shared: M_s, the number of heads, counted from the first, that all tokens use. If it equals
            ``num_heads``, there are no routed heads, and b_1 is 1; if it is 0, there are no shared heads,
            and b_2 is 1.
        active: k, how many of the M_r other heads a token uses; by default half of them, rounded up.
        balance: the weight of the balance loss in ``aux``. If training adds up the ``aux`` of L layers,
            divide this weight by L to match the paper.

    Raises:
        ValueError: if there are too few heads for ``shared`` and ``active``, or ``balance`` is negative.

    W_0 and W_1 start at zero, and W_r with random numbers of standard deviation 0.02. With 256 keys or
    more, a CPU computes only the heads that a token uses, except in a causal call.
    """

    reads = ("tokens",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared: int = 1,
        active: int | None = None,
        balance: float = 0.01,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, backend=backend)
        self.shared = check_whole("shared", shared) if shared else 0
        self.routed, self.balance = num_heads - self.shared, balance
        if self.routed < 0:
            raise ValueError(f"shared: got {shared}; give at most {num_heads}, the number of heads")
        self.active = -(-self.routed // 2) if active is None else check_whole("active", active)
        if balance < 0:
            raise ValueError(f"balance: got {balance}; give a weight of 0 or more")
        if self.active > self.routed:
            raise ValueError(
                f"active: got {active}; give at most {self.routed}, the number of routed heads"
            )
        widths = {}
        if self.shared and self.routed:
            widths["share"] = 2
        if self.shared > 1:
            widths["shared"] = self.shared
        if self.routed:
            widths["routed"] = self.routed
        self.router = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(width, dim)) for name, width in widths.items()}
        )
        if self.routed:
            nn.init.normal_(self.router["routed"], std=0.02)

    def operator(self, inputs: Inputs) -> Operator:
        assert inputs.x is not None
        gates, loss = self.gates(inputs.x)
        softmax = SoftmaxOperator(
            inputs.q, inputs.k, inputs.scale, backend=self.backend, causal=inputs.causal
        )
        operator = GatedOperator(softmax, gates, signed=False, sparse=self.active < self.routed)
        if loss is not None:
            operator.aux = {"balance": self.balance * loss}
        return operator

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute g (B, H, N) for tokens x (B, N, C), and the balance loss, which is None without routed
        heads."""
        with torch.autocast(x.device.type, enabled=False):  # rounding could change the selection
            weights = {
                name: F.linear(widen(x), widen(w)).softmax(-1) for name, w in self.router.items()
            }
        share, shared = weights.get("share"), weights.get("shared")
        loss, gates = None, []
        if self.shared:
            g = widen(x).new_ones(*x.shape[:2], 1) if shared is None else self.shared * shared
            gates.append(g if share is None else 2 * share[..., :1] * g)
        if self.routed:
            p = weights["routed"]
            best, index = p.topk(self.active, -1)
            none = torch.zeros_like(p)
            g = none.scatter(-1, index, self.active * best / best.sum(-1, keepdim=True))
            used = none.scatter(-1, index, 1.0)
            loss = self.routed * torch.dot(p.mean((0, 1)), used.mean((0, 1)))
            gates.append(g if share is None else 2 * share[..., 1:] * g)
        return torch.cat(gates, -1).transpose(1, 2), loss

    def maps(self, operator: Operator, inputs: Inputs) -> dict[str, Tensor]:
        """Return ``gates``, g of the patches (B, H, h, w), which shows where each head is used; elsewhere,
        it is 0."""
        if inputs.grid is None or len(inputs.grid) != 2:
            return {}
        assert isinstance(operator, GatedOperator)
        return {"gates": operator.factor[..., inputs.prefix :].unflatten(-1, inputs.grid)}
